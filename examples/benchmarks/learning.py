"""A real model really learns: loss on held-out rows and one answer, before and after, by each strategy and engine.

    python examples/benchmarks/learning.py                                 # fetches SmolLM2-135M-Instruct
    python examples/benchmarks/learning.py --model FOLDER --jobs 3         # a model that is there, three runs at once
    python examples/benchmarks/learning.py --hardware cpu:2 --max_steps 4  # in small, without a GPU

The runs of one engine see the same samples in each step, so their losses should follow each other; `apart` is the
largest relative distance from the engine's first run. Nothing is timed. Writes results/learning.HARDWARE.json, anew
after each run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))
from children import end_orderly
from running import say, told, train

from parallel_tune.demo import PROMPT, default_model_dir, example_dataset
from parallel_tune.demo_model import fetch_demo_model
from parallel_tune.engines import installed
from parallel_tune.generation import answer
from parallel_tune.hardware import probe
from parallel_tune.outcome import write_atomically
from parallel_tune.report import versions

Row = dict[str, Any]
WAYS = {
    "ddp, eager": ["--strategy=ddp", "--capture=off"],
    "ddp": ["--strategy=ddp"],
    "model_parallel": ["--strategy=model_parallel", "--stages=2"],
}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=None, help="a folder; SmolLM2-135M-Instruct if left out")
    parser.add_argument("--hardware", default=None, help="cpu:2, say; this machine's GPUs if left out")
    parser.add_argument("--max_steps", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--run_seconds", type=float, default=240.0, help="that one run may take")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args(arguments)


def learn(
    engine: str, way: str, model: Path, folder: Path, options: argparse.Namespace, answering: threading.Lock
) -> Row:
    """One run; its losses and what it changed, or how it failed.

    Args:
        answering: one process, and one model in it at a time, answers for all runs.
    """
    run = folder / f"{engine}-{way.replace(', ', '-')}"
    row: Row = {"engine": engine, "way": way}
    say(f"{engine}, {way} begins")
    try:
        metrics, report = train(
            run, model, example_dataset(), f"--engine={engine}", "--max_seq_length=256", "--global_batch_size=4",
            f"--max_steps={options.max_steps}", "--learning_rate=1e-3", "--answers_only", "--val_size=24",
            *([f"--hardware={options.hardware}"] if options.hardware else []), *WAYS[way],
            timeout=options.run_seconds,
        )  # fmt: skip
        captured = report.get("captured") or {}
        row |= {
            "world_size": report["world_size"],
            "steps": report["steps"],
            "held_out_loss_before": report["held_out_loss_before"],
            "held_out_loss_after": report["held_out_loss_after"],
            "replayed_share": captured["replayed_elements"] / captured["elements"] if captured.get("elements") else 0.0,
            "losses": [each["loss"] for each in metrics],
        }
        with answering:
            row["answer_after"] = answer(model, run / "adapter", PROMPT)
    except Exception as error:  # the others still count
        return {"engine": engine, "way": way, "failed": str(error)[-3000:]}
    return row


def with_distances(rows: list[Row]) -> list[Row]:
    """Each row with its losses' largest relative distance from those of its engine's first row."""
    found = []
    for row in rows:
        first = next((other for other in rows if other["engine"] == row["engine"] and "losses" in other), None)
        if first is not None and "losses" in row:
            pairs = zip(row["losses"], first["losses"], strict=True)
            row = {**row, "apart": max(abs(a / b - 1) for a, b in pairs)}
        found.append(row)
    return found


def main(arguments: list[str]) -> Path:
    """Run the benchmark; returns the file written."""
    options = parse(arguments)
    model = options.model or fetch_demo_model(default_model_dir())
    on_gpu = options.hardware is None
    hardware = probe(os.environ).devices[0].name.replace(" ", "-") if on_gpu else options.hardware.replace(":", "-")
    engines = ["transformers", *(["unsloth"] if on_gpu and installed("unsloth") else [])]
    record: dict[str, Any] = {
        "name": "learning",
        "hardware": hardware,
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "examples/benchmarks/learning.py", *told(arguments)]),
        "prompt": PROMPT,
        "answer_before": answer(model, None, PROMPT),
    }
    options.results.mkdir(parents=True, exist_ok=True)
    path: Path = options.results / f"learning.{hardware}.json"
    cases = [(engine, way) for engine in engines for way in WAYS]
    answering, found = threading.Lock(), {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        jobs = {pool.submit(learn, *case, model, Path(folder), options, answering): case for case in cases}
        try:
            for job in as_completed(jobs):
                found[jobs[job]] = job.result()
                rows = with_distances([found[case] for case in cases if case in found])
                record |= {"rows": rows, "figures": figures(rows)}
                write_atomically(path, json.dumps(record, indent=1) + "\n")
                shown = {name: value for name, value in found[jobs[job]].items() if name != "losses"}
                print(json.dumps(shown), flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    print(json.dumps({"answer_before": record["answer_before"], **record["figures"]}, indent=1))
    return path


def figures(rows: list[Row]) -> dict[str, Any]:
    """The worst of all runs."""
    good = [row for row in rows if "failed" not in row]
    return {
        "runs": len(rows),
        "failed": len(rows) - len(good),
        "held_out_loss_before": max((row["held_out_loss_before"] for row in good), default=None),
        "held_out_loss_after": max((row["held_out_loss_after"] for row in good), default=None),
        "apart": max((row["apart"] for row in good), default=None),
    }


if __name__ == "__main__":
    end_orderly()
    print(main(sys.argv[1:]))
