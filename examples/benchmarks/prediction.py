"""Predicted memory against measured, one short training run a row.

    python examples/benchmarks/prediction.py [--rows N] [--work FOLDER] [--results FOLDER]

Random-weight models of well-known shapes are made on the spot. Every row is a `parallel-tune` run of its own on one
GPU; where there are several GPUs, as many rows run side by side. Nothing else may use the GPUs. All of the first 21
rows on an H200 were in view when Unsloth's layers and the allocator's reserve were corrected: of Unsloth's LoRA rows
only llama-8b's determined no number. Nothing is fitted for the tensors of transformers. Writes
results/prediction.HARDWARE.json.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import queue
import random
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from parallel_tune.hardware import probe
from parallel_tune.report import versions

SHAPES = Path(__file__).with_name("shapes.py")
DATASET = Path(__file__).parents[1] / "short_answers.jsonl"
Row = dict[str, Any]


def rows() -> list[Row]:
    """Shape, engine, method, tokens, rows of a micro-batch, checkpointing."""
    cases = [
        ("llama-1b", "lora", 2048, 1, "none"),
        ("llama-1b", "lora", 1024, 4, "full"),
        ("llama-1b", "4bit", 2048, 2, "none"),
        ("llama-1b", "full", 2048, 1, "full"),
        ("qwen3-1b", "lora", 2048, 2, "none"),
        ("qwen3-1b", "4bit", 1024, 2, "full"),
        ("gemma3-1b", "lora", 1024, 2, "none"),
        ("llama-3b", "lora", 4096, 1, "full"),
        ("llama-3b", "4bit", 512, 8, "none"),
        ("llama-8b", "lora", 2048, 2, "none"),
        ("llama-8b", "lora", 4096, 1, "full"),
        ("llama-8b", "4bit", 2048, 1, "full"),
        ("llama-8b", "4bit", 1024, 2, "none"),
    ]
    found = [
        {"shape": shape, "engine": engine, "method": method, "tokens": tokens, "rows": count, "checkpointing": mode}
        for (shape, method, tokens, count, mode), engine in itertools.product(cases, ("transformers", "unsloth"))
    ]
    for row in found:
        if row["engine"] == "unsloth" and row["checkpointing"] == "full" and row["method"] != "full":
            row["checkpointing"] = "unsloth"
    return found


def command(row: Row, model: Path, dataset: Path, run: Path) -> list[str]:
    """The run of a row."""
    method = {"lora": [], "4bit": ["--load_in_4bit"], "full": ["--full_finetuning", "--learning_rate", "1e-5"]}
    return [
        sys.executable, "-m", "parallel_tune", "--model", str(model), "--dataset", str(dataset), "--strategy", "ddp",
        "--engine", row["engine"], "--max_seq_length", str(row["tokens"]), "--max_steps", "3",
        "--per_device_train_batch_size", str(row["rows"]), "--gradient_accumulation_steps", "2",
        "--use_gradient_checkpointing", row["checkpointing"], "--output_dir", str(run), *method[row["method"]],
    ]  # fmt: skip


def write_dataset(path: Path) -> None:
    """Rows of plain text, each longer than any row's tokens."""
    words = " ".join(" ".join(json.loads(line).values()) for line in DATASET.read_text().splitlines()).split()
    draw = random.Random(0)
    path.write_text("".join(json.dumps({"text": " ".join(draw.choices(words, k=6000))}) + "\n" for _ in range(60)))


def measure(row: Row, work: Path, dataset: Path, number: int, gpus: queue.Queue[int]) -> Row:
    """Run a row on a free GPU; the figures of its report, or the end of its output."""
    gpu = gpus.get()
    try:
        run = work / "runs" / f"row-{number}"
        done = subprocess.run(
            command(row, work / row["shape"], dataset, run),
            env={**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    finally:
        gpus.put(gpu)
    if done.returncode != 0:
        result = {**row, "failed": (done.stdout + done.stderr)[-600:]}
    else:
        device = json.loads((run / "report.json").read_text())["devices"][0]
        result = {**row, **{name: value for name, value in device.items() if name.endswith("_bytes")}}
        result["allocated_error"] = device["predicted_allocated_bytes"] / device["allocated_peak_bytes"] - 1
        result["used_error"] = device["predicted_peak_bytes"] / device["used_peak_bytes"] - 1
    print(json.dumps(result), flush=True)
    return result


def figures(measured: list[Row]) -> dict[str, Any]:
    """Mean and worst of the errors' sizes, over all rows and for each engine."""
    found: dict[str, Any] = {
        "rows": len(measured),
        "false_fits": sum("out of memory" in r["failed"].lower() for r in measured if "failed" in r),
    }
    for name in ("", "transformers", "unsloth"):
        those = [row for row in measured if name in (row["engine"], "") and "failed" not in row]
        for kind in ("allocated", "used"):
            sizes = [abs(row[f"{kind}_error"]) for row in those]
            if sizes:
                prefix = f"{name}_{kind}" if name else kind
                found[f"{prefix}_mean_error"] = statistics.mean(sizes)
                found[f"{prefix}_worst_error"] = max(sizes)
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=None, help="only the first so many")
    parser.add_argument("--work", type=Path, default=Path("/tmp/parallel-tune-prediction"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    todo = rows()[: options.rows]
    dataset = options.work / "rows.jsonl"
    dataset.parent.mkdir(parents=True, exist_ok=True)
    write_dataset(dataset)
    for shape in dict.fromkeys(row["shape"] for row in todo):
        # In a process of its own: a CUDA context here would count as the rows' use.
        subprocess.run([sys.executable, str(SHAPES), shape, str(options.work / shape)], check=True)
    devices = probe(os.environ).devices
    hardware = devices[0].name.replace(" ", "-")
    gpus: queue.Queue[int] = queue.Queue()
    for gpu in range(len(devices)):
        gpus.put(gpu)
    measured: list[Row] = []
    with ThreadPoolExecutor(gpus.qsize()) as pool:
        jobs = [pool.submit(measure, row, options.work, dataset, number, gpus) for number, row in enumerate(todo)]
        for job in as_completed(jobs):
            measured.append(job.result())
            # After every row: a time limit that ends this keeps what was measured.
            write_record(options.results, hardware, measured)
    print(json.dumps(figures(measured), indent=1))


def write_record(folder: Path, hardware: str, measured: list[Row]) -> None:
    """Rows and figures, with the machine and the versions beside them."""
    record = {
        "name": "prediction",
        "hardware": hardware,
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "command": "python examples/benchmarks/prediction.py",
        "rows": measured,
        "figures": figures(measured),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"prediction.{hardware}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
