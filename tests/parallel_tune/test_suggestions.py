"""What a plan that does not fit suggests is as little a change as it says, and plans of its own show that it fits."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from typing import Any

import pytest

from parallel_tune.config import make_config
from parallel_tune.decision import find_hardware
from parallel_tune.hardware import parse_hardware
from parallel_tune.memory.lookup import load_model_facts
from parallel_tune.planning import LENGTH_STEP, make_plan, require_fit
from strategies.contracts import Hardware, Plan
from strategies.errors import ConfigError, NoStrategyFits
from strategies.registry import load_registry


def plan_of(hardware: str | Hardware, model: str, engine: Any = "unsloth", **options: Any) -> Plan:
    devices = parse_hardware(hardware) if isinstance(hardware, str) else hardware
    config = make_config({"model": model, **options})
    return make_plan(config, load_model_facts(model), engine, devices, load_registry())


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("1xRTX3090-24GB", "meta-llama/Llama-3.1-8B", {"max_seq_length": 65536}),
    ("1xA100-40GB", "meta-llama/Llama-3.1-8B", {"per_device_train_batch_size": 60, "max_seq_length": 4096}),
    ("1xRTX4090-24GB", "Qwen/Qwen3-4B", {"full_finetuning": True}),
    ("2xA100-40GB", "meta-llama/Llama-3.1-70B", {}),
    ("1xH100-80GB", "meta-llama/Llama-3.1-8B", {"use_gradient_checkpointing": "none", "max_seq_length": 32768}),
    ("1xT4-16GB", "Qwen/Qwen2.5-7B", {}),
    ("1xRTX3090-24GB", "Qwen/Qwen2.5-3B", {"engine": "transformers", "max_seq_length": 16384}),
]


@pytest.mark.parametrize(("hardware", "model", "options"), CASES, ids=lambda value: str(value)[:30])
def test_each_suggestion_is_a_plan_that_fits(hardware: str, model: str, options: dict[str, Any]) -> None:
    plan = plan_of(hardware, model, **options)
    assert not plan.fits and plan.suggestions
    assert len({item.change.split()[0] for item in plan.suggestions}) == len(plan.suggestions)
    for item in plan.suggestions:
        changed, devices = dict(options), parse_hardware(hardware)
        name, _, value = item.change.removeprefix("--").partition(" ")
        if item.change.startswith("one more"):
            devices = replace(devices, devices=(*devices.devices, replace(devices.devices[-1], index=9)))
        elif item.change.startswith("--"):
            changed[name] = value or True
        else:
            changed["full_finetuning"] = False
        again = plan_of(devices, model, **changed)
        assert again.fits, item.change
        assert max(device.predicted_peak_bytes for device in again.devices) == item.predicted_peak_bytes
        if name in ("max_seq_length", "per_device_train_batch_size"):
            # A sixteenth of the gap that halving leaves, and no more, is given away.
            step = LENGTH_STEP if name == "max_seq_length" else 1
            more = int(value) + max(step, -(-int(value) // 16 // step) * step)
            assert not plan_of(hardware, model, **{**options, name: more + step}).fits
    with pytest.raises(NoStrategyFits) as caught:
        require_fit(plan, "auto")
    assert caught.value.exit_code == 3
    for device in plan.devices:
        assert f"device {device.index} ({device.name}) needs" in caught.value.message
        assert "short" in caught.value.message
    assert all(item.change in caught.value.hint for item in plan.suggestions)


def test_the_way_out_is_not_the_plan_that_was_just_shown() -> None:
    plan = plan_of("1xRTX3090-24GB", "meta-llama/Llama-3.1-8B", max_seq_length=65536)
    with pytest.raises(NoStrategyFits) as caught:
        require_fit(plan, "auto", shown=True)
    assert "parallel-tune plan" not in caught.value.hint and plan.suggestions[0].change in caught.value.hint


@pytest.mark.parametrize("shown", [True, False])
def test_where_no_single_change_fits_the_refusal_says_so(shown: bool) -> None:
    """It promised that `plan` shows which change would fit."""
    plan = plan_of("2xRTX3090-24GB", "meta-llama/Llama-3.1-405B")
    assert not plan.suggestions
    with pytest.raises(NoStrategyFits) as caught:
        require_fit(plan, "auto", shown=shown)
    assert "No single change" in caught.value.hint and "which change" not in caught.value.hint
    assert ("parallel-tune plan" in caught.value.hint) != shown


def test_a_fused_loss_is_suggested_where_all_logits_are_what_does_not_fit() -> None:
    for options, suggested in (({}, True), ({"cross_entropy": "fused", "max_seq_length": 65536}, False)):
        plan = plan_of("1xRTX3090-24GB", "Qwen/Qwen2.5-3B", "transformers", **{"max_seq_length": 16384, **options})
        assert not plan.fits
        assert ("--cross_entropy fused" in [item.change for item in plan.suggestions]) == suggested


def test_two_of_three_cards_where_one_is_too_small() -> None:
    plan = plan_of("2xRTX3090-24GB+1xRTX3070-8GB", "meta-llama/Llama-3.1-8B")
    assert (plan.strategy, plan.fits, [device.index for device in plan.devices]) == ("ddp", True, [0, 1])
    assert any("device 2 (RTX3070-8GB" in reason and "left out" in reason for reason in plan.reasons)


@pytest.mark.parametrize("options", [{}, {"max_devices": 1}, {"strategy": "model_parallel", "max_devices": 2}])
def test_an_old_card_that_is_left_out_decides_nothing(options: dict[str, Any]) -> None:
    """It made a plan of H100s alone one in float16, padded and uncaptured."""
    mixed = plan_of("2xH100-80GB+1xRTX2080Ti-11GB", "meta-llama/Llama-3.1-8B", **options)
    alone = plan_of("2xH100-80GB", "meta-llama/Llama-3.1-8B", **options)
    assert mixed.devices == alone.devices
    assert (mixed.dtype, mixed.padding_free, mixed.captured) == ("bfloat16", True, alone.captured)
    assert any("device 2 (RTX2080Ti-11GB" in reason and "left out" in reason for reason in mixed.reasons)
    assert mixed.rejected == alone.rejected
    assert mixed.left_out[-1].startswith("device 2") and set(mixed.left_out) <= set(mixed.reasons)


def test_plans_of_earlier_runs_which_do_not_tell_their_reasons_apart_are_read() -> None:
    plan = plan_of("2xRTX3090-24GB+1xRTX3070-8GB", "meta-llama/Llama-3.1-8B")
    assert plan.left_out == (plan.reasons[-1],) and Plan.from_json(plan.to_json()) == plan
    earlier = {name: value for name, value in plan.to_dict().items() if name != "left_out"}
    assert Plan.from_json(json.dumps(earlier)) == dataclasses.replace(plan, left_out=())


def test_an_old_card_that_is_used_decides_for_all() -> None:
    assert plan_of("1xA100-40GB+1xT4-16GB", "meta-llama/Llama-3.2-1B").dtype == "float16"


def test_adapters_for_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="no such linear") as caught:
        plan_of("1xH100-80GB", "meta-llama/Llama-3.2-1B", target_modules="nothing,neither")
    assert "q_proj" in caught.value.hint
    assert plan_of("1xH100-80GB", "meta-llama/Llama-3.2-1B", target_modules="self_attn.q_proj").fits


def test_a_misspelt_target_is_refused_beside_right_ones() -> None:
    """peft passes over names that it does not find as long as it finds one: fewer adapters trained than were meant."""
    with pytest.raises(ConfigError, match="target_modules names qproj, which") as caught:
        plan_of("1xH100-80GB", "meta-llama/Llama-3.2-1B", target_modules="qproj,v_proj")
    assert "q_proj" in caught.value.hint
    plan_of("1xH100-80GB", "google/gemma-3-4b-it", target_modules="q_proj,out_proj")  # of its vision tower
    plan_of("8xH100-80GB", "mistralai/Mixtral-8x7B-v0.1", target_modules="q_proj,w1,w2,w3,gate")


@pytest.mark.parametrize(
    ("model", "there", "missing"),
    [
        ("microsoft/Phi-3-mini-4k-instruct", "down_proj, o_proj", "gate_proj, k_proj, q_proj, up_proj, v_proj"),
        ("mistralai/Mixtral-8x7B-v0.1", "k_proj, o_proj, q_proj, v_proj", "down_proj, gate_proj, up_proj"),
        ("meta-llama/Llama-3.2-1B", "", ""),
        ("Qwen/Qwen3-30B-A3B", "", ""),
    ],
)
def test_a_plan_says_which_of_the_default_targets_are_not_there(model: str, there: str, missing: str) -> None:
    said = [reason for reason in plan_of("8xH100-80GB", model).reasons if "adapters" in reason]
    assert len(said) == bool(missing)
    assert not said or (f"only on {there}:" in said[0] and f"no {missing};" in said[0] and "all-linear" in said[0])


@pytest.mark.parametrize("engine", ["unsloth", "transformers"])
@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_embeddings_and_heads_get_no_adapters(name: str, engine: str) -> None:
    """They were planned as if they took no memory: Unsloth trains them in full, and TRL raises an error of its own."""
    with pytest.raises(ConfigError, match=rf"target_modules names {name}:.*no adapters") as raised:
        plan_of("1xH100-80GB", "meta-llama/Llama-3.2-1B", target_modules=f"q_proj,{name}", engine=engine)
    assert "--full_finetuning" in raised.value.hint
    plan_of("1xH100-80GB", "meta-llama/Llama-3.2-1B", full_finetuning=True, target_modules=f"q_proj,{name}")
    assert plan_of("1xH100-80GB", "microsoft/Phi-3-mini-4k-instruct").fits  # two of the defaults are there


def test_a_plan_in_4_bit_says_that_experts_are_not() -> None:
    """Mixtral's weights go from 87 GiB to 85, where its 4-bit form elsewhere has 25."""

    def said(model: str, **options: Any) -> list[str]:
        reasons = plan_of("8xH100-80GB", model, **options).reasons
        return [reason for reason in reasons if "experts" in reason]

    (reason,) = said("mistralai/Mixtral-8x7B-v0.1", load_in_4bit=True)
    assert "84.0 GiB" in reason and "16 bit" in reason
    assert not said("mistralai/Mixtral-8x7B-v0.1") and not said("meta-llama/Llama-3.1-8B", load_in_4bit=True)


def test_an_empty_declaration_is_no_probe() -> None:
    with pytest.raises(ConfigError, match="--hardware ''"):
        find_hardware(make_config({"hardware": ""}))
