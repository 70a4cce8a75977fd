"""Whether `--strategy auto` chooses rightly: for each case its choice is run, and then the other strategy all the same.

    python examples/benchmarks/choices.py [--jobs 6] [--only TEXT] [--seconds 165] [--work FOLDER] [--go_on] [--small]

A choice is right if its run ended and the other one ran out of memory, or was slower. choices_cases.py says which cases
there are: some whose model fits a card as often as there are cards, some where it does not, and some between, where
replicas have to recompute activations or only one of two cards can hold one.

The plans are for smaller cards than the two that are there, by `--hardware`, and the processes are held to these: by
torch's `per_process_memory_fraction`, to what the card has free less what the plan puts outside the allocator. That
part is not held down, so a run counts as ended only if NVML saw no more in use than the smaller card has. Where the
plan refuses a strategy, it is planned for larger cards, with the micro-batch, the recomputation and the number of
devices of the plan that came closest, and run under the same limit.

Cases run side by side, as many as the cards hold at once; both runs of one follow each other. A run's speed is that of
its fastest step: others may take time from a step, and give it none. Differences of a few percent are not settled by
it. The cards are faster than the declared ones, so that hosts weigh more here than there. Steps are not captured unless
`--capture auto`: whether there is room to record them is another choice than how the model lies on the cards.

Writes results/choices.HARDWARE.json after every run. `--small` runs tiny models on two virtual devices of the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from children import end_orderly
from choices_cases import CASES, SMALL_CASES, STRATEGIES, Case, layout, planned
from choices_figures import figures, line, score
from choices_limit import limited_bytes, limited_to, tensor_bytes
from prediction import Models
from prediction_data import write_data
from prediction_jobs import Task, room_bytes, run_side_by_side
from prediction_process import Ended, environment, outcome, start
from running import QUIET, Record, add_common, hardware_name, say, work_folder

from parallel_tune.hardware import probe_details

CARDS = 2
CASE_SECONDS = 60.0
"""How long a case is taken to last before the first one has shown it."""

TAIL_CHARACTERS = 1500
OUT_OF_MEMORY = re.compile(r"[^\n]*out of memory[^\n]{0,400}", re.IGNORECASE)


@dataclass(frozen=True)
class Place:
    """Where runs are.

    Attributes:
        folder: of the runs that follow each other there.
        gpus: the cards' UUIDs, for CUDA_VISIBLE_DEVICES; empty on a CPU.
        total_bytes: of a card, as torch's fraction counts; 0 on a CPU.
        jobs: how many may run side by side.
    """

    folder: Path
    gpus: str
    total_bytes: int
    jobs: int


class Benchmark:
    """All cases of one invocation.

    Args:
        place: its folder has one for each slot.
    """

    def __init__(self, options: argparse.Namespace, record: Record, place: Place, models: Models) -> None:
        self._options = options
        self._record = record
        self._place = place
        self._models = models
        self._writing = threading.Lock()

    def run_case(self, case: Case, slot: int, over: threading.Event) -> bool:
        """Run what of a case is missing from the record; whether all of it went as it should.

        Raises:
            Ended: `over` was set meanwhile.
        """
        folder = self._place.folder / f"slot-{slot}"
        folder.mkdir(exist_ok=True)
        chosen = planned(case, "auto", self._options.capture).strategy
        (other,) = set(STRATEGIES) - {chosen}
        good = True
        for name, strategy in (("auto", chosen), (other, other)):
            what = f"{case.name}: {name}"
            if self._is_measured(what):
                continue
            say(f"{what} begins")
            row = {"what": what, "case": case.name, "side": case.side, "chosen": name == "auto", "strategy": strategy}
            try:
                row |= self._run(case, name, folder, over)
            except Ended:
                raise
            except Exception as error:  # the other runs still count
                row["failed"] = f"{type(error).__name__}: {error}"
            good = good and "failed" not in row
            self._keep(row)
        return good

    def _is_measured(self, what: str) -> bool:
        # One that failed here may be run once more.
        return any(row["what"] == what and "failed" not in row for row in self._record.content["rows"])

    def _keep(self, row: dict[str, Any]) -> None:
        with self._writing:
            kept = [other for other in self._record.content["rows"] if other["what"] != row["what"]]
            self._record.content["rows"] = kept
            self._record.add(row, figures)
            say(line(row))

    def _run(self, case: Case, strategy: str, folder: Path, over: threading.Event) -> dict[str, Any]:
        """One run; what its plan and report say, or the end of its output."""
        plan = planned(case, strategy, self._options.capture)
        model = self._models.wait_for(case.shape, over)
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        data = write_data(case.data, folder / "rows.jsonl")
        arguments = [*case.arguments(strategy, self._options.capture), *layout(case, plan)]
        command = [sys.executable, "-m", "parallel_tune", "--model", str(model), "--dataset", str(data)]
        command += ["--output_dir", str(run), "--report_to", "none", "--data_cache", "false", *arguments]
        shutil.rmtree(folder / "cache", ignore_errors=True)  # no run may learn from another
        variables = environment(self._place.gpus, str(folder / "cache")) | QUIET
        limit = None
        if self._place.total_bytes:
            limit = tensor_bytes(case.device, plan)
            variables |= limited_to(limit, self._place.total_bytes)
        began = time.monotonic()
        code, output = outcome(start(command, variables), self._options.run_seconds, over)
        found = {
            "strategy": plan.strategy,
            "arguments": arguments,
            "card_bytes": case.device.free_bytes,
            "tensor_bytes": limit,
            "planned_to_fit": plan.fits,
            "planned_tokens_per_second": plan.predicted_tokens_per_second,
            "planned_peak_bytes": [device.predicted_peak_bytes for device in plan.devices],
            "jobs": self._place.jobs,
            "seconds": round(time.monotonic() - began, 1),
            "ran_out_of_memory": False,
        }
        found |= self._measured(run, plan.strategy) if code == 0 else _failure(run, code, output)
        if "devices" in found:
            score(found)
        shutil.rmtree(run, ignore_errors=True)
        return found

    def _measured(self, run: Path, strategy: str) -> dict[str, Any]:
        report, plan = (json.loads((run / name).read_text()) for name in ("report.json", "plan.json"))
        metrics = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
        speeds = [step["tokens"] / step["seconds"] for step in metrics if "loss" in step]
        for device in report["devices"]:
            # Beside others the card's use is not this run's.
            if device.get("used_by", "process") != "process" and self._place.jobs > 1:
                del device["used_peak_bytes"]
        if plan["strategy"] != strategy:
            raise RuntimeError(f"its own plan chose {plan['strategy']}, and not {strategy}")
        names = ("micro_batch", "gradient_accumulation_steps", "gradient_checkpointing", "captured", "lanes")
        return {
            "plan": {name: plan[name] for name in names},
            "tokens_per_second": max(speeds),
            "median_tokens_per_second": statistics.median(speeds),
            "devices": report["devices"],
            "versions": report["versions"],
        }


def _failure(run: Path, code: int, output: str) -> dict[str, Any]:
    logs = "\n".join(path.read_text(errors="replace") for path in sorted((run / "logs").glob("*.log")))
    said = OUT_OF_MEMORY.search(logs) or OUT_OF_MEMORY.search(output)
    if said:
        return {"ran_out_of_memory": True, "said": said[0].strip()}
    return {"failed": f"exit code {code}: {output[-TAIL_CHARACTERS:]}{logs[-TAIL_CHARACTERS:]}"}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=6, help="cases that may run side by side")
    parser.add_argument("--only", default="", help="only cases whose names contain this")
    parser.add_argument("--capture", choices=("off", "auto"), default="off")
    parser.add_argument("--seconds", type=float, default=900.0, help="begin no case that would end later")
    parser.add_argument("--small", action="store_true")
    add_common(parser, run_seconds=120.0)
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least one case has to run at a time")
    return options


def measure(options: argparse.Namespace, record: Record, folder: Path, began: float) -> None:
    """Run what is missing from the record, as far as time allows.

    Args:
        began: when the command did, on the monotonic clock.
    """
    cases = [case for case in (SMALL_CASES if options.small else CASES) if options.only in case.name]
    measured = Counter(row["case"] for row in record.content["rows"])
    todo = [case for case in cases if measured[case.name] < len(STRATEGIES)]
    if not todo:
        return
    models = Models(folder, [case.shape for case in todo])
    usual = [CASE_SECONDS]
    starts: dict[str, float] = {}

    def run(case: Case, slot: int, over: threading.Event) -> bool:
        starts[case.name] = time.monotonic()
        return benchmark.run_case(case, slot, over)

    def done(task: Task[Case], good: bool) -> bool:
        usual.append(time.monotonic() - starts[task.row.name])
        if not good and options.jobs > 1 and not task.alone:
            say(f"{task.row.name}: what failed beside others, which may be why, is run once more, alone")
            return True
        models.done_with(task.row.shape)
        return False

    def in_time(_: Case) -> bool:
        return time.monotonic() - began + statistics.mean(usual) <= float(options.seconds)

    try:
        gpus, total, room = "", 0, 0
        if not options.small:
            found = probe_details(os.environ)
            uuids = list(found.uuids[:CARDS])
            gpus, total = ",".join(uuids), limited_bytes(uuids, str(folder / "cache"))
            room = room_bytes(min(device.free_bytes for device in found.hardware.devices[:CARDS]))
        benchmark = Benchmark(options, record, Place(folder, gpus, total, options.jobs), models)
        tasks = [Task(case, 0 if options.small else case.device.capacity_bytes) for case in todo]
        left = run_side_by_side(tasks, options.jobs, room, run, done, in_time, lambda: None)
        if left:
            say(f"{left} cases are left for another {options.seconds:.0f} s")
    finally:
        models.close()


def main(arguments: list[str]) -> Path:
    """Run the benchmark; returns the file written."""
    began = time.monotonic()
    options = parse(arguments)
    if not options.small and len(probe_details(os.environ).uuids) < CARDS:
        sys.exit("These cases need two GPUs; --small runs on a CPU.")
    hardware = "cpu" if options.small else hardware_name(CARDS)
    record = Record("choices", hardware, options.results, arguments, options.go_on)
    with work_folder(options.work) as folder:
        measure(options, record, folder, began)
    print(json.dumps(record.content["figures"], indent=1))
    return record.path


if __name__ == "__main__":
    end_orderly()
    main(sys.argv[1:])
