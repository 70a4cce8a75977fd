# make demo | make test | make install.  STRATEGY=ddp or model_parallel chooses the demo's strategy.
PYTHON ?= python3
STRATEGY ?= auto
VENV := .venv
BIN := $(VENV)/bin
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
# On a machine without GPUs the demo and the tests use two virtual devices.
HARDWARE := $(if $(GPU),,--hardware cpu:2)

export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install demo test test-gpu lint clean

install: $(VENV)/.installed $(if $(GPU),$(VENV)/.unsloth)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable ".[dev]"
	touch $@

# Without dependencies: Unsloth declares packages that text training does not need and that may not load here.
$(VENV)/.unsloth: $(VENV)/.installed constraints-unsloth.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-unsloth.txt
	touch $@

demo: install
	$(BIN)/parallel-tune demo --strategy $(STRATEGY) $(HARDWARE)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Each process has its half of the tests in their order, so that what a file makes is made once; who is done helps.
test: install $(VENV)/.unsloth lint
	$(BIN)/python -m pytest -m "not gpu" -n 2 --dist worksteal $(PYTEST_ARGS)

# Passed tests are noted and left out when it is called again; GPU_MINUTES bounds one call.
GPU_MINUTES ?= 30
test-gpu: install
	$(BIN)/python -m pytest -m gpu tests/gpu -n 4 --gpu-done outputs/gpu-tests.txt --gpu-minutes $(GPU_MINUTES) $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build *.egg-info
