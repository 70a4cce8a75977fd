"""Predicted memory against measured, one short training run a row, on one GPU.

    python examples/benchmarks/prediction.py [--minutes 8] [--jobs 3] [--only TEXT] [--work FOLDER] [--results FOLDER]
    python examples/benchmarks/prediction.py --again FILE [--rival VENV/bin/python]

Random-weight models of well-known shapes are made on the spot, beside the runs. Every row is a `parallel-tune` run of
its own; one follows the other, and nothing else may use the GPU. The result is written after every row; rows that it
has already are not run again, so a command that was cut short is simply given once more. prediction_rows.py says which
rows there are and what was in view before them; three more have lengths that follow from the card: two that the plan
says just fit, and one that it refuses, which is planned for a larger card, run all the same, and has to run out of
memory.

With `--jobs N`, up to N rows run side by side while the card holds them all by their plans; the three whose lengths
follow from the card run alone. The card's constants are measured before, once; "used" is the peak that NVML gives for
a row's own processes; a row that fails beside others is run once more, alone. Speeds of such rows say nothing.

`--again` takes a results file, predicts its rows anew with the formulas as they are now, and, with `--rival`, lets
fitcheck-llm (installed in an environment of its own) predict those that it can express. It needs no GPU.

Writes results/prediction.HARDWARE.json.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from children import bound, end_orderly
from prediction_constants import measured_constants, prepare_cache
from prediction_data import write_data
from prediction_edges import edge_rows
from prediction_figures import figures, line, score
from prediction_jobs import Task, expected_bytes, room_bytes, run_side_by_side
from prediction_process import Ended, environment, outcome, start
from prediction_rows import FIXED_ROWS, ROWS, SEEN_ROWS, Row
from prediction_watch import ProcessMemory
from shapes import SHAPES

from parallel_tune.hardware import probe_details
from parallel_tune.outcome import write_atomically
from parallel_tune.report import versions
from strategies.contracts import Device

FILLED_MODELS = Path(__file__).with_name("filled_models.py")
ROW_SECONDS = 240
"""After so long a row is given up."""
USUAL_SECONDS = 25.0
"""How long a row is taken to last before the first one has shown it."""
SETTLING_SECONDS = 3
LEFT_OVER_BYTES = 64 << 20
TAIL_CHARACTERS = 1500
UNSLOTH_WAYS = {
    "blocks_compiled": "block as one region",
    "block_compile_failed": "block compile failed",
    "blocks_left_as_they_are": "keeping the stock forward",
    "offloaded": "smartly offload",
    "double_buffering": "Double buffering enabled",
}
"""Words in Unsloth's output that tell which way it took: each has memory of its own."""
REPORTED = ("devices", "predicted_for", "captured", "startup_seconds", "steps", "tokens_per_second", "versions")
"""What is kept of a run's report."""


class Models:
    """Model folders, made one after the other in a process beside the runs, and removed when no row wants them."""

    def __init__(self, folder: Path, wanted: list[str]) -> None:
        self._folder = folder
        self._left = list(wanted)
        missing = [shape for shape in dict.fromkeys(wanted) if not (folder / shape / "config.json").exists()]
        # No GPU: a context of its own would count as the rows' use.
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4"}
        command = bound(["nice", sys.executable, str(FILLED_MODELS), str(folder), *missing])
        self._making = subprocess.Popen(command, env=environment) if missing else None

    def wait_for(self, shape: str, over: threading.Event) -> Path:
        """The model's folder, when it is complete.

        Raises:
            RuntimeError: it could not be made.
            Ended: `over` was set meanwhile.
        """
        folder = self._folder / shape
        while not (folder / "config.json").exists():
            if over.is_set():
                raise Ended
            if self._making is None or self._making.poll() not in (None, 0):
                raise RuntimeError(f"{shape} could not be made")
            time.sleep(0.2)
        return folder

    def done_with(self, shape: str) -> None:
        """A row less wants it."""
        self._left.remove(shape)
        if shape not in self._left:
            shutil.rmtree(self._folder / shape, ignore_errors=True)

    def close(self) -> None:
        if self._making is not None:
            self._making.kill()
            self._making.wait()


@dataclass(frozen=True)
class Place:
    """Where a row runs.

    Attributes:
        folder: of this row alone while it runs.
        gpu: the card's UUID.
        jobs: how many rows may run side by side.
        constants: a cache folder that has the card's constants; None where the row measures them itself, if need be.
    """

    folder: Path
    gpu: str
    jobs: int = 1
    constants: Path | None = None


def run_row(row: Row, model: Path, place: Place, over: threading.Event) -> dict[str, Any]:
    """Run a row on the GPU; what its report and plan say, or the end of its output.

    Raises:
        Ended: `over` was set before the row's end.
    """
    place.folder.mkdir(parents=True, exist_ok=True)
    run = place.folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    data = write_data(row, place.folder / "rows.jsonl")
    command = [sys.executable, "-m", "parallel_tune", "--model", str(model), "--dataset", str(data)]
    command += ["--output_dir", str(run), "--report_to", "none", "--data_cache", "false", *row.arguments()]
    cache = place.folder / "cache"
    prepare_cache(cache, place.constants)
    variables = environment(place.gpu, str(cache))
    if row.allocator == "fixed":
        variables["PYTORCH_ALLOC_CONF"] = "expandable_segments:False"
    started = time.monotonic()
    process = start(command, variables)
    with ProcessMemory(place.gpu, root=process.pid if place.jobs > 1 else None) as watched:
        code, output = outcome(process, ROW_SECONDS, over)
    found = described(row, place.jobs, started) | {"process_used_peak_bytes": watched.peak_bytes}
    if (run / "plan.json").exists():
        plan = json.loads((run / "plan.json").read_text())
        found["plan"] = plan | {"launch": [], "reasons": [], "rejected": [], "suggestions": [], "basis": []}
    if code != 0:
        logs = "".join(path.read_text(errors="replace") for path in sorted((run / "logs").glob("*.log")))
        found["failed"] = f"exit code {code}: {output[-TAIL_CHARACTERS:]}"
        found["ran_out_of_memory"] = "out of memory" in (output + logs).lower()
    else:
        if row.engine == "unsloth":
            found["unsloth"] = ways_taken((run / "logs").glob("*.log"))
        report = json.loads((run / "report.json").read_text())
        for name in REPORTED:
            if name in report:
                found["recorded" if name == "captured" else name] = report[name]
        try:
            score(found)
        except ValueError as error:
            found |= {"failed": str(error), "ran_out_of_memory": False}
    shutil.rmtree(run, ignore_errors=True)
    return found


def described(row: Row, jobs: int, started: float) -> dict[str, Any]:
    """What a row is, whatever came of it.

    Args:
        started: when, on the monotonic clock; it ends now.
    """
    return {
        "name": row.name,
        "shape": row.shape,
        "engine": row.engine,
        "method": row.method,
        "checkpointing": row.checkpointing,
        "tokens": row.tokens,
        "rows": row.rows,
        "data": row.data,
        "captured": row.captured,
        "allocator": row.allocator,
        "arguments": row.arguments(),
        "may_fail": row.may_fail,
        "in_view": row in SEEN_ROWS,
        "jobs": jobs,
        "seconds": round(time.monotonic() - started, 1),
    }


def ways_taken(logs: Iterable[Path]) -> dict[str, bool]:
    """Which of Unsloth's ways a run took, by its logs."""
    text = "".join(path.read_text(errors="replace") for path in logs)
    return {name: words in text for name, words in UNSLOTH_WAYS.items()}


def wait_until_free(device: Device) -> None:
    """Wait until the card is as free as it was at first, or is no longer getting freer: a process that has ended gives
    its memory back a bit later."""
    changed, last = time.monotonic(), 0
    while time.monotonic() - changed < SETTLING_SECONDS:
        free = probe_details(os.environ).hardware.devices[device.index].free_bytes
        if free >= device.free_bytes - LEFT_OVER_BYTES:
            return
        if free != last:
            changed, last = time.monotonic(), free
        time.sleep(0.2)


def is_settled(row: dict[str, Any]) -> bool:
    """Whether a row of a results file need not be run again: it was measured, or ran out of memory."""
    return "failed" not in row or bool(row.get("ran_out_of_memory"))


def write_record(path: Path, hardware: str, rows: list[dict[str, Any]]) -> None:
    """Rows and figures, with the machine and the versions beside them; a note that is there stays."""
    before = json.loads(path.read_text()) if path.exists() else {}
    record = {
        "name": "prediction",
        "hardware": hardware,
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "command": "python examples/benchmarks/prediction.py",
        **({"note": before["note"]} if "note" in before else {}),
        "figures": figures(rows),
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1) + "\n")


def _bytes_of(row: Row, device: Device, jobs: int) -> int:
    # One planned for another card runs alone, as all do that have the card to themselves.
    return device.capacity_bytes if jobs == 1 or row.on else expected_bytes(row, device)


def measure(options: argparse.Namespace) -> Path:
    """Run what is missing from the results file, as far as time allows."""
    started = time.monotonic()
    found = probe_details(os.environ)
    device = found.hardware.devices[0]
    if device.kind != "cuda":
        sys.exit("These rows need a GPU; `--again FILE` does not.")
    hardware = device.name.replace(" ", "-")
    path: Path = options.results / f"prediction.{hardware}.json"
    measured = json.loads(path.read_text())["rows"] if path.exists() else []
    settled = {row.get("name") for row in measured if is_settled(row)}
    # Edge rows run alone, for which all others would have to end: they come when these are through.
    edges = edge_rows(device)
    all_rows = list(SEEN_ROWS) if options.in_view else [*ROWS, *edges, *FIXED_ROWS]
    asked = options.only.split(",")
    todo = [row for row in all_rows if row.name not in settled and any(text in row.name for text in asked)]
    failed = {row.get("name") for row in measured} - settled
    todo.sort(key=lambda row: row.name in failed)  # those that failed come last
    options.work.mkdir(parents=True, exist_ok=True)
    with (options.work / f"{found.uuids[0]}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one row at a time on a card, whoever else gives this command
        constants = None
        if options.jobs > 1:
            wait_until_free(device)
            constants = measured_constants(options.work / "constants", found.uuids[0])
        models = Models(options.work, [row.shape for row in todo])
        usual = {"transformers": [USUAL_SECONDS], "unsloth": [USUAL_SECONDS]}

        def in_time(row: Row) -> bool:
            expected = time.monotonic() - started + statistics.mean(usual[row.engine])
            return not options.minutes or expected <= 60 * options.minutes

        def run(row: Row, slot: int, over: threading.Event) -> dict[str, Any]:
            folder = options.work / f"slot-{slot}" if options.jobs > 1 else options.work
            place = Place(folder, found.uuids[0], options.jobs, constants)
            print(f"{row.name} begins", flush=True)
            began = time.monotonic()
            try:
                return run_row(row, models.wait_for(row.shape, over), place, over)
            except Exception as error:  # the other rows still count
                if isinstance(error, Ended):
                    raise
                failed = f"{type(error).__name__}: {error}"
                return described(row, options.jobs, began) | {"failed": failed, "ran_out_of_memory": False}

        def done(task: Task[Row], result: dict[str, Any]) -> bool:
            nonlocal measured
            usual[task.row.engine].append(result["seconds"])
            print(line(result), flush=True)
            if "failed" in result and options.jobs > 1 and not task.alone:
                print(f"{task.row.name} failed beside others, which may be why: once more, alone", flush=True)
                return True
            models.done_with(task.row.shape)
            measured = [other for other in measured if other.get("name") != task.row.name] + [result]
            write_record(path, hardware, measured)
            return False

        try:
            alone = {row.name for row in edges}
            tasks = [Task(row, _bytes_of(row, device, options.jobs), row.name in alone) for row in todo]
            room = room_bytes(device.free_bytes)
            left = run_side_by_side(tasks, options.jobs, room, run, done, in_time, lambda: wait_until_free(device))
            if left:
                print(f"{left} rows are left for another {options.minutes} minutes", flush=True)
        finally:
            models.close()
    return path


def main(arguments: list[str] | None = None) -> Path:
    """Measure, or look at what was measured, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=0, help="begin no row that would end later; 0: all rows")
    parser.add_argument("--jobs", type=int, default=1, help="rows that may run side by side; 1: one after the other")
    parser.add_argument("--only", default="", help="TEXT,TEXT: only rows whose names contain one of these")
    parser.add_argument("--in-view", action="store_true", help="only rows that have changed a formula")
    parser.add_argument("--work", type=Path, default=Path("/tmp/parallel-tune-prediction"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--again", type=Path, help="predict the rows of this results file anew")
    parser.add_argument("--rival", default="", help="python of an environment that has fitcheck-llm")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least one row has to run at a time")
    assert all(row.shape in SHAPES for row in ROWS)
    if options.again is None:
        path = measure(options)
    else:
        from prediction_again import look_again

        path = look_again(options.again, options.rival)
    print(json.dumps(json.loads(path.read_text())["figures"], indent=1))
    return path


if __name__ == "__main__":
    end_orderly()
    main()
