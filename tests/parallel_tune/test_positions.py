"""Rows that are longer than the model was made for are said in the plan; models that are stretched are left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from parallel_tune.config import make_config
from parallel_tune.hardware import parse_hardware
from parallel_tune.known_rows import KnownRows
from parallel_tune.memory.facts import facts_from_config
from parallel_tune.memory.positions import positions_of
from parallel_tune.planning import make_plan
from strategies.registry import load_registry

SHAPE = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 8, "vocab_size": 2048, "max_position_embeddings": 4096,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512}


def said(length: int, engine: Any = "transformers", rows: KnownRows | None = None, **config: Any) -> list[str]:
    """The reasons of a plan that speak of positions."""
    facts = facts_from_config({**SHAPE, **config})
    asked = make_config({"max_seq_length": length, "engine": engine})
    plan = make_plan(asked, facts, engine, parse_hardware("1xA100-40GB"), load_registry(), rows=rows)
    return [reason for reason in plan.reasons if "positions" in reason]


def test_longer_rows_are_said_with_both_numbers() -> None:
    assert said(4096) == said(4096, "unsloth") == []
    (reason,) = said(8192)
    assert "rows of up to 8192 tokens" in reason and "4096 positions" in reason
    (reason,) = said(8192, "unsloth")
    assert "--max_seq_length 8192" in reason and "4096 positions" in reason and "stretches them 2 times" in reason


def test_known_rows_that_are_short_enough_do_not_matter() -> None:
    assert said(8192, rows=KnownRows([100, 4096])) == []
    assert "rows of up to 4097 tokens" in said(8192, rows=KnownRows([100, 4097]))[0]
    assert said(8192, "unsloth", rows=KnownRows([100, 4096])), "Unsloth goes by the option"


@pytest.mark.parametrize(
    ("config", "reach"),
    [
        ({"rope_scaling": YARN}, 16384),
        ({"rope_parameters": {**YARN, "rope_theta": 1e6}}, 16384),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 8192),
        ({"rope_scaling": LLAMA3}, 4096),
        ({"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default"}}}, 16384),
        ({"rope_scaling": {"rope_type": "default"}}, 4096),
    ],
)
def test_a_config_that_stretches_positions_reaches_as_far(config: dict[str, Any], reach: int) -> None:
    assert said(reach, **config) == []
    assert f"{reach} positions" in said(reach + 256, **config)[0]


def test_scaling_that_follows_the_rows_has_no_bound_and_unknown_positions_no_remark() -> None:
    assert said(1 << 16, rope_scaling={"type": "dynamic", "factor": 2.0}) == []
    for unknown in (None, "many", 0, True):
        assert said(1 << 16, max_position_embeddings=unknown) == said(1 << 16, "unsloth", max_position_embeddings=0)
    for odd in ("yarn", [1], {"type": "yarn", "factor": "four"}, {"type": "yarn"}):
        assert said(4096, rope_scaling=odd) == []


def test_unsloth_puts_its_own_scaling_in_place_of_all_but_llama3s() -> None:
    (reason,) = said(8192, "unsloth", rope_scaling=YARN)
    assert "in place of its own scaling (yarn)" in reason
    (reason,) = said(8192, "unsloth", rope_scaling=LLAMA3)
    assert "rows of up to 8192 tokens are longer than the 4096 positions" in reason


def test_configs_that_transformers_writes_are_understood(tmp_path: Path) -> None:
    from transformers import LlamaConfig, Phi3Config, Qwen3Config

    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    made = {
        16384: Qwen3Config(max_position_embeddings=4096, rope_parameters={**YARN, "rope_theta": 1e6}),
        131072: LlamaConfig(max_position_embeddings=131072, rope_parameters={**LLAMA3, "low_freq_factor": 1.0,
                                                                           "high_freq_factor": 4.0}),
        32768: Phi3Config(
            hidden_size=256, num_attention_heads=8, max_position_embeddings=32768, rope_parameters=longrope,
            original_max_position_embeddings=4096,
        ),
        2048: LlamaConfig(),
    }  # fmt: skip
    for reach, config in made.items():
        config.save_pretrained(tmp_path)
        assert positions_of(json.loads((tmp_path / "config.json").read_text())).reach == reach
