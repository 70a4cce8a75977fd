"""A model card from what a run knows: data, settings, plan, and the figures that were measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from parallel_tune.config import TrainConfig
from strategies.contracts import Plan

SETTINGS = (
    "full_finetuning", "load_in_4bit", "r", "lora_alpha", "lora_dropout", "bias", "target_modules", "use_rslora",
    "use_dora", "loftq_config", "max_seq_length", "answers_only", "learning_rate", "lr_scheduler_type", "warmup",
    "weight_decay",
    "max_grad_norm", "optim", "num_train_epochs", "max_steps", "seed", "dtype",
)  # fmt: skip
ADAPTER_ONLY = ("r", "lora_alpha", "lora_dropout", "bias", "target_modules", "use_rslora", "use_dora", "loftq_config")


def model_card(config: TrainConfig, plan: Plan, report: dict[str, Any], method: str) -> str:
    """The text of README.md; local paths are given by their last part only."""
    base, dataset = public_name(config.model), public_name(config.data_source)
    front: dict[str, Any] = {
        "library_name": "peft" if method == "lora" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["parallel-tune", plan.strategy, method],
    }
    # The Hub refuses a card whose base_model or dataset is not a name that it could have.
    if "/" in base:
        front["base_model"] = base
    if "/" in dataset:
        front["datasets"] = [dataset]
    rows = [(name, getattr(config, name)) for name in SETTINGS if not (config.full_finetuning and name in ADAPTER_ONLY)]
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {base.rpartition('/')[2]}, fine-tuned on {dataset.rpartition('/')[2]}",
        f"Base model: `{base}`. Made with parallel-tune by `{plan.strategy}` and exported as `{method}`.",
        "## Data\n\n" + _table([("dataset", dataset), *_flat(report.get("data", {}))]),
        "## Settings\n\n" + _table(rows),
        "## Plan\n\n" + _table(_plan_rows(plan)) + "\n\n" + "\n".join(f"- {reason}" for reason in plan.reasons),
        "## Measured\n\n" + _table(_measured_rows(report)),
        "## Versions\n\n" + _table(sorted(report.get("versions", {}).items())),
    ]
    return "\n\n".join(sections) + "\n"


def public_name(name: str) -> str:
    """A Hub id as it is; of a local path the last part: where it lies is nobody's business."""
    path = Path(name).expanduser()
    local = path.exists() or path.is_absolute() or name.startswith(".")
    return path.resolve().name if local else name


def _plan_rows(plan: Plan) -> list[tuple[str, Any]]:
    devices = ", ".join(f"{d.name} (layers {d.layers[0]}-{d.layers[1]})" for d in plan.devices)
    return [
        ("strategy", plan.strategy),
        ("engine", plan.engine),
        ("processes", plan.processes),
        ("devices", devices),
        ("micro-batch", plan.micro_batch),
        ("accumulation steps", plan.gradient_accumulation_steps),
        ("global batch", plan.global_batch),
        ("gradient checkpointing", plan.gradient_checkpointing),
    ]


def _measured_rows(report: dict[str, Any]) -> list[tuple[str, Any]]:
    names = ("steps", "samples", "tokens", "seconds", "tokens_per_second", "final_loss")
    held_out = ("held_out_loss_before", "held_out_loss_after")
    rows = [(name, report[name]) for name in (*names, *held_out) if report.get(name) is not None]
    for device in report.get("devices", []):
        for name in ("predicted_peak_bytes", "used_peak_bytes"):
            if name in device:
                what = name.removesuffix("_bytes").replace("_", " ")
                rows.append((f"device {device['index']} {what}", f"{device[name] / 2**30:.2f} GiB"))
    return rows


def _flat(data: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in data.items() if isinstance(value, str | int | float)]


def _table(rows: list[tuple[str, Any]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_text(value)} |" for name, value in rows)])


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    if isinstance(value, float):
        text = f"{value:.6g}"
    return text.replace("|", "\\|")
