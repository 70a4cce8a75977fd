"""Under ddp each rank holds memory on its own card alone, by NVML: no stray context on the first one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pynvml
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.gpu
def test_no_rank_holds_memory_on_two_cards(tmp_path: Path) -> None:
    pynvml.nvmlInit()
    if pynvml.nvmlDeviceGetCount() < 2:
        pytest.skip("needs two GPUs")
    shapes = ROOT / "examples" / "benchmarks" / "shapes.py"
    subprocess.run([sys.executable, shapes, "llama-1b", tmp_path / "model"], check=True)
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "parallel_tune", f"--model={tmp_path / 'model'}", "--strategy=ddp",
        f"--dataset={ROOT / 'examples' / 'short_answers.jsonl'}", "--engine=transformers", "--max_seq_length=256",
        "--max_steps=2000", "--global_batch_size=8", f"--output_dir={run}", "--report_to=none",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 180
        while not (run / "metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.5)
        time.sleep(3)  # a few steps, collectives included
        ranks = {int((run / "logs" / f"rank-{rank}.pid").read_text()): rank for rank in (0, 1)}
        holders: dict[int, list[int]] = {0: [], 1: []}
        for card in (0, 1):
            handle = pynvml.nvmlDeviceGetHandleByIndex(card)
            for holder in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if holder.pid in ranks:
                    holders[ranks[holder.pid]].append(card)
    finally:
        process.kill()
        process.wait()
    assert holders == {0: [0], 1: [1]}
