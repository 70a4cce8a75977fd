"""What benchmarks share: runs of parallel-tune and of the bare script, each in processes of its own, and the record."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def call(
    command: Sequence[str],
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> float:
    """Run a command, and say what it said if it failed; when it was started, on the machine's monotonic clock.

    Raises:
        RuntimeError: it failed, or took longer than the timeout.
    """
    quiet = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
    began = time.monotonic()
    # In a process group of its own, so that nothing of it is left if it takes too long.
    process = subprocess.Popen(
        command, env={**os.environ, **quiet, **(environment or {})}, cwd=folder,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout)
        ended = f"ended with {process.returncode}"
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        ended = f"took longer than {timeout:.0f} s"
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} {ended}:\n{out[-2000:]}{err[-3000:]}")
    return began


def train(
    run: Path,
    model: Path,
    rows: Path,
    *options: str,
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One run of parallel-tune: its rows of metrics, a step each, and its report."""
    command = [sys.executable, "-m", "parallel_tune", f"--model={model}", f"--dataset={rows}", f"--output_dir={run}"]
    call([*command, "--report_to=none", *options], environment=environment, timeout=timeout)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in metrics if "loss" in row], json.loads((run / "report.json").read_text())


def train_bare(
    script: str,
    model: Path,
    rows: Path,
    steps: int,
    result: Path,
    *options: str,
    processes: int = 1,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> dict[str, Any]:
    """One run of a bare script of this folder: what it wrote, and `first_step_seconds` since it was started."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += [str(HERE / script), str(model), str(rows), str(steps), str(result), *options]
    began = call(command, folder, environment, timeout)
    found: dict[str, Any] = json.loads(result.read_text())
    return {**found, "first_step_seconds": found["first_step_at"] - began}


def apart(left: Sequence[float], right: Sequence[float]) -> float:
    """The largest difference of two loss curves at the same step, as a share of the second one's loss."""
    return max(abs(a - b) / abs(b) for a, b in zip(left, right, strict=False))


def flops_utilisation(model: Path, lengths: Sequence[Sequence[int]], seconds: float, gpus: int = 1) -> float | None:
    """Model FLOPs utilisation in bfloat16, as `parallel-tune bench` counts it; None without a GPU that is known.

    Args:
        lengths: tokens of each row of each step.
        seconds: of all these steps.
    """
    from parallel_tune.config import make_config
    from parallel_tune.gpus import known_gpu
    from parallel_tune.memory.lookup import load_model_facts
    from parallel_tune.memory.speed import model_flops
    from parallel_tune.nvml import MIB, read_nvml
    from parallel_tune.planning import training_settings

    cards = read_nvml()
    card = known_gpu(cards[0].name, cards[0].total_bytes // MIB) if cards else None
    if card is None:
        return None
    facts = load_model_facts(str(model))
    settings = training_settings(make_config({"model": str(model)}), facts, "transformers", "bfloat16")
    operations = model_flops(facts, settings, [length for step in lengths for length in step])
    return operations / seconds / gpus / (card.peak_tflops * 1e12)


def hardware_name(processes: int = 1) -> str:
    """What a result's file is named after."""
    from parallel_tune.nvml import read_nvml

    gpus = read_nvml()
    if not gpus:
        return "cpu"
    name = gpus[0].name.replace(" ", "-")
    return name if processes == 1 else f"{processes}x{name}"


class Record:
    """One result file, written anew after each row: what was measured stays if a later run fails."""

    def __init__(self, name: str, hardware: str, folder: Path, arguments: Sequence[str], **more: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.{hardware}.json"
        self.content: dict[str, Any] = {
            "name": name,
            "hardware": hardware,
            "versions": {},
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python", f"examples/benchmarks/{name}.py", *arguments]),
            **more,
            "rows": [],
            "figures": {},
        }

    def add(self, row: Mapping[str, Any], conclude: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        """Keep a row, and what follows from all rows so far; its `versions` become the record's."""
        kept = dict(row)
        self.content["versions"] |= kept.pop("versions", {})
        self.content["rows"].append(kept)
        self.content["figures"] = conclude(self.content["rows"])
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")
