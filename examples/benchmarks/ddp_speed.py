"""Our arrangement of ddp against the reference command of this field, on the same rows at the same samples a step.

    python examples/benchmarks/ddp_speed.py           # Qwen3-8B shape, one GPU, short and full rows
    python examples/benchmarks/ddp_speed.py --gpus 2  # through two processes and through one
    python examples/benchmarks/ddp_speed.py --small   # a tiny model on the CPU, two processes and one, no reference

The reference is reference_unsloth.py: stock Unsloth, batch 1 x accumulation 4, offloaded checkpointing. Runs alternate;
figures are medians over the steps after the first eight. Writes results/ddp_speed.HARDWARE.json beside this file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))
from rows import make_rows  # noqa: E402
from shapes import make_model  # noqa: E402

WARM_UP = 8
SAMPLES = 4
"""Rows of a step and process: batch 1 x accumulation 4."""


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen3-8b")
    parser.add_argument("--model", type=Path, help="a folder that holds the shape already")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--rows", default="short,full")
    parser.add_argument("--engines", default="unsloth,transformers")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a full row")
    parser.add_argument("--steps", type=int, default=60, help="of our runs; the reference runs half as many")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--skip", default="", help="of reference, limit, overhead, single: what to leave out")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    return parser.parse_args(arguments)


def call(command: list[str]) -> None:
    """Run a command, and say what it said if it failed."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        )


def ours(folder: Path, name: str, model: Path, rows: Path, options: argparse.Namespace, *extra: str) -> dict[str, Any]:
    """One run of parallel-tune; a row of figures."""
    run = folder / name
    call([
        sys.executable, "-m", "parallel_tune", f"--model={model}", f"--dataset={rows}", "--strategy=ddp",
        f"--max_seq_length={options.length}", "--report_to=none", f"--output_dir={run}", "--warmup_steps=5", *extra,
    ])  # fmt: skip
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [row for row in metrics if "loss" in row]
    report = json.loads((run / "report.json").read_text())
    steady = metrics[min(WARM_UP, len(metrics) // 2) :]
    seconds = [row["seconds"] for row in steady]
    captured = report.get("captured") or {}
    return {
        "what": name,
        "processes": report["world_size"],
        "tokens_per_second": sum(row["tokens"] for row in steady) / sum(seconds),
        "step_seconds": statistics.median(seconds),
        "step_seconds_p90": sorted(seconds)[int(len(seconds) * 0.9)],
        "first_steps_seconds": [row["seconds"] for row in metrics[:WARM_UP]],
        "total_seconds": report["total_seconds"],
        "losses": [row["loss"] for row in metrics],
        "captured": captured,
        "replayed_share": captured.get("replayed_elements", 0) / captured["elements"] if captured else 0.0,
        "devices": report["devices"],
        "versions": report["versions"],
    }


def reference(folder: Path, name: str, model: Path, rows: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run of the reference; a row of figures."""
    result = folder / f"{name}.json"
    script = [str(HERE / "reference_unsloth.py"), str(model), str(rows), str(options.steps // 2), str(result)]
    launcher = [sys.executable]
    if options.gpus > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={options.gpus}"]
    call([*launcher, *script, f"--max_seq_length={options.length}"])
    found = json.loads(result.read_text())
    seconds, tokens = found["seconds"][WARM_UP:], found["tokens"][WARM_UP:]
    return {
        "what": name,
        "processes": found["processes"],
        "tokens_per_second": sum(tokens) / sum(seconds),
        "step_seconds": statistics.median(seconds),
        "step_seconds_p90": sorted(seconds)[int(len(seconds) * 0.9)],
        "losses": found["losses"],
        "used_bytes": found["used_bytes"],
    }


def measure(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All runs, in turn."""
    model = options.model or make_model(options.shape, folder / "model")
    files = {"short": make_rows(model, folder / "short.jsonl", 40 * options.steps)}
    if "full" in options.rows:
        files["full"] = make_rows(model, folder / "full.jsonl", 8 * options.steps, options.length)
    skip, engines = set(options.skip.split(",")), options.engines.split(",")
    batch = f"--global_batch_size={SAMPLES * options.gpus}"
    on = [f"--max_steps={options.steps}", *(["--hardware=cpu:2"] if options.small else [])]
    for kind, turn in product(options.rows.split(","), range(options.repeat)):
        rows = files[kind]
        if not options.small and "reference" not in skip:
            yield reference(folder, f"reference-{kind}-{turn}", model, rows, options)
        for engine in engines:
            name = f"{engine}-{kind}-{turn}"
            yield ours(folder, name, model, rows, options, f"--engine={engine}", batch, *on)
            if options.gpus > 1 and "single" not in skip:
                single = [f"--engine={engine}", f"--global_batch_size={SAMPLES}", "--max_devices=1", *on]
                yield ours(folder, f"single-{name}", model, rows, options, *single)
    if not options.small and "limit" not in skip:
        for kind, engine in product(options.rows.split(","), engines):
            run, result = folder / f"{engine}-{kind}-0", folder / f"limit-{engine}-{kind}.json"
            call([sys.executable, str(HERE / "captured_limit.py"), str(run), str(result)])
            limit = json.loads(result.read_text())
            speed = limit["tokens"] / statistics.median(limit["seconds"])
            yield {"what": f"limit-{engine}-{kind}", **limit, "tokens_per_second": speed}
    if not options.small and "overhead" not in skip:
        same = [
            "--engine=unsloth",
            "--per_device_train_batch_size=1",
            "--gradient_accumulation_steps=4",
            "--capture=off",
            "--padding_free=off",
            "--use_gradient_checkpointing=unsloth",
            "--optim=adamw_8bit",
            f"--max_steps={options.steps // 2}",
        ]
        yield ours(folder, "arranged-as-the-reference", model, files["short"], options, *same)


def figures(rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Ratios of medians over repetitions; the best engine is the one that counts."""

    def speed(prefix: str) -> float | None:
        speeds = [row["tokens_per_second"] for row in rows if row["what"].startswith(prefix)]
        return statistics.median(speeds) if speeds else None

    def ratio(over: float | None, under: float | None) -> float | None:
        return over / under if over and under else None

    engine = max(options.engines.split(","), key=lambda each: speed(f"{each}-") or 0.0)
    slow = next((row["step_seconds"] for row in rows if row["what"].startswith("reference-short")), None)
    same = next((row["step_seconds"] for row in rows if row["what"] == "arranged-as-the-reference"), None)
    result: dict[str, Any] = {
        "engine": engine,
        "ratio_to_reference": ratio(speed(f"{engine}-short"), speed("reference-short")),
        "ratio_to_reference_full_rows": ratio(speed(f"{engine}-full"), speed("reference-full")),
        "share_of_captured_limit_full_rows": ratio(speed(f"{engine}-full"), speed(f"limit-{engine}-full")),
        "overhead": same / slow - 1 if same and slow else None,
        "weak_scaling": None,
    }
    for each in options.engines.split(","):
        for kind in options.rows.split(","):
            scaling = ratio(speed(f"{each}-{kind}"), speed(f"single-{each}-{kind}"))
            if scaling:
                result[f"weak_scaling_{each}_{kind}"] = scaling / options.gpus
                result["weak_scaling"] = max(result["weak_scaling"] or 0.0, scaling / options.gpus)
    return result


def main(arguments: list[str]) -> Path:
    """Run the benchmark; returns the file written."""
    options = parse(arguments)
    if options.small:
        options.shape, options.engines, options.rows, options.length = "tiny", "transformers", "short", 128
        options.gpus = 2
        hardware = "cpu"
    else:
        import torch

        hardware = f"{options.gpus}x{torch.cuda.get_device_name(0).replace(' ', '-')}"
    options.results.mkdir(parents=True, exist_ok=True)
    path: Path = options.results / f"ddp_speed.{hardware}.json"
    record: dict[str, Any] = {
        "name": "ddp_speed",
        "hardware": hardware,
        "versions": {},
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "examples/benchmarks/ddp_speed.py", *arguments]),
        "shape": options.shape,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(Path(folder), options):
            print(json.dumps({key: row[key] for key in row if key not in ("losses", "versions")}), flush=True)
            record["versions"] |= row.pop("versions", {})
            record["rows"].append(row)
            # After each run: what was measured stays if a later one fails.
            record["figures"] = figures(record["rows"], options)
            path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["figures"], indent=1))
    return path


if __name__ == "__main__":
    main(sys.argv[1:])
