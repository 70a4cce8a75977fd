"""Under ddp each rank holds memory on its own card alone, by NVML, from its start to its end: no stray context on the
first card, neither of a rank nor of the processes that started it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from card_holders import family, holders

from parallel_tune.nvml import read_nvml

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not read_nvml(), reason="no GPU")]
ROOT = Path(__file__).parents[2]
DATASET = ROOT / "examples" / "short_answers.jsonl"


@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
@pytest.mark.parametrize("how", ["eager", "captured", "script"])
def test_no_process_holds_memory_on_two_cards(
    how: str, engine: str, shape: Callable[[str], Path], tmp_path: Path
) -> None:
    if len(read_nvml()) < 2:
        pytest.skip("needs two GPUs")
    run = tmp_path / "run"
    model = shape("llama-1b")
    if how == "script":
        script = ROOT / "examples" / "scripts" / ("unsloth_sft.py" if engine == "unsloth" else "trl_sft.py")
        options = ["launch", "--strategy=ddp", f"--output_dir={run}", script, model, DATASET, tmp_path / "out"]
    else:
        options = [
            f"--model={model}", "--strategy=ddp", f"--dataset={DATASET}", f"--engine={engine}", "--max_seq_length=256",
            "--global_batch_size=8", f"--output_dir={run}", "--report_to=none",
            f"--capture={'auto' if how == 'captured' else 'off'}",
        ]  # fmt: skip
    steps = 150 if how == "captured" else 30
    command = [sys.executable, "-P", "-m", "parallel_tune", *options, f"--max_steps={steps}"]
    held: dict[int, set[int]] = {}
    process = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    try:
        while process.poll() is None:
            assert time.monotonic() < deadline
            ours = family(process.pid)
            # The constants of the machine are measured by a process of its own, before the run has a folder.
            for pid, cards in holders().items() if run.exists() else ():
                if pid in ours:
                    held.setdefault(pid, set()).update(cards)
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    ranks = {int((run / "logs" / f"rank-{rank}.pid").read_text()): rank for rank in (0, 1)}
    assert held == {pid: {rank} for pid, rank in ranks.items()}


WATCHED = """
import ctypes
import json
import sys
from pathlib import Path

import torch

from parallel_tune import worker

driver = ctypes.CDLL("libcuda.so.1")
choose = torch.cuda.set_device


def active(card):
    flags, state = ctypes.c_uint(), ctypes.c_int()
    assert driver.cuDevicePrimaryCtxGetState(card, ctypes.byref(flags), ctypes.byref(state)) == 0
    return bool(state.value)


def watched(device):
    assert driver.cuInit(0) == 0
    states = Path(sys.argv[2])
    if not states.exists():
        states.write_text(json.dumps([active(card) for card in range(torch.cuda.device_count())]))
    choose(device)


torch.cuda.set_device = watched
worker.main([sys.argv[1]])
"""


@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
def test_a_rank_has_touched_no_card_when_it_chooses_its_own(
    engine: str, shape: Callable[[str], Path], tune: Any, checkout: dict[str, str], tmp_path: Path
) -> None:
    """What one card can show of the above: everything after that uses the card of its choice, the current one."""
    run, states = tmp_path / "run", tmp_path / "states.json"
    options = (f"--model={shape('llama-1b')}", f"--dataset={DATASET}", f"--engine={engine}", "--max_seq_length=256")
    tune(run, *options, "--strategy=ddp", "--max_devices=1", "--global_batch_size=2", "--max_steps=2")
    shutil.rmtree(run / "adapter")  # the worker that follows makes it anew
    program = tmp_path / "program.py"
    program.write_text(WATCHED)
    card = checkout.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # a worker on its own sees no other one
    done = subprocess.run(
        [sys.executable, program, run, states],
        env=checkout | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": card}, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, (run / "logs" / "rank-0.log").read_text()[-3000:]
    found = json.loads(states.read_text())
    assert found and not any(found)
