"""An option of the strategy that a plan has no use for is said in it."""

from __future__ import annotations

from typing import Any

import pytest

from parallel_tune.config import make_config
from parallel_tune.hardware import parse_hardware
from parallel_tune.memory.lookup import load_model_facts
from parallel_tune.planning import make_plan
from strategies.contracts import Plan
from strategies.registry import load_registry

MODEL = "meta-llama/Llama-3.1-8B"


def planned(hardware: str = "2xH100-80GB", **options: Any) -> Plan:
    config = make_config({"model": MODEL, "engine": "transformers", **options})
    return make_plan(config, load_model_facts(MODEL), "transformers", parse_hardware(hardware), load_registry())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pipeline": "on"}, "--pipeline on: of no use here"),
        ({"pipeline": "on", "lanes": 2}, "--pipeline on and --lanes 2: of no use here"),
        ({"lanes": 1}, "--lanes 1: of no use here"),
        ({"strategy": "ddp", "pipeline": "off"}, "--pipeline off: of no use here"),
        ({"ddp_reduce_dtype": "bfloat16", "max_devices": 1}, "--ddp_reduce_dtype bfloat16: of no use here"),
        (
            {"ddp_reduce_dtype": "bfloat16", "strategy": "model_parallel"},
            "--ddp_reduce_dtype bfloat16: of no use here",
        ),
    ],
)
def test_what_a_plan_has_no_use_for_is_said(options: dict[str, Any], said: str) -> None:
    assert any(said in reason for reason in planned(**options).reasons)


@pytest.mark.parametrize(
    "options",
    [{}, {"ddp_reduce_dtype": "bfloat16"}, {"strategy": "model_parallel", "pipeline": "on", "lanes": 2}],
)
def test_what_it_uses_is_not(options: dict[str, Any]) -> None:
    assert not any("of no use" in reason or "in place of" in reason for reason in planned(**options).reasons)


@pytest.mark.parametrize("hardware", ["2xH100-80GB", "cpu:2"])
def test_fewer_lanes_than_were_asked_for_are_said(hardware: str) -> None:
    few = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    plan = planned(hardware, strategy="model_parallel", lanes=5, **few)
    assert plan.lanes == 2
    assert any("2 lanes in place of 5: a step has no more micro-batches" in reason for reason in plan.reasons)
    assert not any("as was asked for" in reason for reason in plan.reasons)
