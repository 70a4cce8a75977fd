"""Predicted tensor peaks against traces of the same training steps.

    python examples/benchmarks/prediction_traces.py [--rows N] [--rival VENV/bin/python] [--device cuda]

Each row plays one optimizer step of transformers + peft (second step: the optimizer's states exist) on fake tensors,
two and three layers deep, extrapolates, and compares the closed form's peak. No constant of the closed form is fitted,
so no row has been used up. `--rival` runs fitcheck-llm, installed in an environment of its own, on the rows that it can
express. `--device cuda` measures real steps instead, whole depth, where they fit, against max_memory_allocated.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import logging
import platform
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rival import ask

from parallel_tune.memory import ClosedFormEstimator, ModelFacts, TrainingSettings, load_model_facts
from parallel_tune.memory.lookup import catalog_config
from parallel_tune.memory.parameters import part_parameters
from strategies.contracts import Arrangement, Part

MODELS = (
    "meta-llama/Llama-3.2-1B",
    "google/gemma-2-2b",
    "Qwen/Qwen3-4B",
    "microsoft/Phi-3-mini-4k-instruct",
    "Qwen/Qwen2.5-7B",
    "meta-llama/Llama-3.1-8B",
    "mistralai/Mistral-Nemo-Base-2407",
    "Qwen/Qwen3-32B",
    "meta-llama/Llama-3.1-70B",
)
METHODS: tuple[dict[str, Any], ...] = ({"method": "full"}, {"method": "lora"}, {"method": "lora", "load_in_4bit": True})
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
STAGES = (1, 2, 4, 8, 1, 3, 6)


def rows(count: int) -> list[dict[str, Any]]:
    """Every model with every method and both forms of checkpointing; length, stage and accumulation go round."""
    made: list[dict[str, Any]] = []
    for model in MODELS:
        for method in METHODS:
            for checkpointing in ("none", "full"):
                index = len(made)
                stages = STAGES[index % len(STAGES)]
                made.append(
                    {
                        "model": model,
                        **method,
                        "gradient_checkpointing": checkpointing,
                        "sequence_length": LENGTHS[index % len(LENGTHS)],
                        "stages": stages,
                        "stage": (0, stages - 1, stages // 2)[index // 2 % 3] if stages > 1 else 0,
                        "gradient_accumulation_steps": 1 + index % 2,
                        "attention_mask": index % 5 == 4 and LENGTHS[index % len(LENGTHS)] <= 4096,
                    }
                )
    for index, length in enumerate(LENGTHS * 2):  # whole models at each length, as a user of one card has them
        model = MODELS[(1 + index) % 6]
        method = METHODS[1 + index % 2]
        made.append(
            {
                "model": model,
                **method,
                "gradient_checkpointing": "full",
                "sequence_length": length,
                "stages": 1,
                "stage": 0,
            }
            | {"gradient_accumulation_steps": 4, "attention_mask": False}
        )
    return made[:count]


def part_of(facts: ModelFacts, stages: int, stage: int) -> Part:
    """Layers of one stage of an even cut."""
    first, end = (facts.num_layers * k // stages for k in (stage, stage + 1))
    return Part(first, end - 1, embedding=stage == 0, head=stage == stages - 1)


def settings_of(row: dict[str, Any]) -> TrainingSettings:
    return TrainingSettings(
        method=row["method"],
        load_in_4bit=row.get("load_in_4bit", False),
        optimizer="adamw_torch_fused",
        sequence_length=row["sequence_length"],
        attention_mask=row["attention_mask"],
    )


def traced(facts: ModelFacts, row: dict[str, Any], part: Part, arrangement: Arrangement) -> int:
    from parallel_tune.memory.trace import trace_peak

    return trace_peak(facts, settings_of(row), part, arrangement)


def measured(facts: ModelFacts, row: dict[str, Any], part: Part, arrangement: Arrangement) -> int:
    """max_memory_allocated of a real second step, less what was allocated before (cuBLAS workspaces)."""
    import torch

    from parallel_tune.memory.training_step import TrainingStep

    ones = torch.ones(64, 64, device="cuda", requires_grad=True)
    (ones @ ones).sum().backward()
    del ones
    before = torch.cuda.memory_allocated()
    step = TrainingStep(facts, settings_of(row), part, arrangement, device="cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        step.take()
    peak = torch.cuda.max_memory_allocated() - before
    del step
    gc.collect()
    torch.cuda.empty_cache()
    return peak


def rival_bytes(python: str, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What fitcheck-llm says to the rows that it can express: whole models, one micro-batch, no mask."""
    return ask(python, [{"config": catalog_config(t["model"])[0], "training": _rival_training(t)} for t in tasks])


def _rival_training(row: dict[str, Any]) -> dict[str, Any]:
    lora = row["method"] == "lora"
    return {
        "quantization": "nf4" if row.get("load_in_4bit") else "none",
        "double_quant": bool(row.get("load_in_4bit")),
        "optimizer": "adamw",
        "optimizer_dtype": "fp32" if lora else "bf16",
        "seq_len": row["sequence_length"],
        "lora_rank": 16 if lora else None,
        "lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "grad_checkpoint": row["gradient_checkpointing"] == "full",
        "flash_attn": True,
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    table: list[dict[str, Any]] = []
    observe = measured if options.device == "cuda" else traced
    for row in rows(options.rows):
        facts = load_model_facts(row["model"])
        part = part_of(facts, row["stages"], row["stage"])
        arrangement = Arrangement(
            1, 1, row["gradient_accumulation_steps"], row["gradient_checkpointing"], stages=row["stages"]
        )
        phases = ClosedFormEstimator(facts, settings_of(row)).phases(part, arrangement)
        predicted = max(phases, key=lambda phase: phase.allocated_bytes)
        if options.device == "cuda" and predicted.allocated_bytes > options.limit_gib * 2**30:
            continue
        observed = observe(facts, row, part, arrangement)
        error = predicted.allocated_bytes / observed - 1
        parameters = part_parameters(facts, part).total
        table.append(
            {**row, "parameters": parameters, "phase": predicted.phase, "observed_bytes": observed}
            | {"predicted_bytes": predicted.allocated_bytes, "error": round(error, 6)}
        )
        print(_line(table[-1]), flush=True)
    if options.rival:
        _add_rival(table, options.rival)
    return {"rows": table, "figures": figures(table)}


def _add_rival(table: list[dict[str, Any]], python: str) -> None:
    alike = [r for r in table if r["stages"] == 1 and not r["attention_mask"]]
    for row, answer in zip(alike, rival_bytes(python, alike), strict=True):
        if "allocated" in answer:
            row["fitcheck_bytes"] = int(answer["allocated"])
            row["fitcheck_error"] = round(row["fitcheck_bytes"] / row["observed_bytes"] - 1, 6)
        else:
            row["fitcheck_refusal"] = answer["error"]


def figures(table: list[dict[str, Any]]) -> dict[str, Any]:
    errors = [abs(row["error"]) for row in table]
    result: dict[str, Any] = {
        "prediction_traces": {
            "rows": len(table),
            "allocated_mean_error": round(sum(errors) / len(errors), 6),
            "allocated_worst_error": round(max(errors), 6),
        }
    }
    rival = [row for row in table if "fitcheck_error" in row]
    if rival:
        ours = [abs(row["error"]) for row in rival]
        theirs = [abs(row["fitcheck_error"]) for row in rival]
        result["fitcheck"] = {
            "rows": len(rival),
            "allocated_mean_error": round(sum(theirs) / len(theirs), 6),
            "allocated_worst_error": round(max(theirs), 6),
            "ours_on_these_mean_error": round(sum(ours) / len(ours), 6),
            "ours_on_these_worst_error": round(max(ours), 6),
        }
    return result


def _line(row: dict[str, Any]) -> str:
    method = "4bit" if row.get("load_in_4bit") else row["method"]
    return (
        f"{row['model'].split('/')[1]:26} {method:5} T={row['sequence_length']:<6}"
        f" ckpt={row['gradient_checkpointing']:5}"
        f" stage {row['stage'] + 1}/{row['stages']} x{row['gradient_accumulation_steps']}"
        f" {row['phase']:13} {row['predicted_bytes'] / 2**30:9.3f} {row['observed_bytes'] / 2**30:9.3f} GiB"
        f" {100 * row['error']:+.3f}%"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--rival", default="", help="python of an environment that has fitcheck-llm")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--limit_gib", type=float, default=70.0, help="largest predicted peak to run on a GPU")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    result = run(options)
    hardware = options.device
    if hardware == "cuda":
        import torch

        hardware = torch.cuda.get_device_name().replace(" ", "-").lower()
    document = {
        "name": "prediction_traces",
        "hardware": platform.processor() or platform.machine() if hardware == "cpu" else hardware,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "examples/benchmarks/prediction_traces.py", *sys.argv[1:]]),
        **result,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"prediction_traces.{hardware}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(result["figures"], indent=1))
    print(path)


if __name__ == "__main__":
    main()
