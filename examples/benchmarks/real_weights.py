"""Captured steps on a real model: do they learn what eager ones learn? Losses step by step, and on held-out rows.

    python examples/benchmarks/real_weights.py MODEL                   # a folder, e.g. SmolLM2-135M-Instruct's
    python examples/benchmarks/real_weights.py MODEL --engines unsloth --steps 50
    python examples/benchmarks/real_weights.py --small                 # a tiny random model on the CPU, eagerly

Each engine trains on the example dataset three times: eagerly, captured, and eagerly once more. How far the two eager
runs are apart is the noise that the captured one is held against. Writes results/real_weights.HARDWARE.json beside this
file.
"""

from __future__ import annotations

import argparse
import json
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
from running import Record, add_common, apart, hardware_name, random_model, train, tried, work_folder  # noqa: E402

ROWS = HERE.parent / "short_answers.jsonl"
KINDS = ("eager", "captured", "again")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--engines", default="transformers,unsloth")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--small", action="store_true")
    add_common(parser)
    options = parser.parse_args(arguments)
    if options.model is None and not options.small:
        parser.error("give the folder of a model")
    return options


def measure(
    folder: Path, options: argparse.Namespace, has: Callable[[str], bool] = lambda _: False
) -> Iterator[dict[str, Any]]:
    """All runs but those that are there; one that fails gives a row that says so."""
    model = options.model or random_model("tiny", folder / "tiny")
    for engine, kind in product(options.engines.split(","), KINDS):
        name = f"{engine}-{kind}"
        if not has(name):
            yield tried(name, partial(learned, name, engine, kind, model, folder, options))


def learned(
    name: str, engine: str, kind: str, model: Path, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """One run."""
    capture = "on" if kind == "captured" and not options.small else "off"
    metrics, report = train(
        folder / name, model, ROWS, "--strategy=ddp", f"--engine={engine}", "--max_devices=1",
        f"--capture={capture}", "--global_batch_size=8", "--max_seq_length=512", "--answers_only",
        "--val_size=24", f"--max_steps={options.steps}", f"--learning_rate={options.learning_rate}",
        *(["--hardware=cpu:1"] if options.small else []), timeout=options.run_seconds,
    )  # fmt: skip
    captured = report.get("captured") or {}
    return {
        "losses": [row["loss"] for row in metrics],
        "gradient_norms": [row["grad_norm"] for row in metrics],
        "held_out_loss_before": report["held_out_loss_before"],
        "held_out_loss_after": report["held_out_loss_after"],
        "step_seconds": statistics.median(row["seconds"] for row in metrics[len(metrics) // 2 :]),
        "captured": captured,
        "replayed_share": captured.get("replayed_elements", 0) / captured["elements"] if captured else 0.0,
        "versions": report["versions"],
    }


def figures(rows: list[dict[str, Any]], engines: list[str]) -> dict[str, Any]:
    """Distances of the curves, as shares of the eager loss, and what was learned."""
    by_name = {row["what"]: row for row in rows if "losses" in row}
    found: dict[str, Any] = {}
    for engine in engines:
        runs = {kind: by_name[f"{engine}-{kind}"] for kind in KINDS if f"{engine}-{kind}" in by_name}
        if "eager" not in runs:
            continue
        eager = runs["eager"]
        found[f"held_out_loss_before_{engine}"] = eager["held_out_loss_before"]
        for kind, run in runs.items():
            found[f"held_out_loss_after_{engine}_{kind}"] = run["held_out_loss_after"]
            found[f"step_seconds_{engine}_{kind}"] = run["step_seconds"]
        if "captured" in runs:
            captured = runs["captured"]
            found[f"losses_apart_{engine}"] = apart(captured["losses"], eager["losses"])
            found[f"replayed_share_{engine}"] = captured["replayed_share"]
        if "again" in runs:
            found[f"eager_noise_{engine}"] = apart(runs["again"]["losses"], eager["losses"])
    return found


def main(arguments: list[str]) -> Path:
    """Run the benchmark; returns the file written."""
    options = parse(arguments)
    if options.small:
        options.engines, options.steps = "transformers", 4
    name = options.model.name if options.model else "tiny"
    # The folder is this machine's business.
    told = [argument for argument in arguments if argument != str(options.model)]
    record = Record("real_weights", hardware_name(), options.results, told, options.go_on, model=name)
    with work_folder(options.work) as folder:
        for row in measure(folder, options, record.has):
            record.add(row, lambda rows: figures(rows, options.engines.split(",")))
            hidden = ("losses", "gradient_norms", "versions")
            print(json.dumps({name: row[name] for name in row if name not in hidden}), flush=True)
    print(json.dumps(record.content["figures"], indent=1))
    return record.path


if __name__ == "__main__":
    end_orderly()
    main(sys.argv[1:])
