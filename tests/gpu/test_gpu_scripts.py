"""Stock scripts launched on the GPUs that are there: replicated on each, and split over all by the plan's map."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parallel_tune.engines import installed
from parallel_tune.script_placement import device_map

ROOT = Path(__file__).parents[2]
GPUS = torch.cuda.device_count()
SCRIPTS = ("unsloth_sft.py", "trl_sft.py")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS == 0, reason="no GPU"),
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="module")
def model(shape: Callable[[str], Path]) -> Path:
    return shape("llama-1b")


def launched(folder: Path, strategy: str, script: str, model: Path) -> Path:
    """The run directory of a script that has ended well."""
    pytest.importorskip("trl")
    if script.startswith("unsloth") and not installed("unsloth"):
        pytest.skip("unsloth is not installed")
    run, out = folder / "run", folder / "out"
    arguments = [model, ROOT / "examples/short_answers.jsonl", out, "--max_steps=3"]
    done = subprocess.run(
        [
            sys.executable, "-P", "-m", "parallel_tune", "launch", f"--strategy={strategy}", f"--model={model}",
            "--max_seq_length=1024", f"--output_dir={run}", ROOT / "examples/scripts" / script, *arguments,
        ],
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, cwd=folder, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    logs = "\n".join(path.read_text()[-3000:] for path in run.glob("logs/*.log"))
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr}\n{logs}"
    assert (out / "adapter_model.safetensors").exists()
    return run


def said(run: Path, rank: int) -> tuple[tuple[int, int], list[int]]:
    """Rank and world size, and each layer's GPU, as a process printed them."""
    log = run.joinpath("logs", f"rank-{rank}.log").read_text()
    process = re.search(r"^process (\d+) of (\d+)$", log, re.MULTILINE)
    layers = re.search(r"^layers on (\[.*\])$", log, re.MULTILINE)
    assert process and layers, log[-3000:]
    places = [torch.device(name) for name in ast.literal_eval(layers[1])]
    assert {place.type for place in places} == {"cuda"}
    return (int(process[1]), int(process[2])), [place.index for place in places]


@pytest.mark.parametrize("script", SCRIPTS)
def test_ddp_puts_a_replica_on_each_gpu(tmp_path: Path, script: str, model: Path) -> None:
    run = launched(tmp_path, "ddp", script, model)
    plan = json.loads((run / "plan.json").read_text())
    assert plan["processes"] == GPUS
    for rank in range(GPUS):
        process, places = said(run, rank)
        assert process == (rank, GPUS)
        assert places == [rank] * 16


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("script", SCRIPTS)
def test_model_parallel_lays_the_layers_where_the_plan_says(tmp_path: Path, script: str, model: Path) -> None:
    run = launched(tmp_path, "model_parallel", script, model)
    assert [path.name for path in run.glob("logs/rank-*.json")] == ["rank-0.json"]
    process, places = said(run, 0)
    assert process == (0, 1)
    planned = device_map(json.loads((run / "plan.json").read_text()), 0)
    assert planned is not None
    assert places == [planned[f"model.layers.{layer}"] for layer in range(16)]
    assert set(places) == set(range(GPUS))
