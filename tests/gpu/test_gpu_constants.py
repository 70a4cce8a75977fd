"""This machine's constants, measured and printed: `pytest -m gpu -s tests/gpu/test_gpu_constants.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from parallel_tune.hardware import probe_details
from parallel_tune.machine import know
from parallel_tune.memory import constants
from parallel_tune.memory.settings import CUDA_DEFAULTS
from parallel_tune.nvml import read_nvml

MIB = 1 << 20


@pytest.mark.gpu
def test_constants_are_measured_twice_alike_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not read_nvml():
        pytest.skip("no GPU")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    hardware = probe_details(dict(os.environ)).hardware
    machine = know(hardware, "missing", in_4bit=True)
    name = hardware.devices[0].name
    first = constants.read(machine.keys[name])
    assert first is not None, machine.said
    know(hardware, "always")
    second = constants.read(machine.keys[name])
    assert second is not None
    with capsys.disabled():
        print(f"\n{machine.keys[name].words}")
        print(f"{'':<20}{'first':>12}{'second':>12}{'built in':>12}  bytes (MiB)")
        for field, size in asdict(first).items():
            if field.endswith("_bytes"):
                again, built_in = getattr(second, field), getattr(CUDA_DEFAULTS, field)
                row = [f"{v // MIB:>12}" if v is not None else f"{'-':>12}" for v in (size, again, built_in)]
                print(f"{field:<20}{''.join(row)}  {size}")
        print("\n".join((*first.notes, *machine.said)))
    assert 200 * MIB < first.context_bytes < 3072 * MIB
    assert abs(first.context_bytes - second.context_bytes) <= 32 * MIB
    assert 2 * MIB <= first.segment_bytes <= 64 * MIB
    assert first.workspace_bytes <= 256 * MIB
    if len(hardware.devices) > 1:
        assert first.nccl_bytes is not None, first.notes
        assert second.nccl_bytes is not None, second.notes
        assert 16 * MIB < first.nccl_bytes < 4096 * MIB
        assert abs(first.nccl_bytes - second.nccl_bytes) <= 64 * MIB
    else:
        assert first.nccl_bytes is None
    if machine.keys[name].bitsandbytes != "none":
        assert first.nf4_scratch_bytes is not None
        assert first.nf4_scratch_bytes < 1024 * MIB
    # The plan that follows knows them, and measures nothing.
    assert know(hardware).measured[name].context_bytes == second.context_bytes


SETTLED = """
import torch

from strategies.workspaces import settle_workspaces

device = torch.device("cuda", 0)
settle_workspaces([device])
before = torch.cuda.memory_allocated()
layer = torch.nn.Linear(256, 256, bias=False, device=device, dtype=torch.bfloat16)
layer(torch.ones(8, 256, device=device, dtype=torch.bfloat16)).sum().backward()
del layer
print(before, torch.cuda.memory_allocated())
"""


@pytest.mark.gpu
def test_after_workspaces_are_settled_training_takes_no_more_of_them(checkout: dict[str, str]) -> None:
    if not read_nvml():
        pytest.skip("no GPU")
    done = subprocess.run(
        [sys.executable, "-c", SETTLED], env=checkout,
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    settled, later = map(int, done.stdout.split())
    assert settled >= 2 * MIB
    assert later == settled
