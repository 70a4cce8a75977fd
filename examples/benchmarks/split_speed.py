"""What lanes gain over the naive split in whole training runs: eager against eager, captured against captured.

    python examples/benchmarks/split_speed.py --cases llama-8b:unsloth:12,llama-8b:transformers:12
    python examples/benchmarks/split_speed.py --cases llama-34b:unsloth:8:ballast=80:tokens=512
    python examples/benchmarks/split_speed.py --small          # a tiny model on two virtual devices of the CPU
    python examples/benchmarks/split_speed.py --picture FILE   # pictures of a result's schedules; needs no GPU

A case is SHAPE:ENGINE:MICRO_BATCHES of filled_models.py's shapes; all rows have the same length, one a micro-batch. All
ways train the same rows in the same steps with the same checkpointing. Figures are medians over the steps after the
first few. `ballast=GIB` lets another process hold so much of each card, so that one card cannot hold the model; the
plan's row tells why ddp was not taken, and what a plan chooses when it is left alone. What fails, or does not fit in
--seconds, is left out and said. Writes results/split_speed.HARDWARE.json beside this file, anew after each run; with
--go_on the same command, once more or with other --cases and --ways, adds what is missing, and --only TEXT,TEXT of that
the runs whose names contain one of them: CASE-WAY and CASE-plan.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))
from ballast import ballast  # noqa: E402
from card_clocks import CardClocks  # noqa: E402
from children import end_orderly  # noqa: E402
from rows import make_rows  # noqa: E402
from running import Record, add_common, call, hardware_name, train, tried, work_folder  # noqa: E402
from split_cases import WAYS, Case, read_case  # noqa: E402
from split_figures import draw, figures  # noqa: E402

SPARE_TOKENS = 64
"""That a row's text is longer: read again, it may make a few tokens less."""

OF_A_PLAN = (
    "strategy", "engine", "lanes", "captured", "uncaptured_reason", "micro_batch", "gradient_accumulation_steps",
    "gradient_checkpointing", "predicted_tokens_per_second", "reasons", "rejected",
)  # fmt: skip


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default="llama-8b:unsloth:12,llama-8b:transformers:12")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--only", default="", help="of all runs, those that contain one of these")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro-batch, where a case does not say")
    parser.add_argument("--checkpointing", default="none", help="of all ways, where a case does not say")
    parser.add_argument("--ballast", type=float, default=0.0, help="GiB of each card, where a case does not say")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm_up", type=int, default=3, help="steps that do not count; the first one records")
    parser.add_argument("--models", type=Path, help="folder for models; that of --work if left out")
    parser.add_argument("--keep_models", action="store_true", help="else each is removed after its last case")
    parser.add_argument("--seconds", type=float, default=540.0, help="after which nothing more is begun or goes on")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the schedules of this result, and end")
    parser.add_argument("--small", action="store_true")
    add_common(parser, run_seconds=180.0)
    options = parser.parse_args(arguments)
    if options.small:
        options.cases, options.ways, options.tokens = "tiny:transformers:4", "naive,lanes", 64
    try:
        options.cases = [
            read_case(text, options.tokens, options.checkpointing, options.ballast) for text in options.cases.split(",")
        ]
    except ValueError as error:
        parser.error(f"--cases {error}")
    options.ways = options.ways.split(",")
    if unknown := set(options.ways) - set(WAYS):
        parser.error(f"--ways {', '.join(sorted(unknown))}: none of {', '.join(WAYS)}")
    if options.steps <= options.warm_up:
        parser.error(f"--steps {options.steps} leaves nothing after {options.warm_up} steps of warm-up")
    return options


class Benchmark:
    """All runs of one invocation."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder = folder
        self._models: Path = options.models or folder
        self._options = options
        self._ends = time.monotonic() + options.seconds
        # A declared card would have all its memory free: real ones are looked at.
        self._hardware = "--hardware=cpu:2" if options.small else f"--max_devices={options.gpus}"

    def measure(self, has: Callable[[str], bool] = lambda _: False) -> Iterator[dict[str, Any]]:
        """All runs, case by case, but those that are there; one that fails gives a row that says so."""

        def is_done(name: str) -> bool:
            return has(name) or not any(text in name for text in self._options.only.split(","))

        cases = [case for case in self._options.cases if not all(map(is_done, self._names(case)))]
        for place, case in enumerate(cases):
            yield from self._of_case(case, is_done)
            if not self._options.keep_models and all(other.shape != case.shape for other in cases[place + 1 :]):
                shutil.rmtree(self._models / case.shape, ignore_errors=True)

    def _names(self, case: Case) -> list[str]:
        return [f"{case.name}-{what}" for what in ("plan", *self._options.ways)]

    def _of_case(self, case: Case, is_done: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
        try:
            model, rows = self._model(case.shape), self._folder / f"{case.name.replace(':', '-')}.jsonl"
            make_rows(str(model), rows, case.micro_batches * self._options.steps, case.tokens + SPARE_TOKENS)
            with ballast(case.ballast_gib) as free_bytes:
                more = {"case": case.name, **({"free_bytes": free_bytes} if free_bytes else {})}
                for name, run in self._runs(case, model, rows):
                    if is_done(name):
                        continue
                    if self._left() <= 0:
                        over = f"not begun: {self._options.seconds:.0f} s were over"
                        yield {"what": name, **more, "failed": over}
                    else:
                        yield tried(name, run, **more)
        except (RuntimeError, OSError) as error:  # its model or its ballast could not be had; other cases still count
            yield {"what": f"{case.name}-all", "case": case.name, "failed": str(error)}

    def _runs(self, case: Case, model: Path, rows: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        plan, *ways = self._names(case)
        yield plan, partial(self._plan, case, model)
        for name, way in zip(ways, self._options.ways, strict=True):
            yield name, partial(self._run, case, way, model, rows)

    def _model(self, shape: str) -> Path:
        call([sys.executable, str(HERE / "filled_models.py"), str(self._models), shape],
            environment={"CUDA_VISIBLE_DEVICES": ""}, timeout=max(1.0, self._ends - time.monotonic()))  # fmt: skip
        return self._models / shape

    def _left(self) -> float:
        return min(self._ends - time.monotonic(), self._options.run_seconds)

    def _plan(self, case: Case, model: Path) -> dict[str, Any]:
        """What a plan chooses for this case: with the strategy left to it, and of a split with all else left to it."""
        alone = [option for option in case.options() if "checkpointing" not in option and "per_device" not in option]
        return {
            "auto": self._planned(model, *alone),
            "split": self._planned(model, *alone, "--strategy=model_parallel"),
        }

    def _planned(self, model: Path, *options: str) -> dict[str, Any]:
        command = [
            sys.executable,
            "-m",
            "parallel_tune",
            "plan",
            f"--model={model}",
            self._hardware,
            *options,
            "--json",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=self._left())
        if not done.stdout.strip():
            raise RuntimeError(done.stderr[-2000:])
        plan = json.loads(done.stdout)
        return {name: plan.get(name) for name in OF_A_PLAN} | {"fits": plan["fits"], "devices": _devices(plan)}

    def _run(self, case: Case, way: str, model: Path, rows: Path) -> dict[str, Any]:
        run = self._folder / f"{case.name.replace(':', '-')}-{way}"
        with CardClocks(0 if self._options.small else self._options.gpus) as clocks:
            metrics, report = train(
                run, model, rows, "--strategy=model_parallel", *case.options(), *WAYS[way], self._hardware,
                f"--max_steps={self._options.steps}", "--warmup_steps=3", "--lr_scheduler_type=constant_with_warmup",
                timeout=self._left(),
            )  # fmt: skip
        plan = json.loads((run / "plan.json").read_text())
        timeline = run / "timeline.json"
        segments = json.loads(timeline.read_text())["segments"] if timeline.exists() else []
        row = outcome(case, way, metrics[self._options.warm_up :], report, segments)
        shutil.rmtree(run, ignore_errors=True)  # adapters of large models fill a disk
        return {
            **row,
            "clocks": clocks.seen(),
            "seconds": [each["seconds"] for each in metrics],
            "losses": [each["loss"] for each in metrics],
            "plan": {name: plan.get(name) for name in OF_A_PLAN},
            "cuts": [device["layers"][0] for device in plan["devices"]],
        }


def outcome(
    case: Case, way: str, steady: list[dict[str, Any]], report: dict[str, Any], segments: list[dict[str, Any]]
) -> dict[str, Any]:
    """What a run took, by its steps that count, its report and the timeline of its last step."""
    step_seconds = statistics.median(row["seconds"] for row in steady)
    each = report.get("stage_seconds")
    stage_seconds = [seconds * case.micro_batches for seconds in each["seconds"]] if each else None
    span = max(s["end"] for s in segments) - min(s["start"] for s in segments) if segments else None
    busy = [
        sum(s["end"] - s["start"] for s in segments if s["stage"] == stage)
        for stage in sorted({s["stage"] for s in segments})
    ]
    return {
        "way": way,
        "shape": case.shape,
        "engine": report["engine"],
        "micro_batches": case.micro_batches,
        "tokens": case.tokens,
        "ballast_gib": case.ballast_gib,
        "step_seconds": step_seconds,
        "tokens_per_second": sum(row["tokens"] for row in steady) / sum(row["seconds"] for row in steady),
        "host_seconds": statistics.median(row["host_seconds"] for row in steady),
        "stage_seconds": stage_seconds,
        # Of a naive run: what its stages took, over what its steps took.
        "stage_times_share": sum(stage_seconds) / step_seconds if stage_seconds else None,
        "busy_share": [seconds / step_seconds for seconds in stage_seconds] if stage_seconds else None,
        "last_step": {"schedule_seconds": span, "stage_busy_seconds": busy} if span else None,
        **{name: report.get(name) for name in ("lanes", "lanes_reason", "captured", "padding_free", "padded_reason")},
        "devices": report["devices"],
        "startup_seconds": report["startup_seconds"],
        "total_seconds": report["total_seconds"],
        "versions": report["versions"],
        "timeline": [{**s, "start": round(s["start"], 6), "end": round(s["end"], 6)} for s in segments],
    }


def _devices(plan: dict[str, Any]) -> list[dict[str, Any]]:
    names = ("index", "name", "layers", "free_bytes", "predicted_peak_bytes")
    return [{name: device.get(name) for name in names} for device in plan["devices"]]


def main(arguments: list[str]) -> Path:
    """Run the benchmark, or draw a result; returns the file written, or drawn."""
    options = parse(arguments)
    if options.picture:
        for path in draw(options.picture):
            print(path)
        return Path(options.picture)
    hardware = "cpu" if options.small else hardware_name(options.gpus)
    record = Record("split_speed", hardware, options.results, arguments, options.go_on, choosing=("--cases", "--ways"))
    with work_folder(options.work) as folder:
        for row in Benchmark(folder, options).measure(record.has):
            shown = ("what", "step_seconds", "tokens_per_second", "stage_times_share", "total_seconds", "failed")
            print(json.dumps({key: row[key] for key in shown if key in row}), flush=True)
            record.add(row, figures)
    print(json.dumps(record.content["figures"], indent=1))
    return record.path


if __name__ == "__main__":
    end_orderly()
    main(sys.argv[1:])
