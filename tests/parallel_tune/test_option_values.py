"""What options mean where no run has to show it: in a plan, in a refusal, or in what a library is given."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import parallel_tune
from parallel_tune.config import SCHEDULES, TrainConfig, make_config
from parallel_tune.needs import check_needs
from parallel_tune.validation import NEEDED_BY_SCHEDULE
from strategies.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, "bfloat16"), ({"bf16": True}, "bfloat16"), ({"fp16": True}, "float16"), ({"dtype": "fp16"}, "float16"),
        ({"dtype": "None"}, "bfloat16"), ({"dtype": None}, "bfloat16"), ({"dtype": "float32"}, "float32"),
    ],
)  # fmt: skip
def test_the_dtype_under_each_of_its_names(options: dict[str, Any], dtype: str) -> None:
    assert parallel_tune.plan(model="unsloth/Llama-3.2-1B-Instruct", hardware="1xH100-80GB", **options).dtype == dtype


def test_unsloth_computes_in_bfloat16_only_where_the_card_has_it() -> None:
    """It goes on in float16 with a warning of its own, while the plan and the trainer speak of bfloat16."""
    model = "unsloth/Llama-3.2-1B-Instruct"
    with pytest.raises(ConfigError, match="T4-16GB has no bfloat16") as caught:
        parallel_tune.plan(model=model, hardware="2xT4-16GB", engine="unsloth", bf16=True)
    assert "float16" in caught.value.hint
    for hardware, options in (("2xT4-16GB", {"engine": "transformers"}), ("1xA100-40GB+1xT4-16GB", {"max_devices": 1})):
        made = parallel_tune.plan(model=model, hardware=hardware, dtype="bfloat16", **options)
        assert made.dtype == "bfloat16"


@pytest.mark.parametrize("name", ["schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd", "adafactor"])
def test_optimizers_that_are_not_planned_for_are_refused(name: str) -> None:
    """Schedule-free ones would have to be put into evaluation before each evaluation and checkpoint, which none is."""
    with pytest.raises(ConfigError, match=f"optimizer '{name}' is not known") as caught:
        parallel_tune.plan(model="unsloth/Llama-3.2-1B-Instruct", hardware="cpu:2", optim=name)
    assert "adamw_torch_fused" in caught.value.hint


@pytest.mark.parametrize("options", [{"fp16": True}, {"dtype": "float16", "full_finetuning": True}])
def test_float16_is_refused_on_a_cpu_where_no_loss_is_scaled(options: dict[str, Any]) -> None:
    model = "unsloth/Llama-3.2-1B-Instruct"
    with pytest.raises(ConfigError, match="the loss is not scaled there") as caught:
        parallel_tune.plan(model=model, hardware="cpu:2", **options)
    assert "bfloat16" in caught.value.hint
    assert parallel_tune.plan(model=model, hardware="cpu:2", bf16=True).dtype == "bfloat16"


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"bias": "all"}, {"r": 64}, {"lora_dropout": 0.1}, {"attn_implementation": "eager"}],
)
def test_what_costs_memory_is_in_the_plan(options: dict[str, Any]) -> None:
    def peak(**options: Any) -> int:
        plan = parallel_tune.plan(
            model="Qwen/Qwen2.5-7B", hardware="1xH100-80GB", engine="transformers", global_batch_size=1,
            use_gradient_checkpointing="none", **options,
        )  # fmt: skip
        return plan.devices[0].predicted_allocated_bytes

    assert peak(**options) > peak()


def test_dora_is_refused_where_peft_has_none() -> None:
    with pytest.raises(ConfigError, match="no DoRA for the experts"):
        parallel_tune.plan(
            model="mistralai/Mixtral-8x7B-v0.1", hardware="8xH100-80GB", use_dora=True, target_modules="all"
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout: peft has no dropout for the experts"),
        ({"use_rslora": True}, "use_rslora: peft scales"),
        ({"target_modules": "q_proj,gate_proj"}, "names gate_proj without up_proj"),
    ],
)
def test_what_peft_does_not_do_with_experts_is_refused(options: dict[str, Any], said: str) -> None:
    model = {"model": "Qwen/Qwen3-30B-A3B", "hardware": "8xH100-80GB"}
    with pytest.raises(ConfigError, match=said):
        parallel_tune.plan(**model, **options)
    assert parallel_tune.plan(**model, lora_dropout=0.1, use_rslora=True, target_modules="q_proj,v_proj")


def test_evaluation_takes_as_many_rows_at_once_as_it_is_told() -> None:
    import torch

    from parallel_tune.data import collate
    from parallel_tune.evaluation import held_out_loss
    from strategies.sessions import SplitSession

    class Model(torch.nn.Module):
        sizes: list[int] = []  # noqa: RUF012

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            self.sizes.append(len(input_ids))
            return type("Outputs", (), {"loss": torch.ones(())})

    session = type("Session", (SplitSession,), {"__init__": lambda self: None, "device": torch.device("cpu")})()
    rows = [{"input_ids": [1, 2], "labels": [-100, 2]}] * 7
    held_out_loss(Model(), rows, lambda batch: collate(batch, 0), 3, 100, session)
    assert Model.sizes == [3, 3, 1]
    Model.sizes.clear()
    held_out_loss(Model(), rows, lambda batch: collate(batch, 0), 3, 4, session)
    assert Model.sizes == [2, 2, 2, 1]  # no more tokens than a micro-batch of training has


def test_an_evaluation_pass_has_no_more_tokens_than_training() -> None:
    from parallel_tune.evaluation import passes

    lengths = [3, 9, 4, 30, 5]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    assert list(passes(order, lengths, 4, 12)) == [[0, 2], [4], [1], [3]]  # a row longer than that goes alone
    assert list(passes(order, lengths, 2, 1000)) == [[0, 2], [4, 1], [3]]
    assert list(passes([], [], 2, 1000)) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bf16": True, "fp16": True}, "exclude each other"),
        ({"bf16": True, "dtype": "float16"}, "contradict"),
        ({"full_finetuning": True, "use_dora": True}, "trains none"),
        ({"full_finetuning": True, "loftq_config": {}}, "trains none"),
        ({"full_finetuning": True, "save_model": True, "save_method": "lora"}, "no adapter"),
        ({"loftq_config": "{}"}, "not held in 4 bit"),
        ({"loftq_config": "{", "load_in_4bit": True}, "not JSON"),
        ({"loftq_config": "[4]", "load_in_4bit": True}, "not a mapping"),
        ({"loftq_config": {"loftq_bits": 2}, "load_in_4bit": True}, "loftq_bits = 2"),
        ({"loftq_config": {}, "load_in_4bit": True, "use_dora": True}, "different adapters"),
        ({"target_modules": "all,q_proj"}, "stands alone"),
        ({"early_stopping_patience": 2, "eval_steps": 5}, "held out"),
        ({"early_stopping_patience": 2, "val_size": 0.1}, "evaluations during training"),
        ({"early_stopping_threshold": 0.1}, "stops nothing"),
        ({"load_best_model_at_end": True}, "held out"),
        ({"load_best_model_at_end": True, "val_size": 4, "eval_steps": 5, "save_steps": 10}, "no checkpoint of"),
        ({"load_best_model_at_end": True, "val_size": 4, "eval_steps": 5, "save_strategy": "no"}, "no checkpoint of"),
        ({"eval_strategy": "steps", "val_size": 4}, "needs eval_steps"),
        ({"eval_strategy": "epoch", "val_size": 4, "eval_steps": 3}, "no effect"),
        ({"eval_strategy": "epoch"}, "held out"),
        ({"eval_steps": 3}, "held out"),
        ({"eval_steps": 2.5, "val_size": 4}, "neither whole nor a share"),
        ({"save_strategy": "steps"}, "needs save_steps"),
        ({"save_strategy": "no", "save_steps": 3}, "no effect"),
        ({"save_strategy": "best"}, "needs evaluations"),
        ({"warmup_ratio": 1.0}, "below 1"),
        ({"adam_beta2": 1.0}, "below 1"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "not known"),
        ({"raw_text_file": "a.txt", "dataset": "b.jsonl"}, "both to be learned"),
        ({"raw_text_file": "a.txt", "dataset_config": "fine"}, "dataset_config = 'fine'"),
        ({"dataset": "a.txt", "dataset_split": "train[:10%]"}, "one whole"),
        ({"raw_text_file": "a.txt", "answers_only": True}, "no answers"),
        ({"raw_text_file": "a.txt", "chunk_size": 4096}, "max_seq_length"),
        ({"dataset": "a.md", "chunk_size": 32, "stride": 31}, "nothing new"),
        ({"chunk_size": 32}, "none is given"),
        ({"push_model": True}, "the repository"),
        ({"hub_path": "me/it"}, "nothing is to be pushed"),
        ({"save_path": "out"}, "nothing is exported"),
        ({"hub_token": 5}, "hidden"),
        ({"report_to": "all,wandb"}, "stands alone"),
        ({"val_size": 1.5}, "val_size = 1.5 is neither whole nor a share"),
        ({"strategy": "ddp", "lanes": 4}, "ddp puts a whole one"),
        ({"strategy": "ddp", "pipeline": "on"}, "ddp puts a whole one"),
        ({"pipeline": "off", "lanes": 2}, "contradict"),
        ({"pipeline": "on", "lanes": 1}, "contradict"),
        ({"model": ""}, "model = '' names nothing"),
        ({"output_dir": ""}, "output_dir = '' names nothing"),
        ({"save_path": " ", "save_model": True}, "save_path = ' ' names nothing"),
        ({"strategy": ""}, "strategy = '' names nothing"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(options)
    assert said in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ({"gradient_checkpointing": True}, "use_gradient_checkpointing", "full"),
        ({"use_gradient_checkpointing": "False"}, "use_gradient_checkpointing", "none"),
        ({"eval_strategy": False}, "eval_strategy", "no"),  # YAML's reading of `no`
        ({"save_strategy": False}, "save_strategy", "no"),
        ({"pipeline": True}, "pipeline", "on"),
        ({"lora_target": "all"}, "target_modules", ["all-linear"]),
        ({"loftq_config": {"loftq_bits": 4}, "load_in_4bit": True}, "loftq_config", {"loftq_bits": 4}),
        ({"warmup_steps": 0.1}, "warmup", 0.1),
        ({"warmup_steps": "7"}, "warmup", 7),
        ({"warmup_ratio": 0.1, "warmup_steps": 9}, "warmup", 0.1),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model", "eval_loss"),
        ({"val_size": 3, "eval_steps": 2, "load_best_model_at_end": True}, "saves", "best"),
        ({"val_size": 3, "eval_steps": 0.1, "load_best_model_at_end": True, "save_steps": 0.1}, "saves", "steps"),
    ],
)  # fmt: skip
def test_other_words_for_the_same(options: dict[str, Any], name: str, value: Any) -> None:
    assert getattr(make_config(options), name) == value


def test_a_token_is_not_shown() -> None:
    config = make_config({"hub_token": "hf_secret", "push_model": True, "hub_path": "me/it"})
    assert config.hub_token == "hf_secret"
    assert "hf_secret" not in repr(config) + config.to_yaml()
    assert "hub_token" not in TrainConfig().to_yaml()


def test_attention_is_the_one_that_was_named(tied_model: Path) -> None:
    import torch

    from parallel_tune.engines.transformers import TransformersEngine
    from strategies.sessions import open_replica

    options = {"model": str(tied_model), "attn_implementation": "eager", "hardware": "cpu:1"}
    plan = parallel_tune.plan(**options)
    model, _ = TransformersEngine().load(make_config(options), plan, open_replica(plan, 60), torch.float32)
    assert model.config._attn_implementation == "eager"


def test_attention_that_nobody_would_compute_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsloth dropped it without a word; without its package flash attention failed once the processes had started."""
    model = "unsloth/Llama-3.2-1B-Instruct"
    with pytest.raises(ConfigError, match=r"attn_implementation = 'eager'.*Unsloth") as caught:
        parallel_tune.plan(model=model, hardware="1xH100-80GB", attn_implementation="eager")
    assert "--engine transformers" in caught.value.hint
    flash = make_config({"engine": "transformers", "attn_implementation": "flash_attention_2", "report_to": "none"})
    monkeypatch.setattr("parallel_tune.needs.installed", lambda package: package != "flash_attn")
    check_needs(flash)  # transformers then takes what the package kernels brings
    monkeypatch.setattr("parallel_tune.needs.installed", lambda package: package not in ("flash_attn", "kernels"))
    with pytest.raises(ConfigError, match="needs flash-attn"):
        check_needs(flash)


def test_attention_without_the_cap_that_a_model_has_on_its_scores_is_refused(tmp_path: Path) -> None:
    """torch's kernel has none: Gemma 2 was trained, and judged, as another model than the one it is used as."""
    gemma = {"model": "google/gemma-2-2b", "hardware": "1xH100-80GB"}
    with pytest.raises(ConfigError, match="leaves out the cap") as caught:
        parallel_tune.plan(**gemma, engine="transformers")
    assert "--attn_implementation eager" in caught.value.hint
    assert parallel_tune.plan(**gemma, engine="transformers", attn_implementation="eager").fits
    assert parallel_tune.plan(**gemma).engine == "unsloth"  # its attention has the cap
    from transformers import Gemma2Config

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    Gemma2Config(**sizes, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=None).save_pretrained(tmp_path)
    assert parallel_tune.plan(model=str(tmp_path), hardware="cpu:1").fits


def test_answers_alone_cannot_be_learned_of_plain_text(tied_model: Path, tmp_path: Path) -> None:
    """All of it was learned without a word, also where each text is a chat that somebody had rendered."""
    from transformers import AutoTokenizer

    from parallel_tune.data.prepare import encoded_rows

    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "user: a assistant: b"}))
    options = {"dataset": str(tmp_path / "rows.jsonl"), "data_cache": False}
    tokenizer = AutoTokenizer.from_pretrained(tied_model)
    with pytest.raises(ConfigError, match=r"answers_only: the rows of .*rows\.jsonl are plain 'text'") as caught:
        encoded_rows(make_config({**options, "answers_only": True}), tokenizer)
    assert "messages" in caught.value.hint
    assert encoded_rows(make_config(options), tokenizer)[1].rows == 1


def test_the_named_split_and_configuration_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from parallel_tune.data.prepare import load_named_rows

    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": split}) + "\n")
    local = make_config({"dataset": str(tmp_path), "dataset_split": "test", "max_rows": 3})
    assert load_named_rows(local) == [{"text": "test"}]
    asked: list[Any] = []
    rows = [{"text": "a"}, {"text": "b"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: asked.append((names, options)) or rows)
    hub = make_config(
        {"dataset_name": "me/data", "dataset_config": "fine", "dataset_train_split": "dev", "max_rows": 1}
    )
    assert load_named_rows(hub) == rows[:1]
    assert asked == [(("me/data", "fine"), {"split": "dev"})]


def test_a_configuration_of_files_that_are_here_is_refused(tmp_path: Path) -> None:
    """It was dropped without a word, whether rows were read or taken from the cache."""
    from parallel_tune.data.prepare import encoded_rows, load_named_rows

    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    for dataset in (tmp_path, tmp_path / "train.jsonl"):
        config = make_config({"dataset": str(dataset), "dataset_config": "fine"})
        for read in (load_named_rows, lambda config: encoded_rows(config, None)):
            with pytest.raises(ConfigError, match="dataset_config = 'fine' is about a dataset on the Hub"):
                read(config)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--dataset=nowhere.jsonl",), "'nowhere.jsonl' is not there"),
        (("--dataset=here.jsonl", "--dataset_split=test"), "has no split 'test'"),
        (("--dataset=here.jsonl", "--dataset_config=fine"), "dataset_config = 'fine'"),
    ],
)
def test_data_that_are_not_there_are_missed_before_a_model_is_loaded(
    options: tuple[str, ...], said: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no other plan could come of its rows, a run reads them in its processes, beside the loaded model."""
    from click.testing import CliRunner

    from parallel_tune.cli import program

    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    fixed = ("--per_device_train_batch_size=1", "--gradient_accumulation_steps=1", "--hardware=cpu:1")
    with pytest.raises(ConfigError, match=re.escape(said)):
        CliRunner().invoke(
            program, ["train", f"--model={small_model}", "--output_dir=run", *fixed, *options], catch_exceptions=False
        )
    assert not (tmp_path / "run").exists()


def test_a_rank_that_waits_gives_up_after_ddp_timeout(environment: dict[str, str]) -> None:
    """Nobody else comes to this group of two."""
    import subprocess
    import sys

    config = make_config({"ddp_timeout": 1})
    code = f"from strategies.sessions import join_processes; join_processes(False, 0, {config.ddp_timeout})"
    group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment | group, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode != 0
    assert "1/2 clients joined" in ended.stderr


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_runs_with_what_it_is_said_to_need(name: str) -> None:
    import torch
    from transformers import get_scheduler

    needed = NEEDED_BY_SCHEDULE.get(name)
    given = {needed[-1]: 3 if needed[-1].endswith("steps") else 0.1} if needed else {}
    make_config({"lr_scheduler_type": name, "lr_scheduler_kwargs": given})
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule = get_scheduler(name, optimizer, 2, 10, given)
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(1.0)
    assert all(rate >= 0 for rate in rates)


def test_the_optimizers_whose_memory_is_known_are_transformers_own() -> None:
    from transformers.training_args import OptimizerNames

    from parallel_tune.memory.states import OPTIMIZERS

    assert set(OPTIMIZERS) <= {name.value for name in OptimizerNames}
    with pytest.raises(ConfigError, match="adafactorr"):
        parallel_tune.plan(model="unsloth/Llama-3.2-1B-Instruct", hardware="1xT4-16GB", optim="adafactorr")
