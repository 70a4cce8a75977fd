"""Options of other tools that are said in another way here, or not at all, with the reason."""

from __future__ import annotations

from strategies.errors import ConfigError

UNSLOTH_TRAIN_ELSEWISE = {
    "training_type": "--full_finetuning for full",
    "local_dataset": "--dataset FILE",
    "format_type": "told by the columns",
    "use_loftq": "--loftq_config '{}'",
    "enable_wandb": "--report_to wandb",
    "wandb_project": "WANDB_PROJECT",
    "wandb_token": "WANDB_API_KEY",
    "enable_tensorboard": "--report_to tensorboard",
    "tensorboard_dir": "RUN/tensorboard, or TENSORBOARD_LOGGING_DIR",
    "vision_all_linear": "text models only",
    "finetune_vision_layers": "text models only",
    "finetune_language_layers": "text models only",
    "finetune_attention_modules": "--target_modules",
    "finetune_mlp_modules": "--target_modules",
}

NOT_OFFERED = {
    "Follows from the plan or the strategy": (
        "use_cpu", "local_rank", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
        "ddp_static_graph", "ddp_backend", "fsdp", "fsdp_config", "deepspeed", "accelerator_config",
        "parallelism_config", "gradient_checkpointing_kwargs", "auto_find_batch_size", "average_tokens_across_devices",
        "torch_empty_cache_steps", "use_cache",
    ),
    "The sampler's: the same samples meet in the same step under any strategy": (
        "data_seed", "train_sampling_strategy", "length_column_name", "dataloader_drop_last", "remove_unused_columns",
        "label_names", "ignore_data_skip", "dataloader_num_workers", "dataloader_pin_memory",
        "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
        "dataloader_in_order",
    ),
    "One held-out loss, over all ranks, before and after in any case": (
        "eval_delay", "eval_on_start", "prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object",
        "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval",
        "greater_is_better",
    ),
    "A run keeps whole checkpoints, its own logs and its own verbs (`resume`, `plan`, `export`)": (
        "save_only_model", "save_on_each_node", "enable_jit_checkpoint", "restore_callback_states_from_checkpoint",
        "resume_from_checkpoint", "do_train", "do_eval", "do_predict", "logging_strategy", "logging_first_step",
        "log_on_each_node", "logging_nan_inf_filter", "include_num_input_tokens_seen", "log_level", "log_level_replica",
        "disable_tqdm", "skip_memory_metrics", "debug", "hub_private_repo", "hub_strategy", "hub_always_push",
        "hub_revision", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    ),
    "They change loss, kernels or optimizer unseen by the memory estimate: `launch` your own script for them": (
        "optim_args", "optim_target_modules", "label_smoothing_factor", "neftune_noise_alpha", "use_liger_kernel",
        "liger_kernel_config", "torch_compile_backend", "torch_compile_mode", "tf32",
        "full_determinism",
    ),
}  # fmt: skip

TRL_ELSEWISE = {
    "use_peft": "adapters are the default; --full_finetuning without",
    "dataset_test_split": "--val_size",
    "dataset_text_field": "a column `text`",
    "lora_modules_to_save": "not here",
}

LLAMA_FACTORY_ELSEWISE = {
    "finetuning_type": "`full`: --full_finetuning; `lora` is the default",
    "quantization_bit": "`4`: --load_in_4bit",
    "train_on_prompt": "`false`, its default: --answers_only",
    "flash_attn": "--attn_implementation",
    "disable_gradient_checkpointing": "--use_gradient_checkpointing none",
    "use_unsloth": "--engine unsloth",
    "template": "the tokenizer's own chat template",
    "stage": "`sft`; others by `launch`",
    "dataset_dir": "give the path as --dataset",
    "plot_loss": "always: report.html",
}


_TOOLS = {"unsloth train": UNSLOTH_TRAIN_ELSEWISE, "TRL": TRL_ELSEWISE, "LLaMA-Factory": LLAMA_FACTORY_ELSEWISE}


def refuse_foreign(name: str) -> None:
    """Say how another tool's option is said here.

    Raises:
        ConfigError: it is one.
    """
    for tool, names in _TOOLS.items():
        if name in names:
            raise ConfigError(f"{name!r} is {tool}'s, and no option here", f"Here: {names[name]}.")
    for reason, left_out in NOT_OFFERED.items():
        if name in left_out:
            raise ConfigError(f"{name!r} is TrainingArguments', and no option here", f"{reason}. Leave it out.")
