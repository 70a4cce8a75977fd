"""Captured steps on a GPU: the losses of eager ones, most tokens replayed, and eager steps where a model reads the GPU.

`pytest -m gpu tests/gpu/test_gpu_capture.py` runs it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from strategies.replay import CudaGraphs, Replay

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("default"),
]
ROOT = Path(__file__).parents[2]


def train(model: Path, run: Path, *options: str) -> tuple[list[float], dict[str, Any]]:
    """Losses and report of a run through the command line."""
    done = subprocess.run(
        [
            sys.executable, "-m", "parallel_tune", f"--model={model}", f"--output_dir={run}", "--strategy=ddp",
            f"--dataset={ROOT / 'examples' / 'short_answers.jsonl'}", "--max_steps=40", "--global_batch_size=4",
            "--max_seq_length=512", "--max_devices=1", "--report_to=none", *options,
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"},
        capture_output=True, text=True, check=False, timeout=420,
    )  # fmt: skip
    log = run / "logs" / "rank-0.log"
    assert done.returncode == 0, done.stderr[-2000:] + (log.read_text()[-3000:] if log.exists() else "")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row], json.loads((run / "report.json").read_text())


@pytest.mark.parametrize("four_bit", [False, True], ids=["bf16", "4bit"])
@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
def test_a_captured_run_follows_the_eager_one(
    engine: str, four_bit: bool, shape: Callable[[str], Path], tmp_path: Path
) -> None:
    needed = [*(["unsloth"] if engine == "unsloth" else []), *(["bitsandbytes"] if four_bit else [])]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {' and '.join(missing)}")
    options = [f"--engine={engine}", *(["--load_in_4bit"] if four_bit else [])]
    eager, _ = train(shape("qwen3-1b"), tmp_path / "eager", *options, "--capture=off")
    captured, report = train(shape("qwen3-1b"), tmp_path / "captured", *options)
    found = report["captured"]
    print(engine, four_bit, found, eager[-1], captured[-1])
    assert found["reason"] is None
    assert found["replayed_elements"] > 0.8 * found["elements"]
    assert captured == pytest.approx(eager, rel=5e-3)


@pytest.mark.parametrize("four_bit", [False, True], ids=["bf16", "4bit"])
@pytest.mark.parametrize("split", [(), ("--strategy=model_parallel", "--stages=2")], ids=["replica", "stages"])
def test_compiled_layers_follow_the_eager_run(
    split: tuple[str, ...], four_bit: bool, shape: Callable[[str], Path], tmp_path: Path
) -> None:
    options = ["--engine=transformers", *(["--load_in_4bit"] if four_bit else []), *split]
    eager, _ = train(shape("qwen3-1b"), tmp_path / "eager", *options, "--capture=off")
    _, before = train(shape("qwen3-1b"), tmp_path / "plain", *options, "--capture=on")
    compiled, report = train(shape("qwen3-1b"), tmp_path / "compiled", *options, "--capture=on", "--torch_compile")
    found = report["captured"]
    print(split, four_bit, found, "tokens/s", before["tokens_per_second"], report["tokens_per_second"])
    assert (found["reason"], found["uncompiled_reason"], found["compiled"]) == (None, None, True)
    assert found["replayed_elements"] > 0.8 * found["elements"]
    assert compiled == pytest.approx(eager, rel=5e-3)


@pytest.mark.parametrize("split", [(), ("--strategy=model_parallel", "--stages=2")], ids=["replica", "stages"])
def test_a_loss_by_chunks_is_captured_and_is_the_plain_one(
    split: tuple[str, ...], shape: Callable[[str], Path], tmp_path: Path
) -> None:
    options = ["--engine=transformers", *split]
    plain, _ = train(shape("qwen3-1b"), tmp_path / "plain", *options, "--capture=off", "--cross_entropy=plain")
    eager, before = train(shape("qwen3-1b"), tmp_path / "eager", *options, "--capture=off", "--cross_entropy=fused")
    captured, report = train(shape("qwen3-1b"), tmp_path / "captured", *options, "--cross_entropy=fused")
    found = report["captured"]
    print(split, found, "tokens/s", before["tokens_per_second"], report["tokens_per_second"], before["devices"])
    assert found["reason"] is None
    assert found["replayed_elements"] > 0.8 * found["elements"]
    assert eager == pytest.approx(plain, rel=5e-3)
    assert captured == pytest.approx(eager, rel=5e-3)


def test_a_step_that_reads_the_gpu_is_run_eagerly_and_training_goes_on() -> None:
    device = torch.device("cuda", 0)
    weight = torch.nn.Parameter(torch.ones(8, device=device))
    replay = Replay(lambda: [weight], device, CudaGraphs(device))

    def forward(_: int, batch: Any) -> Tensor:
        kept = batch["x"][batch["x"] > 0]  # how many is for the host to ask
        return (kept.sum() * weight).sum()

    batches = [{"x": torch.randn(16, device=device)} for _ in range(4)]
    for batch in batches:
        replay.run([batch], forward, backward=lambda loss: loss.backward())
        expected = torch.full_like(weight, float(batch["x"][batch["x"] > 0].sum()))
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, expected)
    assert replay.report.reason is not None and "cannot be captured" in replay.report.reason
    # Random numbers and new graphs still work on this device.
    torch.randn(4, device=device)
    other = Replay(lambda: [weight], device, CudaGraphs(device))
    for batch in batches:
        other.run([batch], lambda _, each: (each["x"].sum() * weight).sum(), backward=lambda loss: loss.backward())
        torch.testing.assert_close(weight.grad, torch.full_like(weight, float(batch["x"].sum())))
    assert other.report.reason is None and other.report.replayed_elements == 32
