"""What settings must hold: ranges, and combinations that make no sense, each refused with the way out."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from parallel_tune import trackers
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from parallel_tune.config import TrainConfig

POSITIVE = (
    "max_seq_length", "r", "lora_alpha", "global_batch_size", "per_device_train_batch_size",
    "gradient_accumulation_steps", "per_device_eval_batch_size", "num_train_epochs", "logging_steps", "max_rows",
    "lanes", "stages", "max_devices", "ddp_timeout", "chunk_size", "early_stopping_patience", "adam_epsilon",
)  # fmt: skip
NOT_NEGATIVE = (
    "lora_dropout", "val_size", "learning_rate", "warmup_steps", "warmup_ratio", "weight_decay", "max_grad_norm",
    "save_steps", "eval_steps", "seed", "random_state", "stride", "early_stopping_threshold", "adam_beta1",
    "adam_beta2", "profile_steps",
)  # fmt: skip
NOT_BLANK = ("model", "output_dir", "save_path", "strategy")
BELOW_ONE = ("lora_dropout", "warmup_ratio", "adam_beta1", "adam_beta2")
COUNTS_OR_SHARES = ("warmup_steps", "eval_steps", "save_steps", "logging_steps")
NEEDED_BY_SCHEDULE = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
"""Of which one must be in lr_scheduler_kwargs."""


def validate(config: TrainConfig) -> TrainConfig:
    """Return the config unchanged, or say what is wrong with it.

    Raises:
        ConfigError: a value out of range, or settings that exclude each other.
    """
    _check_ranges(config)
    trackers.check_names(config.report_to)
    _check_training(config)
    _check_split(config)
    _check_adapter(config)
    _check_data(config)
    _check_evaluation(config)
    _check_export(config)
    return config


def _check_ranges(config: TrainConfig) -> None:
    for item in dataclasses.fields(config):
        name, value, choices = item.name, getattr(config, item.name), item.metadata["choices"]
        if value is None:
            continue
        if name in NOT_BLANK and not value.strip():  # an empty path would be the working directory
            raise ConfigError(f"{name} = {value!r} names nothing", f"Give {name} a name, or leave it out.")
        if choices and value not in choices:
            raise ConfigError(f"{name} = {value!r} is not known", f"Choose from {', '.join(choices)}.")
        if name in POSITIVE and not value > 0:
            raise ConfigError(f"{name} = {value!r} must be above 0", f"Give {name} a positive number.")
        if name in NOT_NEGATIVE and not value >= 0:
            raise ConfigError(f"{name} = {value!r} must not be negative", f"Give {name} 0 or more.")
        if name in BELOW_ONE and not value < 1:
            raise ConfigError(f"{name} = {value!r} must be below 1", f"Give {name} as a share below 1.")
        if name in COUNTS_OR_SHARES and value > 1 and value != int(value):
            raise ConfigError(f"{name} = {value!r} is neither whole nor a share", "Give whole steps, or less than 1.")
    if config.val_size > 1 and config.val_size != int(config.val_size):
        raise ConfigError(
            f"val_size = {config.val_size!r} is neither whole nor a share", "Give whole rows, or less than 1."
        )
    if config.max_steps == 0 or config.max_steps < -1:
        raise ConfigError(f"max_steps = {config.max_steps} trains nothing", "Give a positive number, or leave it out.")
    if config.save_total_limit is not None and config.save_total_limit < 1:
        raise ConfigError(f"save_total_limit = {config.save_total_limit} would keep nothing", "Give 1 or more.")


def _check_training(config: TrainConfig) -> None:
    named = {name for name in ("bf16", "fp16") if getattr(config, name)}
    if len(named) == 2:
        raise ConfigError("bf16 and fp16 exclude each other", "Keep bf16 where the card has it, else fp16.")
    if named and config.dtype not in ("auto", config.named_dtype):
        raise ConfigError(f"{named.pop()} and dtype = {config.dtype!r} contradict each other", "Keep one of them.")
    if config.full_finetuning and config.load_in_4bit:
        raise ConfigError(
            "full_finetuning and load_in_4bit exclude each other: 4-bit weights cannot be trained",
            "Drop one of them; QLoRA is load_in_4bit alone.",
        )
    if config.packing and config.padding_free == "off":
        raise ConfigError(
            "packing joins rows in one sequence, and padding_free = 'off' forbids that", "Drop one of the two."
        )
    needed = NEEDED_BY_SCHEDULE.get(config.lr_scheduler_type)
    if needed and not set(needed) & set(config.lr_scheduler_kwargs or {}):
        raise ConfigError(
            f"lr_scheduler_type = {config.lr_scheduler_type!r} needs {' or '.join(needed)}",
            f"Give it as --lr_scheduler_kwargs '{{\"{needed[-1]}\": ...}}'.",
        )
    if config.saves == "steps" and not config.save_steps:
        raise ConfigError(
            "save_strategy = 'steps' needs save_steps", "Say after how many steps, e.g. --save_steps 100."
        )
    if config.saves != "steps" and config.save_steps:
        raise ConfigError(
            f"save_steps = {config.save_steps} has no effect with save_strategy = {config.saves!r}",
            "Keep one of them.",
        )


def _check_split(config: TrainConfig) -> None:
    if config.strategy == "ddp":
        whole = "and ddp puts a whole one on each device"
        if config.stages is not None:
            raise ConfigError(f"stages divide one model, {whole}", "Drop one of the two.")
        if config.lanes is not None or config.pipeline == "on":
            name = "pipeline = 'on'" if config.lanes is None else f"lanes = {config.lanes}"
            raise ConfigError(f"{name} is about one model that is split, {whole}", "Drop one of the two.")
    if (config.pipeline, (config.lanes or 0) > 1) == ("off", True) or (config.pipeline, config.lanes) == ("on", 1):
        raise ConfigError(
            f"pipeline = {config.pipeline!r} and lanes = {config.lanes} contradict each other",
            "Keep one of them: one lane is no pipeline, and more are one.",
        )


def _check_adapter(config: TrainConfig) -> None:
    if config.full_finetuning:
        for name in ("use_dora", "use_rslora", "loftq_config"):
            if getattr(config, name) not in (False, None):
                raise ConfigError(f"{name} is about adapters, and full_finetuning trains none", "Drop one of the two.")
    elif not config.target_modules:
        raise ConfigError("target_modules is empty: nothing would train", "Name modules, or use --full_finetuning.")
    if "all-linear" in config.target_modules and len(config.target_modules) > 1:
        raise ConfigError("target_modules: all-linear stands for every one and stands alone", "Drop the other names.")
    if config.loftq_config is None:
        return
    if not config.load_in_4bit:
        raise ConfigError(
            "loftq_config makes up for the 4-bit rounding of the frozen weights, and they are not held in 4 bit",
            "Add --load_in_4bit, or drop --loftq_config.",
        )
    if config.use_dora:
        raise ConfigError("loftq_config and use_dora begin with different adapters", "Drop one of the two.")
    known = {"loftq_bits": 4, "loftq_iter": 1}
    for name, value in config.loftq_config.items():
        if known.get(name) != value:
            raise ConfigError(
                f"loftq_config: {name} = {value!r} is not supported: the weights are held in nf4, rounded once",
                'Write {"loftq_bits": 4, "loftq_iter": 1}.',
            )


def _check_data(config: TrainConfig) -> None:
    from parallel_tune.config import DEFAULT_DATASET

    if config.raw_text_file is not None and config.dataset != DEFAULT_DATASET:
        raise ConfigError(
            f"raw_text_file = {config.raw_text_file!r} and dataset = {config.dataset!r} are both to be learned",
            "Keep one of them.",
        )
    if config.raw_text_file is not None and not config.raw_text_file.strip():
        raise ConfigError(f"raw_text_file = {config.raw_text_file!r} names nothing", "Name a file, or leave it out.")
    for name in ("chunk_size", "stride"):
        if config.raw_text is None and getattr(config, name) is not None:
            raise ConfigError(f"{name} is about raw text, and none is given", "Add --raw_text_file, or drop it.")
    if config.raw_text is None:
        return
    for name, value in (("dataset_config", config.dataset_config), ("dataset_split", config.dataset_split)):
        if value not in (None, "train"):
            raise ConfigError(f"{name} = {value!r}: a raw text is one whole", f"Drop --{name}.")
    if config.answers_only:
        raise ConfigError("answers_only: a raw text has no answers", "Drop --answers_only.")
    if config.chunk_size is not None and config.chunk_size > config.max_seq_length:
        raise ConfigError(
            f"chunk_size = {config.chunk_size} is more than max_seq_length = {config.max_seq_length}",
            "Raise --max_seq_length, which the plan is made for.",
        )
    size = config.chunk_size or config.max_seq_length
    if config.stride is not None and config.stride >= size - 1:
        raise ConfigError(
            f"stride = {config.stride} leaves rows of {size} tokens nothing new", "Give a smaller stride."
        )


def _check_evaluation(config: TrainConfig) -> None:
    wants = {
        "early_stopping_patience": config.early_stopping_patience is not None,
        "load_best_model_at_end": config.load_best_model_at_end,
        f"eval_strategy = {config.evaluates!r}": config.evaluates != "no",
    }
    for name, wanted in wants.items():
        if wanted and not config.val_size:
            raise ConfigError(f"{name} needs rows that are held out", "Add --val_size 0.05, a share or a number.")
        if wanted and config.evaluates == "no":
            raise ConfigError(
                f"{name} needs evaluations during training", "Add --eval_steps N or --eval_strategy epoch."
            )
    if config.evaluates == "steps" and not config.eval_steps:
        raise ConfigError("eval_strategy = 'steps' needs eval_steps", "Say after how many steps, e.g. --eval_steps 50.")
    if config.evaluates != "steps" and config.eval_steps:
        raise ConfigError(
            f"eval_steps = {config.eval_steps} has no effect with eval_strategy = {config.evaluates!r}",
            "Keep one of them.",
        )
    if config.saves == "best" and config.evaluates == "no":
        raise ConfigError("save_strategy = 'best' needs evaluations", "Add --val_size and --eval_steps N.")
    if config.early_stopping_threshold and config.early_stopping_patience is None:
        raise ConfigError("early_stopping_threshold alone stops nothing", "Add --early_stopping_patience N.")
    if config.load_best_model_at_end and config.saves != "best":
        in_step = config.saves == config.evaluates and (
            config.saves == "epoch" or config.save_steps == config.eval_steps
        )
        if not in_step:
            raise ConfigError(
                f"load_best_model_at_end finds no checkpoint of each evaluation: save_strategy is {config.saves!r} "
                f"({config.save_steps} steps), eval_strategy {config.evaluates!r} ({config.eval_steps} steps)",
                "Leave --save_strategy and --save_steps out: the best is then saved when it comes.",
            )


def _check_export(config: TrainConfig) -> None:
    for name in ("push_model", "push_gguf"):
        if getattr(config, name) and config.hub_path is None:
            raise ConfigError(f"{name} needs the repository to push to", "Add --hub_path NAME/MODEL.")
    if config.hub_path is not None and not (config.push_model or config.push_gguf):
        raise ConfigError(f"hub_path = {config.hub_path!r}, and nothing is to be pushed", "Add --push_model.")
    exports = config.save_model or config.save_gguf or config.push_model or config.push_gguf
    if config.save_path is not None and not exports:
        raise ConfigError(f"save_path = {config.save_path!r}, and nothing is exported", "Add --save_model.")
    if exports and config.save_method == "lora" and config.full_finetuning:
        raise ConfigError("save_method = 'lora': full_finetuning leaves no adapter", "Use --save_method merged_16bit.")
