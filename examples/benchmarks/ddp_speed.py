"""Our arrangement of ddp against the reference command of this field: the same rows in the same steps.

    python examples/benchmarks/ddp_speed.py --engines unsloth   # Qwen3-8B shape, one GPU, short and full rows
    python examples/benchmarks/ddp_speed.py --gpus 2            # through two processes and through one: as many rows
                                                                # for each (weak scaling), and in all (strong)
    python examples/benchmarks/ddp_speed.py --small             # a tiny model on the CPU, two processes and one

The reference is reference_unsloth.py: stock Unsloth, batch 1 x accumulation 4, offloaded checkpointing. It takes the
rows in our order, with our optimizer and a learning rate that depends on no number of steps, so that the two losses can
be compared step by step; --reference_optim adamw_8bit gives it its own optimizer. The captured limit is what replays of
our step do with nothing around them. Kinds of runs alternate; figures are medians over the steps after the first few.
What fails, or does not fit in --seconds, is left out and said. Writes results/ddp_speed.HARDWARE.json beside this file,
anew after each run; with --work FOLDER --go_on the same command, once more, does what is missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))
from children import end_orderly  # noqa: E402
from ordering import write_in_order  # noqa: E402
from rows import make_rows  # noqa: E402
from running import (  # noqa: E402
    Record,
    add_common,
    apart,
    call,
    flops_utilisation,
    hardware_name,
    random_model,
    train,
    train_bare,
    tried,
    work_folder,
)

WARM_UP = 8
REFERENCE_WARM_UP = 4
"""Steps of a run that do not count; ours records in its first ones."""

SAMPLES = 4
"""Rows of a step and process: batch 1 x accumulation 4."""

SCHEDULE = "--lr_scheduler_type=constant_with_warmup"
LONGEST_SHORT_ROW = 512


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen3-8b")
    parser.add_argument("--model", type=Path, help="a folder that holds the shape already")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--rows", default="short,full")
    parser.add_argument("--engines", default="unsloth,transformers")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a full row")
    parser.add_argument(
        "--steps",
        type=int,
        help="of our runs on short rows; 44, or 160 on several GPUs, whose sizes else differ by chance",
    )
    parser.add_argument("--full_steps", type=int, default=20, help="of our runs on full rows")
    parser.add_argument("--reference_steps", type=int, default=14)
    parser.add_argument("--reference_optim", default="adamw_torch_fused")
    parser.add_argument("--capture", default="on", help="of our runs; auto is what a plan would choose by itself")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--skip", default="", help="of reference, limit, single, strong: what to leave out")
    parser.add_argument("--load_in_4bit", action="store_true", help="QLoRA on all sides")
    parser.add_argument("--seconds", type=float, default=420.0, help="after which nothing more is begun or goes on")
    parser.add_argument("--small", action="store_true")
    add_common(parser)
    options = parser.parse_args(arguments)
    options.steps = options.steps or (44 if options.gpus == 1 else 160)
    return options


@dataclass(frozen=True)
class Work:
    """Rows of one kind, the same in the order in which we train them, and their tokens in each of our steps."""

    kind: str
    rows: Path
    ordered: Path
    lengths: list[list[int]]
    steps: int
    longest: int


class Benchmark:
    """All runs of one invocation."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder = folder
        self._options = options
        self._ends = time.monotonic() + options.seconds
        self._model: Path = options.model or random_model(options.shape, folder / options.shape)

    def measure(self, has: Callable[[str], bool] = lambda _: False) -> Iterator[dict[str, Any]]:
        """All runs, in turn, but those that are there; one that fails gives a row that says so."""
        for name, run in self._runs():
            if has(name):
                continue
            if self._left() <= 0:
                yield {"what": name, "failed": f"not begun: {self._options.seconds:.0f} s were over"}
            else:
                yield tried(name, run)

    def _runs(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        options = self._options
        skip, engines = set(options.skip.split(",")), options.engines.split(",")
        works = [self._work(kind) for kind in options.rows.split(",")]
        for turn, work in product(range(options.repeat), works):
            if "reference" not in skip:
                name = f"reference-{work.kind}-{turn}"
                yield name, partial(self._reference, name, work)
            for engine in engines:
                name = f"{engine}-{work.kind}-{turn}"
                yield name, partial(self._ours, name, work, engine, options.gpus)
                if "limit" not in skip:
                    yield f"limit-{name}", partial(self._limit, f"limit-{name}", self._folder / name)
                if options.gpus > 1 and "single" not in skip:
                    yield f"single-{name}", partial(self._ours, f"single-{name}", work, engine, 1)
                if options.gpus > 1 and "strong" not in skip:
                    yield f"strong-{name}", partial(self._ours, f"strong-{name}", work, engine, 1, options.gpus)

    def _work(self, kind: str) -> Work:
        options = self._options
        full = kind == "full"
        steps = options.full_steps if full else options.steps
        longest = options.length if full else min(options.length, LONGEST_SHORT_ROW)
        count, place = SAMPLES * options.gpus * steps, self._folder / f"{kind}.jsonl"
        rows = make_rows(self._model, place, count, options.length if full else None)
        ordered = self._folder / f"{kind}-ordered.jsonl"
        lengths = write_in_order(self._model, rows, ordered, steps, 1, SAMPLES * options.gpus, longest)
        return Work(kind, rows, ordered, lengths, steps, longest)

    def _left(self) -> float:
        return min(self._ends - time.monotonic(), self._options.run_seconds)

    def _ours(self, name: str, work: Work, engine: str, processes: int, shares: int | None = None) -> dict[str, Any]:
        """One run of ours, whose steps have the rows of so many processes: its own, or those of others too."""
        options, shares = self._options, shares or processes
        capture = "off" if options.small else options.capture
        metrics, report = train(
            self._folder / name, self._model, work.rows, "--strategy=ddp", f"--engine={engine}",
            f"--global_batch_size={SAMPLES * shares}", f"--max_seq_length={work.longest}", "--warmup_steps=5",
            SCHEDULE, f"--max_steps={work.steps}", f"--max_devices={processes}", f"--capture={capture}",
            *self._method(), *(["--hardware=cpu:2"] if options.small else []), timeout=self._left(),
        )  # fmt: skip
        seconds = [row["seconds"] for row in metrics]
        # Where one of several devices takes its own rows alone, the steps are others.
        lengths = work.lengths if shares == options.gpus else None
        found = self._speed(seconds, [row["tokens"] for row in metrics], WARM_UP, lengths, processes)
        captured = report.get("captured") or {}
        return {
            "processes": report["world_size"],
            **found,
            "host_seconds": statistics.median(_steady([row["host_seconds"] for row in metrics], WARM_UP)),
            "first_steps_seconds": seconds[:WARM_UP],
            "total_seconds": report["total_seconds"],
            "startup_seconds": report["startup_seconds"],
            "losses": [row["loss"] for row in metrics],
            "captured": captured,
            # What is computed: its own and what fills it up to a fixed size, which chance may make larger on one side.
            "filled_tokens_per_second": self._filled(captured, len(metrics), processes, found["step_seconds"]),
            "replayed_share": captured.get("replayed_elements", 0) / captured["elements"] if captured else 0.0,
            "devices": report["devices"],
            "versions": report["versions"],
        }

    def _method(self) -> list[str]:
        return ["--load_in_4bit"] if self._options.load_in_4bit else []

    @staticmethod
    def _filled(captured: dict[str, Any], steps: int, processes: int, step_seconds: float) -> float | None:
        return processes * captured["elements"] / steps / step_seconds if captured else None

    def _reference(self, name: str, work: Work) -> dict[str, Any]:
        options = self._options
        steps = min(options.reference_steps, work.steps)
        found = train_bare(
            "reference_unsloth.py", self._model, work.ordered, steps, self._folder / f"{name}.json", "--in_order",
            f"--optim={options.reference_optim}", SCHEDULE, f"--max_seq_length={work.longest}", *self._method(),
            processes=options.gpus, folder=self._folder, timeout=self._left(),
        )  # fmt: skip
        return {
            "processes": found["processes"],
            **self._speed(found["seconds"], found["tokens"], REFERENCE_WARM_UP, work.lengths[:steps], options.gpus),
            "host_seconds": statistics.median(_steady(found["host_seconds"], REFERENCE_WARM_UP)),
            "first_step_seconds": found["first_step_seconds"],
            "losses": found["losses"],
            "used_bytes": found["used_bytes"],
        }

    def _limit(self, name: str, run: Path) -> dict[str, Any]:
        result = self._folder / f"{name}.json"
        call([sys.executable, str(HERE / "captured_limit.py"), str(run), str(result)], timeout=self._left())
        limit = json.loads(result.read_text())
        if limit["reason"] is not None:
            raise RuntimeError(f"nothing was replayed: {limit['reason']}")
        seconds = statistics.median(limit["seconds"])
        row_tokens = limit["tokens"] // limit["micro_batch"]
        used = flops_utilisation(self._model, [[row_tokens] * limit["micro_batch"]], seconds)
        return {
            **limit,
            # Of all replicas, if summing gradients took nothing.
            "tokens_per_second": limit["processes"] * limit["tokens"] / seconds,
            "model_flops_utilisation": used,
        }

    def _speed(
        self, seconds: list[float], tokens: list[int], warm_up: int, lengths: list[list[int]] | None, processes: int
    ) -> dict[str, Any]:
        """Figures of the steps after the first few."""
        steady, steady_tokens = _steady(seconds, warm_up), _steady(tokens, warm_up)
        used = None
        if lengths is not None:
            used = flops_utilisation(self._model, _steady(lengths, warm_up), sum(steady), processes)
        return {
            "tokens_per_second": sum(steady_tokens) / sum(steady),
            "model_flops_utilisation": used,
            "step_seconds": statistics.median(steady),
            "step_seconds_p90": sorted(steady)[int(len(steady) * 0.9)],
            "step_tokens": statistics.mean(steady_tokens),
        }


def _steady(values: list[Any], warm_up: int) -> list[Any]:
    return values[min(warm_up, len(values) // 2) :]


def figures(rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Ratios of medians over repetitions; the best engine is the one that counts."""

    def median(prefix: str, name: str = "tokens_per_second") -> float | None:
        values = [row[name] for row in rows if row["what"].startswith(prefix) and row.get(name) is not None]
        return statistics.median(values) if values else None

    def ratio(over: float | None, under: float | None) -> float | None:
        return over / under if over and under else None

    def losses(prefix: str) -> list[float]:
        return next((row["losses"] for row in rows if row["what"].startswith(prefix) and "losses" in row), [])

    engines, kinds = options.engines.split(","), options.rows.split(",")
    engine = max(engines, key=lambda each: median(f"{each}-") or 0.0)
    result: dict[str, Any] = {
        "engine": engine,
        "ratio_to_reference": ratio(median(f"{engine}-short"), median("reference-short")),
        "ratio_to_reference_full_rows": ratio(median(f"{engine}-full"), median("reference-full")),
        "share_of_captured_limit_full_rows": ratio(median(f"{engine}-full"), median(f"limit-{engine}-full")),
        "weak_scaling": None,
    }

    def spread(prefix: str) -> float | None:
        values = [row["tokens_per_second"] for row in rows if row["what"].startswith(prefix) and "failed" not in row]
        return (max(values) - min(values)) / statistics.median(values) if len(values) > 1 else None

    for who, kind in product([*engines, "reference"], kinds):
        result[f"spread_{who}_{kind}"] = spread(f"{who}-{kind}")
        for name in ("tokens_per_second", "model_flops_utilisation", "host_seconds"):
            result[f"{name}_{who}_{kind}"] = median(f"{who}-{kind}", name)
    for each, kind in product(engines, kinds):
        curves = losses(f"{each}-{kind}"), losses(f"reference-{kind}")
        result[f"losses_apart_{each}_{kind}"] = apart(*curves) if all(curves) else None
        strong = ratio(median(f"{each}-{kind}"), median(f"strong-{each}-{kind}"))
        if strong:
            result[f"strong_scaling_{each}_{kind}"] = strong / options.gpus
        scaling = ratio(median(f"{each}-{kind}"), median(f"single-{each}-{kind}"))
        if scaling:
            result[f"weak_scaling_{each}_{kind}"] = scaling / options.gpus
            result["weak_scaling"] = max(result["weak_scaling"] or 0.0, scaling / options.gpus)
            filled = "filled_tokens_per_second"
            computed = ratio(median(f"{each}-{kind}", filled), median(f"single-{each}-{kind}", filled))
            result[f"weak_scaling_filled_{each}_{kind}"] = computed / options.gpus if computed else None
    return result


def main(arguments: list[str]) -> Path:
    """Run the benchmark; returns the file written."""
    options = parse(arguments)
    hardware = hardware_name(options.gpus)
    if options.small:
        options.shape, options.engines, options.rows, options.length = "tiny", "transformers", "short", 128
        options.gpus, options.skip, hardware = 2, "reference,limit", "cpu"
    record = Record("ddp_speed", hardware, options.results, arguments, options.go_on, shape=options.shape)
    with work_folder(options.work) as folder:
        for row in Benchmark(folder, options).measure(record.has):
            print(json.dumps({key: row[key] for key in row if key not in ("losses", "versions")}), flush=True)
            record.add(row, lambda rows: figures(rows, options))
    print(json.dumps(record.content["figures"], indent=1))
    return record.path


if __name__ == "__main__":
    end_orderly()
    main(sys.argv[1:])
