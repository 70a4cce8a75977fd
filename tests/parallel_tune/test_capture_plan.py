"""Which plans capture their steps, why others do not, and what a captured step is predicted to need."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from parallel_tune.config import make_config
from parallel_tune.hardware import parse_hardware
from parallel_tune.memory.captured import CAPTURED_RESERVE_BESIDE_BYTES, GRAPHS_CONTEXT_BYTES
from parallel_tune.memory.closed_form import ClosedFormEstimator
from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.lookup import load_model_facts
from parallel_tune.memory.settings import CUDA_DEFAULTS
from parallel_tune.planning import make_plan, training_settings
from strategies.contracts import Arrangement, Device, Hardware, Part, Plan
from strategies.errors import ConfigError
from strategies.registry import load_registry

QWEN = "unsloth/Qwen3-8B"
MIXTURE = "unsloth/Qwen3-30B-A3B"
GPU = "1xH100-80GB"


def plan_of(hardware: str = GPU, engine: Any = "unsloth", model: str = QWEN, **options: Any) -> Plan:
    config = make_config({"model": model, "strategy": "ddp", "max_seq_length": 512, **options})
    return make_plan(config, load_model_facts(model), engine, parse_hardware(hardware), load_registry())


@pytest.mark.parametrize("engine", ["unsloth", "transformers"])
def test_replicas_on_gpus_are_captured(engine: str) -> None:
    plan = plan_of(engine=engine, global_batch_size=1)
    assert plan.captured and plan.uncaptured_reason == ""
    assert Plan.from_json(plan.to_json()).captured
    assert (
        plan.predicted_tokens_per_second
        > plan_of(engine=engine, global_batch_size=1, capture="off").predicted_tokens_per_second
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"capture": "off"}, "--capture off"),
        ({"hardware": "cpu:2", "engine": "transformers"}, "need a GPU"),
        ({"padding_free": "off"}, "rows are padded"),
        ({"engine": "transformers", "attn_implementation": "flash_attention_2"}, "flash_attention_2"),
        ({"full_finetuning": True, "model": "unsloth/Llama-3.2-1B-Instruct"}, "full fine-tune"),
        ({"lora_dropout": 0.1}, "dropout"),
        ({"use_gradient_checkpointing": "full"}, "recomputed"),
        ({"model": MIXTURE, "load_in_4bit": True}, "expert"),
        ({"strategy": "model_parallel", "hardware": "2xH100-80GB", "lora_dropout": 0.1}, "dropout"),
        ({"strategy": "model_parallel", "hardware": "cpu:2", "engine": "transformers"}, "need a GPU"),
        ({"strategy": "model_parallel", "hardware": "2xH100-80GB", "capture": "off"}, "--capture off"),
    ],
)
def test_why_steps_are_not_captured(options: dict[str, Any], reason: str) -> None:
    plan = plan_of(**options)
    assert not plan.captured
    assert reason in plan.uncaptured_reason


@pytest.mark.parametrize("engine", ["unsloth", "transformers"])
@pytest.mark.parametrize("hardware", ["2xH100-80GB", "4xA100-40GB"])
def test_a_split_models_stages_on_gpus_are_captured(hardware: str, engine: str) -> None:
    options: dict[str, Any] = {"hardware": hardware, "engine": engine, "strategy": "model_parallel"}
    plan = plan_of(**options)
    assert plan.captured and plan.uncaptured_reason == ""
    assert plan.lanes == len(plan.devices)
    eager = plan_of(**options, capture="off")
    assert plan.predicted_tokens_per_second > eager.predicted_tokens_per_second
    assert plan_of(**options, pipeline="off").captured


def test_every_lane_of_a_split_keeps_recordings_of_its_own_but_in_the_last_stage() -> None:
    facts = load_model_facts(QWEN)
    settings = training_settings(make_config({"model": QWEN}), facts, "transformers", "bfloat16", padding_free=True)
    estimator = ClosedFormEstimator(facts, replace(settings, sequence_length=1024), second_pass_tokens=0)
    device = Device(0, "H200", "cuda", 150 * 2**30, 150 * 2**30)

    def peaks(first: int, last: int) -> list[Any]:
        part = Part(first, last, embedding=first == 0, head=last == facts.num_layers - 1)
        return [
            estimator.memory(part, Arrangement(1, 1, 8, "none", lanes, 2, captured=True), device) for lanes in (1, 2, 3)
        ]

    one, two, three = peaks(0, 17)
    # A waiting micro-batch holds less than the whole of a pass, which a lane's recordings keep.
    assert two.activations_bytes - one.activations_bytes < one.activations_bytes
    kept = [each.peak_bytes - one.peak_bytes for each in (two, three)]
    assert kept[0] >= one.activations_bytes
    assert kept[1] == pytest.approx(2 * kept[0], rel=0.05)
    assert len({each.peak_bytes for each in peaks(18, facts.num_layers - 1)}) == 1


def test_capturing_that_was_asked_for_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"--capture on: .*dropout"):
        plan_of(capture="on", lora_dropout=0.1)


def estimate(facts: ModelFacts, engine: Any, tokens: int, captured: bool, second: int | None = None) -> Any:
    settings = training_settings(make_config({"model": QWEN}), facts, engine, "bfloat16", padding_free=True)
    estimator = ClosedFormEstimator(facts, replace(settings, sequence_length=tokens), second_pass_tokens=second)
    whole = Part(0, facts.num_layers - 1, embedding=True, head=True)
    device = Device(0, "H200", "cuda", 150 * 2**30, 150 * 2**30)
    return estimator.memory(whole, Arrangement(1, 1, 1, "none", captured=captured), device)


def test_a_captured_step_keeps_copies_of_gradients_and_a_second_pass() -> None:
    facts = load_model_facts(QWEN)
    eager = estimate(facts, "transformers", 768, captured=False)
    captured = estimate(facts, "transformers", 768, captured=True, second=0)
    # Its own gradients at the peak of the loss, two copies of them, and the workspaces of the recorder's stream.
    workspaces = CUDA_DEFAULTS.workspace_bytes
    assert captured.allocated_bytes - eager.allocated_bytes == 3 * captured.gradients_bytes + workspaces
    assert captured.context_bytes - eager.context_bytes == GRAPHS_CONTEXT_BYTES
    two = estimate(facts, "transformers", 768, captured=True, second=512)
    a_pass = captured.activations_bytes + captured.cross_entropy_bytes
    idle = 768 * facts.vocab_size * 2 + CAPTURED_RESERVE_BESIDE_BYTES
    assert captured.reserve_bytes == idle
    assert two.reserve_bytes == idle + a_pass * 512 // 768
    unknown = estimate(facts, "transformers", 768, captured=True)
    assert unknown.reserve_bytes == a_pass


def test_where_recordings_do_not_fit_the_same_run_is_eager() -> None:
    need = plan_of(capture="off", global_batch_size=8, per_device_train_batch_size=8).devices[0].predicted_peak_bytes
    room = replace(parse_hardware(GPU).devices[0], free_bytes=int(need / 0.97) + 2**28)
    config = make_config({"model": QWEN, "strategy": "ddp", "max_seq_length": 512, "global_batch_size": 8})
    config = config.replace(per_device_train_batch_size=8)
    plan = make_plan(config, load_model_facts(QWEN), "unsloth", Hardware((room,), True), load_registry())
    assert plan.fits and plan.gradient_checkpointing == "none" and not plan.captured
    assert "memory that recordings keep" in plan.uncaptured_reason


def test_unsloths_captured_loss_makes_all_logits() -> None:
    facts = load_model_facts(QWEN)
    captured = estimate(facts, "unsloth", 8192, captured=True, second=0)
    # In 16 bits, and the copy in 32 that accelerate returns.
    assert captured.cross_entropy_bytes == 8192 * facts.vocab_size * 6
    assert estimate(facts, "unsloth", 8192, captured=False).cross_entropy_bytes < captured.cross_entropy_bytes / 6
