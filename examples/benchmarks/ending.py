"""Does a run always end well? Short ddp runs in a row, each of which must end with code 0 and its result on disk.

A gloo process group can abort or hang at the end of a process after all work is done (8 of 60 two-process runs with an
ordinary exit). Success is therefore decided by what lies on disk, and workers leave without the interpreter's exit.

    python examples/benchmarks/ending.py [--runs 50] [--processes 2] [--results FOLDER]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))
from children import naming  # noqa: E402

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft")
LIMIT_SECONDS = 300
"""A run that takes longer counts as hung."""


def main(arguments: list[str] | None = None) -> Path:
    """Run, print a line a run, write the record and return its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model, data = make_model(Path(folder) / "model"), make_data(Path(folder) / "rows.jsonl")
        for number in range(options.runs):
            rows.append(one_run(Path(folder) / f"run-{number}", model, data, options.processes))
            print(f"{number + 1:>3}/{options.runs}  code {rows[-1]['code']}  {rows[-1]['seconds']:.1f} s", flush=True)
    record = {
        "name": "ending",
        "hardware": f"{os.cpu_count()} cores of {cpu_name()}",
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python examples/benchmarks/ending.py --runs {options.runs} --processes {options.processes}",
        "rows": rows,
        "figures": {
            "runs": len(rows),
            "ended_with_code_0": sum(row["code"] == 0 for row in rows),
            "results_on_disk": sum(row["result"] for row in rows),
            "hung": sum(row["code"] is None for row in rows),
            "left_processes": sum(row["left"] for row in rows),
            "median_seconds": sorted(row["seconds"] for row in rows)[len(rows) // 2],
        },
    }
    options.results.mkdir(parents=True, exist_ok=True)
    path: Path = options.results / "ending.cpu.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["figures"]))
    return path


def one_run(run: Path, model: Path, data: Path, processes: int) -> dict[str, Any]:
    """Three steps of ddp; code None if it hung."""
    options = ["--strategy=ddp", f"--hardware=cpu:{processes}", "--max_steps=3", f"--global_batch_size={2 * processes}"]
    command = [sys.executable, "-P", "-m", "parallel_tune", f"--model={model}", f"--dataset={data}", *options]
    started = time.monotonic()
    code: int | None = None
    with run.with_suffix(".log").open("w") as log:
        process = subprocess.Popen([*command, f"--output_dir={run}"], stdout=log, stderr=log, env=environment())
        try:
            code = process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    row: dict[str, Any] = {
        "code": code,
        "seconds": round(time.monotonic() - started, 2),
        "result": (run / "report.json").exists() and (run / "adapter" / "adapter_model.safetensors").exists(),
        "left": len(naming(run)),
    }
    if code != 0:
        row["said"] = run.with_suffix(".log").read_text()[-2000:]
    return row


def environment() -> dict[str, str]:
    """Offline, on the CPU, with one thread a process."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def make_model(folder: Path) -> Path:
    """A Llama of two narrow layers with random weights, and a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_data(path: Path) -> Path:
    """Sixteen plain texts."""
    path.write_text("".join(json.dumps({"text": f"row {i} " + "and so on " * (i % 5 + 1)}) + "\n" for i in range(16)))
    return path


def cpu_name() -> str:
    """The processor's name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
