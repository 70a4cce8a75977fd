"""What is trained and how: one validated value, filled from defaults, then a YAML file, then the command line."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from parallel_tune import trackers, validation
from parallel_tune.elsewhere import refuse_foreign
from strategies.errors import ConfigError

DEFAULT_MODEL = "unsloth/Llama-3.2-1B-Instruct"
DEFAULT_DATASET = "yahma/alpaca-cleaned"
RAW_TEXT_ENDINGS = (".txt", ".md")
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
)  # fmt: skip
"""transformers' schedules that follow from the step alone; those that watch a metric would need it on every rank."""
HARDWARE = "Strategy and hardware"
PATHS = ("model", "dataset", "raw_text_file", "output_dir", "save_path")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def option(
    default: Any,
    group: str,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
    synonyms: Mapping[str, str] | None = None,
    basic: bool = False,
    secret: bool = False,
) -> Any:
    """A dataclass field that is also a command-line option of the same name.

    Args:
        aliases: other names that it is known under elsewhere.
        synonyms: other words for its values, in lower case.
        secret: never written to a file nor shown.
    """
    metadata = {
        "group": group,
        "help": text,
        "choices": choices,
        "aliases": aliases,
        "synonyms": synonyms or {},
        "basic": basic,
        "secret": secret,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata, repr=not secret)


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run under its command-line name; None means that the plan or the data decides."""

    # fmt: off
    model: str = option(DEFAULT_MODEL, "Model", "Hub id or local folder.", aliases=("model_name", "model_name_or_path"), basic=True)
    max_seq_length: int = option(2048, "Model", "Tokens a row may have; longer rows are cut.", aliases=("max_length", "cutoff_len"), basic=True)
    dtype: str = option("auto", "Model", "Compute dtype; auto is bfloat16 where the card has it, else float16; float32 on a CPU.", choices=("auto", "bfloat16", "float16", "float32"), synonyms={"none": "auto", "bf16": "bfloat16", "fp16": "float16"})
    bf16: bool = option(False, "Model", "The same as --dtype bfloat16.")
    fp16: bool = option(False, "Model", "The same as --dtype float16.")
    load_in_4bit: bool = option(False, "Model", "Hold the frozen weights in 4-bit nf4 (QLoRA).", basic=True)
    full_finetuning: bool = option(False, "Model", "Train all weights instead of adapters.", basic=True)
    engine: str = option("auto", "Model", "Who loads the model; auto is unsloth where it imports and a GPU is there.", choices=("auto", "unsloth", "transformers"))
    attn_implementation: str = option("sdpa", "Model", "Attention of the transformers engine.", choices=("sdpa", "eager", "flash_attention_2"))

    r: int = option(16, "Adapter", "LoRA rank.", aliases=("lora_r", "lora_rank"), basic=True)
    lora_alpha: int = option(16, "Adapter", "LoRA scale: the update is multiplied by alpha / r.")
    lora_dropout: float = option(0.0, "Adapter", "Dropout on the adapters' input.")
    bias: str = option("none", "Adapter", "Which biases train.", choices=("none", "all", "lora_only"))
    target_modules: list[str] = option(list(LORA_TARGETS), "Adapter", "Linear layers that get an adapter, comma-separated, or all-linear.", aliases=("lora_target_modules", "lora_target"), synonyms={"all": "all-linear"})
    use_rslora: bool = option(False, "Adapter", "Scale by alpha / sqrt(r) instead.")
    use_dora: bool = option(False, "Adapter", "Train the size of each weight row apart from its direction (DoRA); slower, and more memory.")
    loftq_config: dict[str, Any] | None = option(None, "Adapter", 'Begin with adapters that make up for the 4-bit rounding (LoftQ); they then belong on the 4-bit model. As JSON: {"loftq_bits": 4, "loftq_iter": 1}, or {}.')
    random_state: int = option(3407, "Adapter", "Seed of the adapters' first weights.")

    dataset: str = option(DEFAULT_DATASET, "Data", "Hub id, or a JSON, JSONL, CSV or Parquet file, or a folder of them; a .txt or .md file is raw text.", aliases=("dataset_name",), basic=True)
    dataset_split: str = option("train", "Data", "Split of a Hub dataset.", aliases=("dataset_train_split",))
    dataset_config: str | None = option(None, "Data", "Configuration of a Hub dataset that has several.")
    raw_text_file: str | None = option(None, "Data", "A text to learn as it is, in place of a dataset.")
    chunk_size: int | None = option(None, "Data", "Tokens of a row of raw text; max_seq_length if left out.")
    stride: int | None = option(None, "Data", "Tokens that a row of raw text repeats of the one before, as context; a quarter if left out.")
    answers_only: bool = option(False, "Data", "Learn from the answers only; prompts carry no loss.", aliases=("train_on_responses_only", "train_on_completions", "completion_only_loss", "assistant_only_loss"), basic=True)
    val_size: float = option(0.0, "Data", "Rows held out for evaluation: a share below 1, or a number of rows.")
    max_rows: int | None = option(None, "Data", "Use only the first rows of the dataset.", aliases=("max_samples",))
    padding_free: str = option("auto", "Data", "Join the rows of a micro-batch instead of padding them; auto where attention can keep to each row.", choices=("auto", "on", "off"))
    packing: bool = option(False, "Data", "Fill sequences of max_seq_length with rows, best fit first; batch sizes then count sequences.")
    data_cache: bool = option(True, "Data", "Keep encoded rows in the cache folder, so that a dataset is tokenised once on a machine.")

    global_batch_size: int | None = option(None, "Training", "Samples per optimizer step over all devices, kept for any strategy.", basic=True)
    per_device_train_batch_size: int | None = option(None, "Training", "Rows of one forward pass on one device; planned if left out (2 for the product).", aliases=("batch_size",), basic=True)
    gradient_accumulation_steps: int | None = option(None, "Training", "Forward passes per optimizer step; planned if left out (4 for the product).", basic=True)
    use_gradient_checkpointing: str = option("auto", "Training", "Recompute activations in backward; auto only where memory asks for it.", choices=("auto", "none", "full", "unsloth"), aliases=("gradient_checkpointing",), synonyms={"true": "full", "false": "none"})
    num_train_epochs: float = option(1.0, "Training", "Passes over the data.", aliases=("num_epochs",), basic=True)
    max_steps: int = option(-1, "Training", "Optimizer steps; overrides the epochs if positive.", basic=True)
    learning_rate: float = option(2e-4, "Training", "Peak learning rate.", basic=True)
    lr_scheduler_type: str = option("linear", "Training", "Learning-rate schedule, by its transformers name.", choices=SCHEDULES)
    lr_scheduler_kwargs: dict[str, Any] | None = option(None, "Training", 'What the schedule needs beside, as JSON: {"min_lr_rate": 0.1}.')
    warmup_steps: int | float = option(5, "Training", "Steps of linear warm-up; below 1 a share of all steps.")
    warmup_ratio: float | None = option(None, "Training", "Warm-up as a share of all steps; wins over warmup_steps.")
    weight_decay: float = option(0.01, "Training", "AdamW weight decay.")
    adam_beta1: float = option(0.9, "Training", "AdamW's first decay.")
    adam_beta2: float = option(0.999, "Training", "AdamW's second decay.")
    adam_epsilon: float = option(1e-8, "Training", "AdamW's smallest divisor.")
    max_grad_norm: float = option(1.0, "Training", "Gradient clipping; 0 clips nothing.")
    optim: str = option("adamw_torch_fused", "Training", "Optimizer, by its transformers name (adamw_8bit needs bitsandbytes).")
    seed: int = option(3407, "Training", "Seed of the data order and of dropout.", aliases=("random_seed",))
    trace: bool = option(False, "Training", "Count memory by running the model's own code on tensors without bytes: for an architecture that the closed form does not know, or to check it on one that it does.")
    cross_entropy: str = option("auto", "Training", "How the loss is computed, and counted in plans: plain makes all logits at once, fused no more than a chunk of them; auto is fused with Unsloth, plain with transformers.", choices=("auto", "plain", "fused"))

    eval_strategy: str | None = option(None, "Evaluation", "When to evaluate rows that --val_size holds out, beside before and after; steps where eval_steps is given.", choices=("no", "steps", "epoch"), synonyms={"false": "no"})
    eval_steps: int | float = option(0, "Evaluation", "Evaluate every so many steps; below 1 a share of all steps.")
    per_device_eval_batch_size: int = option(4, "Evaluation", "Rows of one evaluation pass, at most: it takes no more tokens at once than training does.")
    early_stopping_patience: int | None = option(None, "Evaluation", "Stop after so many evaluations without a better held-out loss.", aliases=("early_stopping_steps",))
    early_stopping_threshold: float = option(0.0, "Evaluation", "By how much the loss must fall to count as better.")
    load_best_model_at_end: bool = option(False, "Evaluation", "Keep the weights of the best evaluation, not the last ones.")
    metric_for_best_model: str = option("eval_loss", "Evaluation", "What the best is judged by: the held-out loss.", choices=("eval_loss",), synonyms={"loss": "eval_loss"})

    output_dir: str | None = option(None, "Output", "Run directory; a new one under outputs/ if left out.", basic=True)
    run_name: str | None = option(None, "Output", "Name of the run for trackers.")
    logging_steps: int | float = option(1, "Output", "A row of metrics every so many steps, below 1 a share of all steps; and at evaluations, checkpoints and the end.")
    save_strategy: str | None = option(None, "Output", "When to save checkpoints; steps where save_steps is given, best with load_best_model_at_end, else no.", choices=("no", "steps", "epoch", "best"), synonyms={"false": "no"})
    save_steps: int | float = option(0, "Output", "A checkpoint every so many steps, below 1 a share of all steps; 0 saves only the result.")
    save_total_limit: int | None = option(None, "Output", "Checkpoints to keep; the best one stays.")
    report_to: list[str] = option([trackers.AUTO], "Output", "Trackers, by their transformers names, comma-separated; auto is TensorBoard where it is installed; or all, or none.")

    save_model: bool = option(False, "Export", "Export the result by save_method when training is done; the adapter is saved in any case.")
    save_method: str = option("merged_16bit", "Export", "What save_model and push_model make of it.", choices=("merged_16bit", "merged_4bit", "lora"))
    save_gguf: bool = option(False, "Export", "Make it a GGUF file instead.")
    save_path: str | None = option(None, "Export", "Folder of the export; RUN/save_method or RUN/gguf if left out.", aliases=("export_dir",))
    quantization: list[str] = option(["q8_0"], "Export", "Types of the GGUF files, comma-separated: f16, bf16, q8_0, q4_k_m and so on, by llama.cpp's names.")
    push_model: bool = option(False, "Export", "Push the export to hub_path.", aliases=("push_to_hub",))
    push_gguf: bool = option(False, "Export", "Push it as GGUF.")
    hub_path: str | None = option(None, "Export", "Hub repository, e.g. me/my-model; made private if new.", aliases=("hub_model_id", "export_hub_model_id"))
    hub_token: str | None = option(None, "Export", "Token for the push, else HF_TOKEN or the stored login; kept out of every file.", aliases=("hf_token", "hf_hub_token"), secret=True)

    strategy: str = option("auto", HARDWARE, "ddp, model_parallel, an installed one, or auto.", basic=True)
    hardware: str | None = option(None, HARDWARE, "Declare devices instead of probing: 2xH100-80GB, 1xA100-40GB+1xT4-16GB, cpu:2.", basic=True)
    max_devices: int | None = option(None, HARDWARE, "Use no more devices than this: the largest and fastest ones.")
    device_map: str | None = option(None, HARDWARE, "Ask for a split: balanced, auto, or a JSON file of module -> device. Where layers lie is planned all the same.")
    capture: str = option("auto", HARDWARE, "Record a step once as CUDA graphs and replay it: short micro-batches then no longer wait for the host.", choices=("auto", "on", "off"))
    torch_compile: bool = option(False, HARDWARE, "Let torch.compile compile each layer for what is captured; faster, after a minute or so. Not with Unsloth.")
    pipeline: str = option("auto", HARDWARE, "Keep all devices of a split busy, or run them in turn; on does it on virtual devices too.", choices=("auto", "on", "off"), synonyms={"true": "on", "false": "off"})
    lanes: int | None = option(None, HARDWARE, "Micro-batches in flight at once in a split; as many as stages if left out.")
    stages: int | None = option(None, HARDWARE, "Split the model into so many parts; more than devices share them, to try a split out.")
    profile_steps: int = option(0, HARDWARE, "Trace so many steady steps with torch's profiler into RUN/profile; 0 traces none.")
    ddp_reduce_dtype: str = option("float32", HARDWARE, "In which ddp sends and sums gradients: bfloat16 halves what is sent, and rounds it.", choices=("float32", "bfloat16"), synonyms={"bf16": "bfloat16", "fp32": "float32"})
    ddp_timeout: int = option(1800, HARDWARE, "Seconds before a collective that waits gives up.")
    # fmt: on

    def replace(self, **changes: Any) -> TrainConfig:
        """A validated copy with some settings changed."""
        return validation.validate(dataclasses.replace(self, **changes))

    def to_yaml(self) -> str:
        """All settings as a recipe, secrets left out."""
        values = dataclasses.asdict(self)
        shown = {item.name: values[item.name] for item in dataclasses.fields(self) if not item.metadata["secret"]}
        return yaml.safe_dump(shown, sort_keys=False)

    @property
    def named_dtype(self) -> str:
        """The compute dtype that was asked for, under whichever name; "auto" if none was."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else self.dtype

    @property
    def warmup(self) -> int | float:
        """Warm-up steps, or below 1 their share of all steps."""
        return self.warmup_steps if self.warmup_ratio is None else self.warmup_ratio

    @property
    def evaluates(self) -> str:
        """When held-out rows are evaluated during training: no, steps or epoch."""
        return self.eval_strategy or ("steps" if self.eval_steps else "no")

    @property
    def saves(self) -> str:
        """When checkpoints are saved: no, steps, epoch or best."""
        if self.save_strategy is not None:
            return self.save_strategy
        return "steps" if self.save_steps else "best" if self.load_best_model_at_end else "no"

    @property
    def raw_text(self) -> str | None:
        """The text file that is learned as it is, if that is what the data are."""
        is_text = Path(self.dataset).suffix.lower() in RAW_TEXT_ENDINGS
        return self.raw_text_file or (self.dataset if is_text else None)

    @property
    def data_source(self) -> str:
        """The name of what is trained on."""
        return self.raw_text_file or self.dataset


def fields_by_name() -> dict[str, dataclasses.Field[Any]]:
    """Fields under every name that may be used for them, aliases included."""
    names: dict[str, dataclasses.Field[Any]] = {}
    for item in dataclasses.fields(TrainConfig):
        for name in (item.name, *item.metadata["aliases"]):
            names[name] = item
    return names


class _KeyTwice(Exception):
    """A mapping has a key twice."""


class _KeysOnce(yaml.SafeLoader):
    """YAML's safe reader, which would take the last of two equal keys without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            # Merged mappings (<<) may be many, and what they bring may be overwritten: that is what they are for.
            if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
                if key.value in seen:
                    raise _KeyTwice(f"line {key.start_mark.line + 1}: {key.value!r} is there twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a recipe, not yet validated.

    Raises:
        ConfigError: the file cannot be read or is not a mapping.
    """
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _KeysOnce)
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}", "Give an existing YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}", "Write one `option: value` a line.") from error
    except _KeyTwice as error:
        raise ConfigError(f"{path}, {error}", "Keep one of them.") from error
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
                refuse_foreign(name)
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean {near[0]}?" if near else "parallel-tune --help-all lists the options."
                raise ConfigError(f"unknown option {key!r}", hint)
            target = known[name].name
            if target in seen:
                raise ConfigError(f"{seen[target]!r} and {key!r} are the same option", "Keep one of them.")
            seen[target] = str(key)
            values[target] = _coerce(known[name], value, hints[target])
    return validation.validate(TrainConfig(**values))


def _coerce(item: dataclasses.Field[Any], value: Any, hint: Any) -> Any:
    name = item.name
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    synonyms = item.metadata["synonyms"]
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if name in PATHS and isinstance(value, str):
        value = _at_home(name, value)
    if type(None) in get_args(hint) and str not in kinds and str(value).lower() in ("none", "null"):
        return None
    if value is None and "none" not in synonyms:
        if type(None) in get_args(hint):
            return None
        raise ConfigError(f"{name} has no value", "Give one or leave the option out.")
    if hint == list[str]:
        return [synonyms.get(part.lower(), part) for part in _names(name, value)]
    if synonyms and isinstance(value, str | bool | None):
        value = synonyms.get(str(value).lower(), value)
    if bool in kinds and isinstance(value, bool):
        return value
    if str in kinds and isinstance(value, str):
        return value
    if get_origin(kinds[0]) is dict:
        return _mapping(name, value)
    # YAML 1.1 reads 2e-4 as a string, so numbers may arrive as text.
    if (int in kinds or float in kinds) and not isinstance(value, bool):
        try:
            number = float(value)
            if int in kinds and number == int(number):
                return int(number)
            if float in kinds and math.isfinite(number):
                return number
        except (TypeError, ValueError, OverflowError):
            pass
    wanted = " or ".join(kind.__name__ for kind in kinds)
    shown = "(hidden)" if item.metadata["secret"] else repr(value)
    raise ConfigError(f"{name} = {shown} is not of type {wanted}", f"Give {name} as {wanted}.")


def _at_home(name: str, path: str) -> str:
    """A path with ~ written out, which no shell does in a recipe, in Python or behind --output_dir=."""
    written = os.path.expanduser(path)  # noqa: PTH111 - pathlib's ends in a traceback where there is no such home
    if written.startswith("~"):
        raise ConfigError(f"{name} = {path!r}: there is no such home", f"A file of that name is ./{path}.")
    return written


def _names(name: str, value: Any) -> list[str]:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        return list(value)
    raise ConfigError(f"{name} = {value!r} is not a list of names", "Write them comma-separated.")


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ConfigError(f"{name} = {value!r} is not JSON: {error}", 'Write {"name": value}.') from error
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return value
    raise ConfigError(f"{name} = {value!r} is not a mapping", 'Write {"name": value}.')
