"""Where the effect of each option is tested; each option printed and read back; what a plan makes of options."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

import parallel_tune
from parallel_tune.cli import program
from parallel_tune.config import TrainConfig

TESTS = Path(__file__).parents[1]

EFFECTS = {
    "model": "test_equivalence.py::test_losses_are_the_references",
    "max_seq_length": "test_data_encoding.py::test_long_rows_are_cut_and_those_left_without_answer_dropped",
    "dtype": "test_option_values.py::test_the_dtype_under_each_of_its_names",
    "bf16": "test_option_values.py::test_the_dtype_under_each_of_its_names",
    "fp16": "test_option_values.py::test_the_dtype_under_each_of_its_names",
    "load_in_4bit": "test_nf4.py::test_nf4_trains_alike_under_both_strategies",
    "full_finetuning": "test_equivalence.py::test_all_weights_of_a_tied_model_train_alike_in_a_split",
    "engine": "test_unsloth_cpu.py::test_unsloth_trains_as_transformers_does",
    "attn_implementation": "test_option_values.py::test_attention_is_the_one_that_was_named",
    "r": "test_options.py::test_adapter_options_are_in_the_adapter",
    "lora_alpha": "test_options.py::test_adapter_options_are_in_the_adapter",
    "lora_dropout": "test_options.py::test_adapter_options_are_in_the_adapter",
    "bias": "test_options.py::test_dora_and_biases_train_alike_in_replicas_and_in_lanes",
    "target_modules": "test_options.py::test_the_named_modules_are_adapted",
    "use_rslora": "test_options.py::test_adapter_options_are_in_the_adapter",
    "use_dora": "test_options.py::test_dora_and_biases_train_alike_in_replicas_and_in_lanes",
    "loftq_config": "test_nf4.py::test_a_merged_model_is_not_corrected_twice",
    "random_state": "test_options.py::test_without_clipping_nothing_stops_sgd_and_with_it_nothing_moves",
    "dataset": "test_data_encoding.py::test_a_file_to_labels",
    "dataset_split": "test_option_values.py::test_the_named_split_and_configuration_are_read",
    "dataset_config": "test_option_values.py::test_the_named_split_and_configuration_are_read",
    "raw_text_file": "test_options.py::test_raw_text_becomes_overlapping_rows",
    "chunk_size": "test_options.py::test_raw_text_becomes_overlapping_rows",
    "stride": "test_options.py::test_raw_text_becomes_overlapping_rows",
    "answers_only": "test_equivalence.py::test_losses_are_the_references",
    "val_size": "test_options.py::test_raw_text_becomes_overlapping_rows",
    "max_rows": "test_options.py::test_raw_text_becomes_overlapping_rows",
    "padding_free": "test_equivalence.py::test_losses_are_the_references",
    "packing": "test_packing.py::test_steps_and_batches_count_sequences",
    "data_cache": "test_kept_rows.py::test_it_can_be_switched_off",
    "global_batch_size": "test_equivalence.py::test_losses_are_the_references",
    "per_device_train_batch_size": "test_option_effects.py::test_the_plan_obeys",
    "gradient_accumulation_steps": "test_option_effects.py::test_the_plan_obeys",
    "use_gradient_checkpointing": "test_option_effects.py::test_the_plan_obeys",
    "num_train_epochs": "test_options.py::test_raw_text_becomes_overlapping_rows",
    "max_steps": "test_options.py::test_without_clipping_nothing_stops_sgd_and_with_it_nothing_moves",
    "learning_rate": "test_options.py::test_the_learning_rate_follows_its_schedule",
    "lr_scheduler_type": "test_options.py::test_the_learning_rate_follows_its_schedule",
    "lr_scheduler_kwargs": "test_options.py::test_the_learning_rate_follows_its_schedule",
    "warmup_steps": "test_equivalence.py::test_losses_are_the_references",
    "warmup_ratio": "test_options.py::test_the_learning_rate_follows_its_schedule",
    "weight_decay": "test_options.py::test_adamw_has_its_settings",
    "adam_beta1": "test_options.py::test_adamw_has_its_settings",
    "adam_beta2": "test_options.py::test_adamw_has_its_settings",
    "adam_epsilon": "test_options.py::test_adamw_has_its_settings",
    "max_grad_norm": "test_options.py::test_without_clipping_nothing_stops_sgd_and_with_it_nothing_moves",
    "optim": "test_options.py::test_without_clipping_nothing_stops_sgd_and_with_it_nothing_moves",
    "seed": "test_options.py::test_without_clipping_nothing_stops_sgd_and_with_it_nothing_moves",
    "trace": "test_trace_option.py::test_an_unknown_architecture_is_planned_by_its_trace",
    "cross_entropy": "test_option_effects.py::test_the_loss_path_is_the_one_that_is_counted",
    "eval_strategy": "test_options.py::test_checkpoints_and_evaluations_come_with_the_epochs",
    "eval_steps": "test_early_stopping.py::test_a_resumed_run_goes_on_counting",
    "per_device_eval_batch_size": "test_option_values.py::test_evaluation_takes_as_many_rows_at_once_as_it_is_told",
    "early_stopping_patience": "test_early_stopping.py::test_a_resumed_run_goes_on_counting",
    "early_stopping_threshold": "test_early_stopping.py::test_progress_below_the_threshold_is_none",
    "load_best_model_at_end": "test_early_stopping.py::test_the_best_of_all_weights_are_kept_too",
    "metric_for_best_model": "test_option_values.py::test_other_words_for_the_same",
    "output_dir": "test_export_after.py::test_the_merged_model_lies_in_the_run",
    "run_name": "test_options.py::test_trackers_know_the_run_by_its_name",
    "logging_steps": "test_options.py::test_the_learning_rate_follows_its_schedule",
    "save_strategy": "test_options.py::test_checkpoints_and_evaluations_come_with_the_epochs",
    "save_steps": "test_options.py::test_without_clipping_nothing_stops_sgd_and_with_it_nothing_moves",
    "save_total_limit": "test_options.py::test_checkpoints_and_evaluations_come_with_the_epochs",
    "report_to": "test_options.py::test_trackers_know_the_run_by_its_name",
    "save_model": "test_export_after.py::test_the_merged_model_lies_in_the_run",
    "save_method": "test_export_after.py::test_what_is_exported",
    "save_gguf": "test_export_after.py::test_gguf_files_of_several_types_under_a_launcher",
    "save_path": "test_export_after.py::test_gguf_files_of_several_types_under_a_launcher",
    "quantization": "test_export_after.py::test_gguf_files_of_several_types_under_a_launcher",
    "push_model": "test_export_after.py::test_a_failed_push_leaves_export_and_adapter_and_the_token_is_nowhere",
    "push_gguf": "test_export_after.py::test_what_is_exported",
    "hub_path": "test_export_after.py::test_a_failed_push_leaves_export_and_adapter_and_the_token_is_nowhere",
    "hub_token": "test_export.py::test_a_push_sends_the_folder_with_the_token",
    "strategy": "test_option_effects.py::test_the_plan_obeys",
    "hardware": "test_option_effects.py::test_the_plan_obeys",
    "max_devices": "test_option_effects.py::test_the_plan_obeys",
    "device_map": "test_option_effects.py::test_the_plan_obeys",
    "capture": "test_option_effects.py::test_the_plan_obeys",
    "torch_compile": "test_compiled_layers.py::test_a_plan_says_that_layers_are_compiled",
    "pipeline": "test_option_effects.py::test_the_plan_obeys",
    "lanes": "test_option_effects.py::test_the_plan_obeys",
    "stages": "test_option_effects.py::test_the_plan_obeys",
    "ddp_timeout": "test_option_values.py::test_a_rank_that_waits_gives_up_after_ddp_timeout",
    "ddp_reduce_dtype": "test_ddp_settings.py::test_gradients_of_captured_steps_are_summed_in_the_dtype_asked_for",
    "profile_steps": "test_profiling.py::test_steady_steps_are_traced_on_each_rank_and_change_nothing",
}
"""Option -> the test that sees what it does."""


def test_every_option_has_a_test_of_its_effect() -> None:
    assert set(EFFECTS) == {item.name for item in dataclasses.fields(TrainConfig)}
    found: dict[str, set[str]] = {}
    for path in TESTS.rglob("test_*.py"):
        nodes = ast.parse(path.read_text(encoding="utf-8")).body
        found[path.name] = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    missing = [test for test in EFFECTS.values() if test.partition("::")[2] not in found[test.partition("::")[0]]]
    assert missing == []


HELD_OUT = ("--val_size=9", "--eval_steps=3")
PUSHED = ("--push_model", "--hub_path=me/it")
EXAMPLES: dict[str, tuple[str, ...]] = {
    "model": ("--model=me/it",), "max_seq_length": ("--max-seq-length=77",), "dtype": ("--dtype=float16",),
    "bf16": ("--bf16",), "fp16": ("--fp16",), "load_in_4bit": ("--load-in-4bit",),
    "full_finetuning": ("--full_finetuning",), "engine": ("--engine=transformers",),
    "attn_implementation": ("--attn-implementation=eager",), "r": ("--r=3",), "lora_alpha": ("--lora_alpha=7",),
    "lora_dropout": ("--lora-dropout=0.1",), "bias": ("--bias=all",), "target_modules": ("--target_modules", "a", "b"),
    "use_rslora": ("--use_rslora",), "use_dora": ("--use-dora",),
    "loftq_config": ("--load_in_4bit", "--loftq_config={}"), "random_state": ("--random_state=1",),
    "dataset": ("--dataset=rows.jsonl",), "dataset_split": ("--dataset_split=test",),
    "dataset_config": ("--dataset_config=fine",), "raw_text_file": ("--raw_text_file=a.txt",),
    "chunk_size": ("--raw_text_file=a.txt", "--chunk_size=64"), "stride": ("--raw_text_file=a.txt", "--stride=8"),
    "answers_only": ("--train_on_completions",), "val_size": ("--val_size=0.1",), "max_rows": ("--max_samples=9",),
    "padding_free": ("--padding_free=off",), "packing": ("--packing",), "data_cache": ("--no_data_cache",),
    "global_batch_size": ("--global_batch_size=12",), "per_device_train_batch_size": ("--batch-size=3",),
    "gradient_accumulation_steps": ("--gradient_accumulation_steps=5",),
    "use_gradient_checkpointing": ("--gradient_checkpointing=true",), "num_train_epochs": ("--num_epochs=2.5",),
    "max_steps": ("--max_steps=11",), "learning_rate": ("--learning_rate=3e-5",),
    "lr_scheduler_type": ("--lr_scheduler_type=cosine",),
    "lr_scheduler_kwargs": ('--lr_scheduler_kwargs={"min_lr": 1e-6}',), "warmup_steps": ("--warmup_steps=0.1",),
    "warmup_ratio": ("--warmup_ratio=0.03",), "weight_decay": ("--weight_decay=0",),
    "adam_beta1": ("--adam_beta1=0.8",), "adam_beta2": ("--adam_beta2=0.95",), "adam_epsilon": ("--adam_epsilon=1e-6",),
    "max_grad_norm": ("--max_grad_norm=0.3",), "optim": ("--optim=adamw_8bit",), "seed": ("--seed=5",),
    "trace": ("--trace",), "cross_entropy": ("--cross_entropy=plain",),
    "eval_strategy": ("--val_size=9", "--eval_strategy=epoch"), "eval_steps": HELD_OUT,
    "per_device_eval_batch_size": ("--per_device_eval_batch_size=2",),
    "early_stopping_patience": (*HELD_OUT, "--early_stopping_steps=2"),
    "early_stopping_threshold": (*HELD_OUT, "--early_stopping_patience=2", "--early_stopping_threshold=0.01"),
    "load_best_model_at_end": (*HELD_OUT, "--load_best_model_at_end", "True"),
    "metric_for_best_model": ("--metric_for_best_model=loss",), "output_dir": ("--output_dir=out",),
    "run_name": ("--run_name=no",), "logging_steps": ("--logging_steps=10",), "save_strategy": ("--save_strategy=no",),
    "save_steps": ("--save_steps=50",), "save_total_limit": ("--save_total_limit=2",),
    "report_to": ("--report_to", "wandb", "mlflow"), "save_model": ("--save_model",),
    "save_method": ("--save_model", "--save_method=lora"), "save_gguf": ("--save_gguf",),
    "save_path": ("--save_model", "--save_path=model"), "quantization": ("--quantization", "f16", "q4_k_m"),
    "push_model": PUSHED, "push_gguf": ("--push_gguf", "--hub_path=me/it"), "hub_path": PUSHED,
    "hub_token": (*PUSHED, "--hub_token=hf_secret"), "strategy": ("--strategy=ddp",), "hardware": ("--hardware=cpu:2",),
    "max_devices": ("--max_devices=1",), "device_map": ("--device_map=balanced",), "capture": ("--capture=off",),
    "torch_compile": ("--torch_compile",),
    "pipeline": ("--pipeline=off",), "lanes": ("--lanes=3",), "stages": ("--stages=4",),
    "ddp_timeout": ("--ddp_timeout=60",), "ddp_reduce_dtype": ("--ddp_reduce_dtype=bf16",),
    "profile_steps": ("--profile_steps=2",),
}  # fmt: skip


@pytest.mark.parametrize("name", [item.name for item in dataclasses.fields(TrainConfig)])
def test_what_is_printed_is_taken_back_as_it_was(name: str, tmp_path: Path) -> None:
    printed = CliRunner().invoke(program, ["--print-config", *EXAMPLES[name]])
    assert printed.exit_code == 0, printed.output
    settings = yaml.safe_load(printed.output)
    defaults = yaml.safe_load(TrainConfig().to_yaml())
    only_value = name == "metric_for_best_model"
    assert name == "hub_token" or only_value or settings[name] != defaults[name]
    assert "hf_secret" not in printed.output
    recipe = tmp_path / "printed.yaml"
    recipe.write_text(printed.output)
    again = CliRunner().invoke(program, ["train", "--config", str(recipe), "--print_config"])
    assert (again.exit_code, again.output) == (0, printed.output)


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ({"strategy": "model_parallel"}, "strategy", "model_parallel"),
        ({"hardware": "4xA100-40GB"}, "processes", 4),
        ({"max_devices": 1}, "processes", 1),
        ({"per_device_train_batch_size": 3}, "micro_batch", 3),
        ({"gradient_accumulation_steps": 5}, "gradient_accumulation_steps", 5),
        ({"global_batch_size": 6}, "global_batch", 6),
        ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5}, "global_batch", 30),
        ({"use_gradient_checkpointing": "full"}, "gradient_checkpointing", "full"),
        ({"use_gradient_checkpointing": "none"}, "gradient_checkpointing", "none"),
        ({"use_gradient_checkpointing": "unsloth"}, "gradient_checkpointing", "unsloth"),
        ({"engine": "transformers"}, "engine", "transformers"),
        ({"capture": "off"}, "captured", False),
        ({"device_map": "balanced"}, "strategy", "model_parallel"),
        ({"strategy": "model_parallel", "stages": 4}, "stage_devices", [0, 0, 1, 1]),
        ({"strategy": "model_parallel", "pipeline": "off"}, "lanes", 1),
        ({"strategy": "model_parallel", "lanes": 3, "gradient_accumulation_steps": 6}, "lanes", 3),
    ],
)
def test_the_plan_obeys(options: dict[str, Any], name: str, value: Any) -> None:
    plan = parallel_tune.plan(**({"model": "unsloth/Llama-3.2-1B-Instruct", "hardware": "2xH100-80GB"} | options))
    assert plan.fits
    said = json.loads(plan.to_json()) | {"stage_devices": [device.index for device in plan.devices]}
    assert said[name] == value


def test_the_loss_path_is_the_one_that_is_counted() -> None:
    def peak(path: str) -> int:
        plan = parallel_tune.plan(
            model="unsloth/Llama-3.2-1B-Instruct", hardware="1xH100-80GB", cross_entropy=path, engine="unsloth",
            per_device_train_batch_size=4, max_seq_length=8192, capture="off", use_gradient_checkpointing="full",
        )  # fmt: skip
        return plan.devices[0].predicted_allocated_bytes

    assert peak("fused") < peak("plain") / 1.5
