"""Joined rows on a GPU train as padded ones, up to the noise of bfloat16: real Unsloth, and our kernel call."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("default"),
]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
def test_gradients_of_joined_rows_are_those_of_padded_rows(engine: str, family: str, tmp_path: Path) -> None:
    if engine == "unsloth" and importlib.util.find_spec("unsloth") is None:
        pytest.skip("needs unsloth")
    script = Path(__file__).with_name("joined_gradients.py")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "UNSLOTH_COMPILE_LOCATION": str(tmp_path / "compiled")}
    command = [sys.executable, str(script), engine, family, str(tmp_path / "model")]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    said = json.loads(done.stdout.splitlines()[-1])
    print(engine, family, said)
    # Padded rows in other arrangements differ by rounding; joined rows may by about as much.
    noise = max(said["padded"]["gradient"], said["again"]["gradient"], 5e-3)
    for name in ("joined", "all joined"):
        assert said[name]["gradient"] < (1.5 if engine == "transformers" else 2) * noise
        assert said[name]["loss"] < 2e-3
    if engine == "transformers":
        assert said["flash_serves"] == (said["flash_kernels"] > 0)
        assert said["without boundaries"]["gradient"] > 5 * noise


@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
def test_whole_runs_agree(engine: str, shape: Callable[[str], Path], tmp_path: Path) -> None:
    if engine == "unsloth" and importlib.util.find_spec("unsloth") is None:
        pytest.skip("needs unsloth")
    root = Path(__file__).parents[2]
    rows = {}
    for padding_free in ("off", "on"):
        run = tmp_path / padding_free
        command = [
            sys.executable, "-m", "parallel_tune", f"--model={shape('llama-1b')}", f"--engine={engine}",
            f"--dataset={root / 'examples' / 'short_answers.jsonl'}", "--max_seq_length=256", "--max_steps=6",
            "--global_batch_size=8", "--per_device_train_batch_size=4", "--strategy=ddp", f"--output_dir={run}",
            f"--padding_free={padding_free}", "--report_to=none",
        ]  # fmt: skip
        done = subprocess.run(
            command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert json.loads((run / "report.json").read_text())["padding_free"] == (padding_free == "on")
        rows[padding_free] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for padded, joined in zip(rows["off"], rows["on"], strict=True):
        assert joined["loss"] == pytest.approx(padded["loss"], rel=2e-3)
        assert joined["grad_norm"] == pytest.approx(padded["grad_norm"], rel=3e-2)
