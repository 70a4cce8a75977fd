"""What benchmarks share: runs of parallel-tune and of the bare script, each in processes of its own, and the record."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from children import bound, end

from parallel_tune.outcome import write_atomically

HERE = Path(__file__).resolve().parent
MODEL_SECONDS = 300
"""In which a random model must be made."""

LAST_WORDS_SECONDS = 10
QUIET = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Variables of whatever is measured: nothing is fetched, nothing reported."""

OF_THE_MACHINE = ("--model", "--models", "--only", "--work", "--results", "--seconds", "--run_seconds")
"""Options, with a value each, that say nothing of what is measured."""


def add_common(parser: argparse.ArgumentParser, run_seconds: float = 240.0) -> None:
    """Options that all benchmarks of whole runs have."""
    parser.add_argument(
        "--work", type=Path, help="folder for models and runs, which stays; a temporary one if left out"
    )
    parser.add_argument("--go_on", action="store_true", help="keep what the same command has measured already")
    parser.add_argument("--run_seconds", type=float, default=run_seconds, help="that one run may take")
    parser.add_argument("--results", type=Path, default=HERE / "results")


@contextmanager
def work_folder(path: Path | None) -> Iterator[Path]:
    """The folder, made if need be; a temporary one for None."""
    if path is None:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
    else:
        path.mkdir(parents=True, exist_ok=True)
        yield path.resolve()


def say(text: str) -> None:
    """A line on stderr, with the seconds since this process was started: what a log shows of where time went."""
    from parallel_tune.startup import process_began

    print(f"{time.monotonic() - process_began():7.1f} s  {text}", file=sys.stderr, flush=True)


def random_model(shape: str, folder: Path) -> Path:
    """A model of shapes.py, made by a process of its own: its memory would stay this one's while runs are measured."""
    call([sys.executable, str(HERE / "shapes.py"), shape, str(folder)], timeout=MODEL_SECONDS)
    return folder


def tried(what: str, run: Callable[[], dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A run's row; one that fails gives a row that says so, and the others still count."""
    say(f"{what} begins")
    try:
        return {"what": what, **more, **run()}
    except Exception as error:
        return {"what": what, **more, "failed": str(error)}


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
    began = time.monotonic()
    # The leader of a session, so that nothing of it is left if it takes too long.
    process = subprocess.Popen(
        bound(command), env={**os.environ, **QUIET, **(environment or {})}, cwd=folder,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    out = err = ""
    try:
        out, err = process.communicate(timeout=timeout)
        ended = f"ended with {process.returncode}"
    except BaseException as error:
        end(process)
        with suppress(subprocess.TimeoutExpired):  # who else holds the pipes must not hold up the rest
            out, err = process.communicate(timeout=LAST_WORDS_SECONDS)
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
    """One run of parallel-tune: its rows of metrics, a step each, and its report. What lay in its folder is removed.

    Raises:
        RuntimeError: it failed, or took too long; with the end of its log.
    """
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-m", "parallel_tune", f"--model={model}", f"--dataset={rows}", f"--output_dir={run}"]
    try:
        call([*command, "--report_to=none", *options], environment=environment, timeout=timeout)
    except RuntimeError as error:
        log = run / "logs" / "rank-0.log"
        raise RuntimeError(f"{error}\n{log.read_text()[-1500:] if log.exists() else ''}") from error
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
    """One result file, written anew after each row: what was measured stays if a later run fails.

    Args:
        arguments: of the command; those that are of the machine are left out.
        go_on: keep the good rows of a file that the same command has written.
        choosing: options, with a value each, that only choose which rows are measured: they may differ.
        more: what else the file says; part of the command's sameness.
    """

    def __init__(
        self,
        name: str,
        hardware: str,
        folder: Path,
        arguments: Sequence[str],
        go_on: bool = False,
        choosing: Sequence[str] = (),
        **more: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.{hardware}.json"
        command = " ".join(["python", f"examples/benchmarks/{name}.py", *told(arguments)])
        same = {"settings": " ".join(told(arguments, choosing))} if choosing else {"command": command}
        same |= more
        self.content: dict[str, Any] = {
            "name": name,
            "hardware": hardware,
            "versions": {},
            "date": datetime.date.today().isoformat(),
            "command": command,
            **same,
            "rows": [],
            "figures": {},
        }
        if go_on and self.path.exists():
            before = json.loads(self.path.read_text())
            if all(before.get(key) == value for key, value in same.items()):
                good = [row for row in before["rows"] if "failed" not in row]
                self.content |= {"versions": before["versions"], "rows": good}
                if choosing:
                    earlier = [*before.get("earlier_commands", []), before["command"]]
                    self.content["earlier_commands"] = [each for each in dict.fromkeys(earlier) if each != command]
            else:
                say(f"{self.path.name} is another command's: {before.get('command')}; all is measured anew")

    def has(self, what: str) -> bool:
        """Whether there is a good row of that name."""
        return any(row.get("what") == what for row in self.content["rows"])

    def add(self, row: Mapping[str, Any], conclude: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        """Keep a row, and what follows from all rows so far; its `versions` become the record's."""
        kept = dict(row)
        self.content["versions"] |= kept.pop("versions", {})
        self.content["rows"].append(kept)
        self.content["figures"] = conclude(self.content["rows"])
        write_atomically(self.path, json.dumps(self.content, indent=1) + "\n")


def told(arguments: Sequence[str], but: Sequence[str] = ()) -> list[str]:
    """The arguments that say what is measured, but for those options."""
    left_out = (*OF_THE_MACHINE, *but)
    kept: list[str] = []
    is_value = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if not is_value and name not in left_out and name not in ("--go_on", "--keep_models"):
            kept.append(argument)
        is_value = not is_value and name in left_out and not equals
    return kept
