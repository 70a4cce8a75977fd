"""What is trained and how: one validated value, filled from defaults, then a YAML file, then the command line."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from parallel_tune import trackers
from strategies.errors import ConfigError

DEFAULT_MODEL = "unsloth/Llama-3.2-1B-Instruct"
DEFAULT_DATASET = "yahma/alpaca-cleaned"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def option(
    default: Any,
    group: str,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
    basic: bool = False,
) -> Any:
    """A dataclass field that is also a command-line option of the same name."""
    metadata = {"group": group, "help": text, "choices": choices, "aliases": aliases, "basic": basic}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run under its command-line name; None means that the plan or the data decides."""

    # fmt: off
    model: str = option(DEFAULT_MODEL, "Model", "Hub id or local folder.", aliases=("model_name",), basic=True)
    max_seq_length: int = option(2048, "Model", "Tokens a row may have; longer rows are cut.", basic=True)
    dtype: str = option("auto", "Model", "Compute dtype; auto is bfloat16 where the card has it, else float16; float32 on a CPU.", choices=("auto", "bfloat16", "float16", "float32"))
    load_in_4bit: bool = option(False, "Model", "Hold the frozen weights in 4-bit nf4 (QLoRA).", basic=True)
    full_finetuning: bool = option(False, "Model", "Train all weights instead of adapters.", basic=True)
    engine: str = option("auto", "Model", "Who loads the model; auto is unsloth where it imports and a GPU is there.", choices=("auto", "unsloth", "transformers"))
    attn_implementation: str = option("sdpa", "Model", "Attention of the transformers engine.", choices=("sdpa", "eager", "flash_attention_2"))

    r: int = option(16, "Adapter", "LoRA rank.", aliases=("lora_r",), basic=True)
    lora_alpha: int = option(16, "Adapter", "LoRA scale: the update is multiplied by alpha / r.")
    lora_dropout: float = option(0.0, "Adapter", "Dropout on the adapters' input.")
    bias: str = option("none", "Adapter", "Which biases train.", choices=("none", "all", "lora_only"))
    target_modules: list[str] = option(list(LORA_TARGETS), "Adapter", "Linear layers that get an adapter, comma-separated.")
    use_rslora: bool = option(False, "Adapter", "Scale by alpha / sqrt(r) instead.")
    random_state: int = option(3407, "Adapter", "Seed of the adapters' first weights.")

    dataset: str = option(DEFAULT_DATASET, "Data", "Hub id, or a JSON, JSONL, CSV or Parquet file, or a folder of them.", basic=True)
    dataset_split: str = option("train", "Data", "Split of a Hub dataset.")
    answers_only: bool = option(False, "Data", "Learn from the answers only; prompts carry no loss.", aliases=("train_on_responses_only",), basic=True)
    val_size: float = option(0.0, "Data", "Rows held out for evaluation: a share below 1, or a number of rows.")
    max_rows: int | None = option(None, "Data", "Use only the first rows of the dataset.")
    padding_free: str = option("auto", "Data", "Join the rows of a micro-batch instead of padding them; auto where attention can keep to each row.", choices=("auto", "on", "off"))
    capture: str = option("auto", "Hardware", "Record a step once as a CUDA graph and replay it, under ddp: short micro-batches then no longer wait for the host.", choices=("auto", "on", "off"))
    packing: bool = option(False, "Data", "Fill sequences of max_seq_length with rows, best fit first; batch sizes then count sequences.")

    global_batch_size: int | None = option(None, "Training", "Samples per optimizer step over all devices, kept for any strategy.", basic=True)
    per_device_train_batch_size: int | None = option(None, "Training", "Rows of one forward pass on one device; planned if left out (2 for the product).", basic=True)
    gradient_accumulation_steps: int | None = option(None, "Training", "Forward passes per optimizer step; planned if left out (4 for the product).", basic=True)
    per_device_eval_batch_size: int = option(4, "Training", "Rows of one evaluation pass.")
    use_gradient_checkpointing: str = option("auto", "Training", "Recompute activations in backward; auto only where memory asks for it.", choices=("auto", "none", "full", "unsloth"), aliases=("gradient_checkpointing",))
    num_train_epochs: float = option(1.0, "Training", "Passes over the data.", basic=True)
    max_steps: int = option(-1, "Training", "Optimizer steps; overrides the epochs if positive.", basic=True)
    learning_rate: float = option(2e-4, "Training", "Peak learning rate.", basic=True)
    lr_scheduler_type: str = option("linear", "Training", "Learning-rate schedule, by its transformers name.")
    warmup_steps: int = option(5, "Training", "Steps of linear warm-up.")
    weight_decay: float = option(0.01, "Training", "AdamW weight decay.")
    max_grad_norm: float = option(1.0, "Training", "Gradient clipping.")
    optim: str = option("adamw_torch", "Training", "Optimizer, by its transformers name (adamw_8bit needs bitsandbytes).")
    seed: int = option(3407, "Training", "Seed of the data order and of dropout.")
    trace: bool = option(False, "Training", "Count memory by running the model's own code on tensors without bytes: for an architecture that the closed form does not know, or to check it on one that it does.")
    cross_entropy: str = option("auto", "Training", "Loss path that the memory estimate counts.", choices=("auto", "plain", "fused"))

    output_dir: str | None = option(None, "Output", "Run directory; a new one under outputs/ if left out.", basic=True)
    run_name: str | None = option(None, "Output", "Name of the run for trackers.")
    logging_steps: int = option(1, "Output", "A row of metrics every so many steps.")
    save_steps: int = option(0, "Output", "A checkpoint every so many steps; 0 saves only the result.")
    save_total_limit: int | None = option(None, "Output", "Checkpoints to keep.")
    eval_steps: int = option(0, "Output", "Evaluate every so many steps; 0 is before and after.")
    report_to: list[str] = option([trackers.AUTO], "Output", "Trackers, by their transformers names, comma-separated; auto is TensorBoard where it is installed; or none.")

    strategy: str = option("auto", "Hardware", "ddp, model_parallel, an installed one, or auto.", basic=True)
    hardware: str | None = option(None, "Hardware", "Declare devices instead of probing: 2xH100-80GB, 1xA100-40GB+1xT4-16GB, cpu:2.", basic=True)
    device_map: str | None = option(None, "Hardware", "Ask for a split: balanced, auto, or a JSON file of module -> device.")
    pipeline: str = option("auto", "Hardware", "Keep all devices of a split busy, or run them in turn; on does it on virtual devices too.", choices=("auto", "on", "off"))
    lanes: int | None = option(None, "Hardware", "Micro-batches in flight at once in a split; as many as stages if left out.")
    stages: int | None = option(None, "Hardware", "Split the model into so many parts; more than devices share them, to try a split out.")
    ddp_timeout: int = option(1800, "Hardware", "Seconds before a collective that waits gives up.")
    # fmt: on

    def replace(self, **changes: Any) -> TrainConfig:
        """A validated copy with some settings changed."""
        return validate(dataclasses.replace(self, **changes))

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def fields_by_name() -> dict[str, dataclasses.Field[Any]]:
    """Fields under every name that may be used for them, aliases included."""
    names: dict[str, dataclasses.Field[Any]] = {}
    for item in dataclasses.fields(TrainConfig):
        for name in (item.name, *item.metadata["aliases"]):
            names[name] = item
    return names


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a recipe, not yet validated.

    Raises:
        ConfigError: the file cannot be read or is not a mapping.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}", "Give an existing YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}", "Write one `option: value` a line.") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds a {type(loaded).__name__}, not a mapping", "Write one `option: value` a line.")
    return loaded


def make_config(*sources: Mapping[str, Any]) -> TrainConfig:
    """Merge sources, later ones winning, and validate.

    Raises:
        ConfigError: an unknown key (with a near match), a value of a wrong type or out of range.
    """
    known = fields_by_name()
    hints = get_type_hints(TrainConfig)
    values: dict[str, Any] = {}
    for source in sources:
        seen: dict[str, str] = {}
        for key, value in source.items():
            name = str(key).replace("-", "_")
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean {near[0]}?" if near else "parallel-tune --help-all lists the options."
                raise ConfigError(f"unknown option {key!r}", hint)
            target = known[name].name
            if target in seen:
                raise ConfigError(f"{seen[target]!r} and {key!r} are the same option", "Keep one of them.")
            seen[target] = str(key)
            values[target] = _coerce(target, value, hints[target])
    return validate(TrainConfig(**values))


def _coerce(name: str, value: Any, hint: Any) -> Any:
    allowed = get_args(hint) or (hint,)
    if value is None:
        if type(None) in allowed:
            return None
        raise ConfigError(f"{name} has no value", "Give one or leave the option out.")
    if hint == list[str]:
        if isinstance(value, str):
            return [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
            return list(value)
        raise ConfigError(f"{name} = {value!r} is not a list of names", "Write them comma-separated.")
    wanted = next(kind for kind in allowed if kind is not type(None))
    if wanted is bool and isinstance(value, bool):
        return value
    if wanted is str and isinstance(value, str):
        return value
    if wanted in (int, float) and not isinstance(value, bool):
        # YAML 1.1 reads 2e-4 as a string, so numbers may arrive as text.
        try:
            number = float(value)
            if wanted is float and math.isfinite(number):
                return number
            if wanted is int and number == int(number):
                return int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    raise ConfigError(f"{name} = {value!r} is not of type {wanted.__name__}", f"Give {name} as {wanted.__name__}.")


_POSITIVE = [
    "max_seq_length",
    "r",
    "lora_alpha",
    "global_batch_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "per_device_eval_batch_size",
    "num_train_epochs",
    "logging_steps",
    "max_rows",
    "lanes",
    "stages",
    "ddp_timeout",
]
_NOT_NEGATIVE = [
    "lora_dropout",
    "val_size",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "save_steps",
    "eval_steps",
    "seed",
    "random_state",
]


def validate(config: TrainConfig) -> TrainConfig:
    """Return the config unchanged, or say what is wrong with it.

    Raises:
        ConfigError: a value out of range, or two settings that exclude each other.
    """
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        choices = item.metadata["choices"]
        if choices and value not in choices:
            raise ConfigError(f"{item.name} = {value!r} is not known", f"Choose from {', '.join(choices)}.")
        if value is not None and item.name in _POSITIVE and not value > 0:
            raise ConfigError(f"{item.name} = {value!r} must be above 0", f"Give {item.name} a positive number.")
        if value is not None and item.name in _NOT_NEGATIVE and not value >= 0:
            raise ConfigError(f"{item.name} = {value!r} must not be negative", f"Give {item.name} 0 or more.")
    if config.lora_dropout >= 1:
        raise ConfigError(f"lora_dropout = {config.lora_dropout} drops everything", "Give a share below 1.")
    if config.max_steps == 0 or config.max_steps < -1:
        raise ConfigError(f"max_steps = {config.max_steps} trains nothing", "Give a positive number, or leave it out.")
    if config.save_total_limit is not None and config.save_total_limit < 1:
        raise ConfigError(f"save_total_limit = {config.save_total_limit} would keep nothing", "Give 1 or more.")
    if config.full_finetuning and config.load_in_4bit:
        raise ConfigError(
            "full_finetuning and load_in_4bit exclude each other: 4-bit weights cannot be trained",
            "Drop one of them; QLoRA is load_in_4bit alone.",
        )
    if config.packing and config.padding_free == "off":
        raise ConfigError(
            "packing joins rows in one sequence, and padding_free = 'off' forbids that", "Drop one of the two."
        )
    trackers.check_names(config.report_to)
    if config.stages is not None and config.strategy == "ddp":
        raise ConfigError("stages divide one model, and ddp puts a whole one on each device", "Drop one of the two.")
    if not config.full_finetuning and not config.target_modules:
        raise ConfigError("target_modules is empty: nothing would train", "Name modules, or use --full_finetuning.")
    return config
