"""Each catalogue row against a meta-device model that transformers builds from the same values."""

from __future__ import annotations

import warnings

import pytest

from parallel_tune.memory.facts import facts_from_config
from parallel_tune.memory.lookup import catalog
from parallel_tune.memory.parameters import total_parameters

ROWS = catalog()


def test_the_catalogue_holds_the_families_people_train() -> None:
    assert len(ROWS) >= 25
    types = {row["config"]["model_type"] for row in ROWS.values()}
    assert types >= {"llama", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "mistral", "mixtral", "phi3"}


def test_no_name_stands_for_two_rows() -> None:
    names = [name.lower() for key, row in ROWS.items() for name in (key, *row["aliases"])]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ROWS)
def test_row_has_the_parameters_of_a_meta_device_model(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    row = ROWS[name]
    config = AutoConfig.for_model(**row["config"])
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config)
    built = sum(parameter.numel() for parameter in model.parameters())
    assert total_parameters(facts_from_config(row["config"])) == built == row["parameters"]
    facts = facts_from_config(row["config"])
    names = {module for module, _ in model.named_modules()}
    assert {*facts.modules.embedding, facts.modules.layers, *facts.modules.tail, facts.modules.head} <= names
