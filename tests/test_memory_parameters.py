"""Adapter counts against peft, part counts against the whole."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from parallel_tune.memory.facts import facts_from_config
from parallel_tune.memory.parameters import (
    ALL_LINEAR,
    DEFAULT_TARGETS,
    adapter_parameters,
    part_parameters,
    total_parameters,
    whole,
)
from strategies.contracts import Part

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen2": SMALL,
    "qwen3": {**SMALL, "head_dim": 32},
    "gemma2": {**SMALL, "head_dim": 32},
    "gemma3_text": {**SMALL, "head_dim": 32},
    "phi3": {**SMALL, "pad_token_id": 0},
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**SMALL, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "qwen2_moe": {
        **SMALL,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 96,
        "decoder_sparse_step": 2,
    },
}
TARGETS: list[tuple[str, ...]] = [DEFAULT_TARGETS, ("q_proj", "v_proj"), (ALL_LINEAR,)]

DOWNS = [("mixtral", ("q_proj", "w2")), ("qwen3_moe", ("q_proj", "down_proj")), ("qwen2_moe", ("q_proj", "down_proj"))]
"""Families of mixtures, and the names of experts' second products alone."""


@pytest.mark.parametrize(
    ("model_type", "targets"), [*((name, targets) for targets in TARGETS for name in CONFIGS), *DOWNS]
)
def test_counts_are_those_of_transformers_and_peft(model_type: str, targets: tuple[str, ...]) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    facts = facts_from_config({"model_type": model_type, **CONFIGS[model_type]})
    if facts.fused_projections and targets == ("q_proj", "v_proj"):
        pytest.skip("nothing to adapt")
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **CONFIGS[model_type]))
        assert sum(p.numel() for p in model.parameters()) == total_parameters(facts)
        wanted: str | list[str] = ALL_LINEAR if targets == (ALL_LINEAR,) else list(targets)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=wanted, task_type="CAUSAL_LM"))
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert adapter_parameters(facts, whole(facts), 4, targets) == trainable


def test_parts_add_up_and_a_tied_head_apart_is_a_second_copy() -> None:
    for tied in (False, True):
        facts = facts_from_config({"model_type": "llama", **SMALL, "tie_word_embeddings": tied})
        first = part_parameters(facts, Part(0, 0, embedding=True, head=False)).total
        last = part_parameters(facts, Part(1, 2, embedding=False, head=True)).total
        copy = facts.vocab_size * facts.hidden_size if tied else 0
        assert first + last == total_parameters(facts) + copy
