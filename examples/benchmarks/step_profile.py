"""What one steady step does, by torch's profiler: each engine, eagerly and captured.

    python examples/benchmarks/step_profile.py                       # Qwen3-1.7B shape on one GPU
    python examples/benchmarks/step_profile.py --shape qwen3-8b --engines unsloth
    python examples/benchmarks/step_profile.py --small               # a tiny model on the CPU, eagerly

Runs parallel-tune with --profile_steps, and reads what that counts: kernels and launches, milliseconds on the host and
on the device, waits for the device and values read from it. Beside them are the same run's milliseconds a step, and how
long the host took to issue one, while nothing was traced. Writes results/step_profile.HARDWARE.json beside this file;
--traces FOLDER keeps traces and tables.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))
from children import end_orderly  # noqa: E402
from rows import make_rows  # noqa: E402
from running import Record, add_common, hardware_name, random_model, train, tried, work_folder  # noqa: E402

STEPS, PROFILED, WARM_UP = 28, 2, 13
"""Steps of a run, those that are traced (from the eleventh on), and those that do not count as untraced ones."""


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen3-1b")
    parser.add_argument("--model", type=Path, help="a folder that holds the shape already")
    parser.add_argument("--engines", default="unsloth,transformers")
    parser.add_argument("--capture", default="off,on")
    parser.add_argument("--tokens", type=int, help="of each row; short rows of many lengths if left out")
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--small", action="store_true")
    add_common(parser)
    return parser.parse_args(arguments)


def measure(
    folder: Path, options: argparse.Namespace, has: Callable[[str], bool] = lambda _: False
) -> Iterator[dict[str, Any]]:
    """All runs but those that are there; one that fails gives a row that says so."""
    model = options.model or random_model(options.shape, folder / options.shape)
    rows = make_rows(model, folder / "rows.jsonl", 4 * STEPS, options.tokens)
    for engine, capture in product(options.engines.split(","), options.capture.split(",")):
        name = f"{engine}-{'captured' if capture == 'on' else 'eager'}"
        if not has(name):
            yield tried(name, partial(profiled, name, engine, capture, model, rows, folder, options))


def profiled(
    name: str, engine: str, capture: str, model: Path, rows: Path, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """One run."""
    run = folder / name
    metrics, report = train(
        run, model, rows, "--strategy=ddp", f"--engine={engine}", "--max_devices=1", f"--capture={capture}",
        "--global_batch_size=4", f"--max_seq_length={options.tokens or 512}", f"--max_steps={STEPS}",
        f"--profile_steps={PROFILED}", *(["--hardware=cpu:1"] if options.small else []), timeout=options.run_seconds,
    )  # fmt: skip
    steady = metrics[WARM_UP:]
    if options.traces is not None:
        shutil.copytree(run / "profile", options.traces / name, dirs_exist_ok=True)
    return {
        "step_milliseconds": 1e3 * statistics.median(row["seconds"] for row in steady),
        "issued_milliseconds": 1e3 * statistics.median(row["host_seconds"] for row in steady),
        **json.loads((run / "profile" / "rank-0.json").read_text()),
        "table": (run / "profile" / "rank-0.txt").read_text().splitlines(),
        "captured": report.get("captured"),
        "versions": report["versions"],
    }


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts of each kind of run, side by side."""
    left_out = ("what", "table", "captured", "steps", "failed")
    return {f"{name}_{row['what']}": row[name] for row in rows for name in row if name not in left_out}


def main(arguments: list[str]) -> Path:
    """Run the benchmark; returns the file written."""
    options = parse(arguments)
    if options.small:
        options.shape, options.engines, options.capture = "tiny", "transformers", "off"
    record = Record("step_profile", hardware_name(), options.results, arguments, options.go_on, shape=options.shape)
    with work_folder(options.work) as folder:
        for row in measure(folder, options, record.has):
            record.add(row, figures)
            print(json.dumps({name: row[name] for name in row if name not in ("table", "versions")}), flush=True)
    return record.path


if __name__ == "__main__":
    end_orderly()
    main(sys.argv[1:])
