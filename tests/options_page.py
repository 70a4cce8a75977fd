"""Renders examples/OPTIONS.md: our options and defaults, and what other tools call them.

python tests/options_page.py > examples/OPTIONS.md
"""

from __future__ import annotations

import dataclasses
from typing import Any

from parallel_tune.config import TrainConfig, fields_by_name
from parallel_tune.elsewhere import LLAMA_FACTORY_ELSEWISE, NOT_OFFERED, TRL_ELSEWISE, UNSLOTH_TRAIN_ELSEWISE
from parallel_tune.options import default_of

UNSLOTH_CLI = (
    "model_name", "max_seq_length", "dtype", "load_in_4bit", "dataset", "r", "lora_alpha", "lora_dropout", "bias",
    "use_gradient_checkpointing", "random_state", "use_rslora", "loftq_config", "use_dora",
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "warmup_steps",
    "max_steps", "learning_rate", "optim", "weight_decay", "lr_scheduler_type", "seed", "packing", "report_to",
    "logging_steps", "output_dir", "save_model", "save_method", "save_gguf", "save_path", "quantization", "push_model",
    "push_gguf", "hub_path", "hub_token", "raw_text_file", "chunk_size", "stride",
)  # fmt: skip
"""Options of unsloth-cli.py; use_dora is get_peft_model's."""

UNSLOTH_DEFAULTS = {
    "model_name": "unsloth/llama-3-8b",
    "use_gradient_checkpointing": "unsloth",
    "per_device_train_batch_size": "2",
    "gradient_accumulation_steps": "4",
    "max_steps": "400",
    "optim": "adamw_8bit",
    "report_to": "tensorboard",
    "output_dir": "outputs",
    "save_path": "model",
    "chunk_size": "2048",
    "stride": "512",
}
"""Where ours is another."""

UNSLOTH_TRAIN = (
    "model", "dataset", "max_seq_length", "load_in_4bit", "output_dir", "num_epochs", "learning_rate", "batch_size",
    "gradient_accumulation_steps", "warmup_steps", "max_steps", "save_steps", "weight_decay", "random_seed", "packing",
    "train_on_completions", "gradient_checkpointing", "lora_r", "lora_alpha", "lora_dropout", "target_modules",
    "use_rslora", "use_dora", "hf_token",
)  # fmt: skip
"""Options of `unsloth train` that have the same meaning here."""
TRAINING_ARGUMENTS = (
    "output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "gradient_accumulation_steps", "max_grad_norm", "bf16", "fp16", "gradient_checkpointing", "logging_steps",
    "report_to", "run_name", "eval_strategy", "eval_steps", "per_device_eval_batch_size", "save_strategy", "save_steps",
    "save_total_limit", "push_to_hub", "hub_token", "hub_model_id", "load_best_model_at_end", "metric_for_best_model",
    "seed", "ddp_timeout", "torch_compile",
)  # fmt: skip
"""Fields of transformers' TrainingArguments that may be said here."""
GONE_BUT_KNOWN = ("warmup_ratio",)
"""Fields that earlier releases of TrainingArguments had."""

TRL = (
    "model_name_or_path", "dtype", "attn_implementation", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules",
    "use_rslora", "use_dora", "load_in_4bit", "dataset_name", "dataset_config", "dataset_train_split", "max_length",
    "packing", "completion_only_loss", "assistant_only_loss",
)  # fmt: skip
"""Fields of TRL's SFTConfig, ModelConfig and ScriptArguments beside those of TrainingArguments."""
LLAMA_FACTORY = (
    "model_name_or_path", "cutoff_len", "dataset", "max_samples", "val_size", "packing", "lora_rank", "lora_alpha",
    "lora_dropout", "lora_target", "use_rslora", "use_dora", "early_stopping_steps", "export_dir",
    "export_hub_model_id", "hf_hub_token",
)  # fmt: skip
"""LLaMA-Factory 0.9.5, beside TrainingArguments' own."""


def render() -> str:
    """The page."""
    parts = [
        "# Options",
        "Every option of `parallel-tune`, on the command line (`--r 8`, with `-` or `_`), in a recipe (`r: 8`) and in\n"
        "Python (`tune(r=8)`). This page is made by `python tests/options_page.py`, and a test keeps it true.",
        "## Defaults",
        *_defaults(),
        "## By other names",
        "What stands in a row is one option; each name is taken as it is.",
        _names(),
        "Said in another way:",
        _elsewise(),
        "## Defaults that differ from unsloth-cli.py's",
        "\n".join(
            f"- `{name}`: `{there}` there, {_default_here(name)} here." for name, there in UNSLOTH_DEFAULTS.items()
        ),
        "## TrainingArguments that are no options",
        "\n".join(f"- {why}: {', '.join(f'`{name}`' for name in names)}." for why, names in NOT_OFFERED.items()),
        "`warmup_ratio`, which TrainingArguments no longer has, is taken.",
    ]
    return "\n\n".join(parts) + "\n"


def _defaults() -> list[str]:
    groups: dict[str, list[str]] = {}
    for item in dataclasses.fields(TrainConfig):
        text = item.metadata["help"]
        row = f"| `{item.name}` | {_shown(default_of(item))} | {_choices(item)}{_escaped(text)} |"
        groups.setdefault(item.metadata["group"], []).append(row)
    head = "| option | default | |\n|---|---|---|\n"
    return [f"### {name}\n\n{head}" + "\n".join(rows) for name, rows in groups.items()]


def _default_here(name: str) -> str:
    value = default_of(fields_by_name()[name])
    return "decided as the table says" if value is None else f"`{value}`"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return "off" if value is False else f"`{value}`"


def _choices(item: dataclasses.Field[Any]) -> str:
    choices = item.metadata["choices"]
    return f"{', '.join(f'`{choice}`' for choice in choices)}. " if choices else ""


def _names() -> str:
    known = fields_by_name()
    tools = (UNSLOTH_CLI + UNSLOTH_TRAIN, TRAINING_ARGUMENTS + GONE_BUT_KNOWN + TRL, LLAMA_FACTORY)
    rows = []
    for item in dataclasses.fields(TrainConfig):
        cells = [
            ", ".join(f"`{name}`" for name in dict.fromkeys(names) if name in known and known[name] is item)
            for names in tools
        ]
        if any(cells):
            rows.append(f"| `{item.name}` | {' | '.join(cells)} |")
    head = "| parallel-tune | unsloth-cli.py, `unsloth train` | transformers, TRL | LLaMA-Factory, beside those |"
    return "\n".join([head, "|---|---|---|---|", *rows])


def _elsewise() -> str:
    tools = {"`unsloth train`": UNSLOTH_TRAIN_ELSEWISE, "TRL": TRL_ELSEWISE, "LLaMA-Factory": LLAMA_FACTORY_ELSEWISE}
    rows = [f"| {tool} | `{name}` | {how} |" for tool, names in tools.items() for name, how in names.items()]
    return "| | there | here |\n|---|---|---|\n" + "\n".join(rows)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(render(), end="")
