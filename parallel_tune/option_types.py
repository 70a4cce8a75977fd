"""The options of `tune()` and `plan()`, for type checkers and editors.

Made by `python tests/option_types.py` from TrainConfig, whose values they become; a test keeps it true. What they do
stands in examples/OPTIONS.md. Names that other tools use are taken as well, unchecked: tune(**{"lora_rank": 8}).
"""

from __future__ import annotations

from os import PathLike
from typing import Any, Literal, TypedDict


class Options(TypedDict, total=False):
    """Settings under their command-line names; what is left out has the default or is planned."""

    max_seq_length: int
    dtype: Literal["auto", "bfloat16", "float16", "float32"]
    bf16: bool
    fp16: bool
    load_in_4bit: bool
    full_finetuning: bool
    engine: Literal["auto", "unsloth", "transformers"]
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"]
    r: int
    lora_alpha: int
    lora_dropout: float
    bias: Literal["none", "all", "lora_only"]
    target_modules: str | list[str]
    use_rslora: bool
    use_dora: bool
    loftq_config: dict[str, Any] | None
    random_state: int
    dataset_split: str
    dataset_config: str | None
    raw_text_file: str | PathLike[str] | None
    chunk_size: int | None
    stride: int | None
    answers_only: bool
    val_size: float
    max_rows: int | None
    padding_free: Literal["auto", "on", "off"]
    packing: bool
    data_cache: bool
    global_batch_size: int | None
    per_device_train_batch_size: int | None
    gradient_accumulation_steps: int | None
    use_gradient_checkpointing: Literal["auto", "none", "full", "unsloth"] | bool
    num_train_epochs: float
    max_steps: int
    learning_rate: float
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
    ]
    lr_scheduler_kwargs: dict[str, Any] | None
    warmup_steps: float
    warmup_ratio: float | None
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    optim: str
    seed: int
    trace: bool
    cross_entropy: Literal["auto", "plain", "fused"]
    eval_strategy: Literal["no", "steps", "epoch"] | bool | None
    eval_steps: float
    per_device_eval_batch_size: int
    early_stopping_patience: int | None
    early_stopping_threshold: float
    load_best_model_at_end: bool
    metric_for_best_model: Literal["eval_loss"]
    output_dir: str | PathLike[str] | None
    run_name: str | None
    logging_steps: float
    save_strategy: Literal["no", "steps", "epoch", "best"] | bool | None
    save_steps: float
    save_total_limit: int | None
    report_to: str | list[str]
    save_model: bool
    save_method: Literal["merged_16bit", "merged_4bit", "lora"]
    save_gguf: bool
    save_path: str | PathLike[str] | None
    quantization: str | list[str]
    push_model: bool
    push_gguf: bool
    hub_path: str | None
    hub_token: str | None
    hardware: str | None
    max_devices: int | None
    device_map: str | PathLike[str] | None
    capture: Literal["auto", "on", "off"]
    torch_compile: bool
    pipeline: Literal["auto", "on", "off"] | bool
    lanes: int | None
    stages: int | None
    profile_steps: int
    ddp_reduce_dtype: Literal["float32", "bfloat16"]
    ddp_timeout: int
