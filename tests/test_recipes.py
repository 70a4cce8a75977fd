"""Each recipe plans on the hardware and by the strategy that it names, and its comments say what that gives."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import recipe_figures as figures
import yaml

from parallel_tune.capture import NO_ROOM, RECOMPUTED
from parallel_tune.config import make_config, read_yaml
from parallel_tune.hardware import parse_hardware
from parallel_tune.known_rows import KnownRows
from parallel_tune.memory.lookup import load_model_facts
from parallel_tune.planning import make_plan
from strategies.registry import load_registry

EXPECTED = {
    "llama-3.2-1b-full-ddp": "ddp",
    "llama-3.2-1b-lora-ddp": "ddp",
    "llama-3.2-3b-two-t4": "ddp",
    "llama-3.3-70b-lora-split": "model_parallel",
    "llama-3.3-70b-qlora-split": "model_parallel",
    "qwen3-14b-unequal-cards": "model_parallel",
    "qwen3-8b-lora-ddp": "ddp",
}


def recipe(name: str) -> Path:
    return figures.RECIPES / f"{name}.yaml"


def test_all_recipes_are_tested() -> None:
    assert [path.stem for path in figures.recipes()] == sorted(EXPECTED)


@pytest.mark.parametrize(("name", "strategy"), EXPECTED.items())
def test_a_recipe_says_what_its_plan_says(name: str, strategy: str) -> None:
    plan = figures.plan_of(recipe(name))
    assert plan["fits"] and plan["strategy"] == strategy and plan["engine"] == "unsloth"
    stated = figures.stated(recipe(name))
    assert stated == figures.planned(recipe(name), plan), "python tests/recipe_figures.py renews the comments"
    # The figures read back from the text, which the line above renders by the code that also wrote it.
    said = {int(index): float(peak) for peak, index in re.findall(r"([\d.]+) GiB on device (\d+)", stated["memory"])}
    assert said.keys() == {device["index"] for device in plan["devices"]}
    for device in plan["devices"]:
        assert said[device["index"]] * 2**30 == pytest.approx(device["predicted_peak_bytes"], abs=0.051 * 2**30)
        assert device["predicted_peak_bytes"] < device["free_bytes"]
    text = recipe(name).read_text()
    stale = re.sub("^# memory: .*$", "# memory: 1.0 GiB on device 0", text, flags=re.MULTILINE)
    assert stale != text and figures.renewed(stale, stated) == text


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_names_the_hardware_in_a_comment_only(name: str) -> None:
    """Declared in the settings, it would be planned for in place of the machine's own devices."""
    assert "hardware" not in yaml.safe_load(recipe(name).read_text())


@pytest.mark.parametrize(
    ("name", "captured"), [("llama-3.3-70b-qlora-split", False), ("llama-3.3-70b-lora-split", True)]
)
def test_what_is_split_does_not_fit_one_card(name: str, captured: bool) -> None:
    plan = figures.plan_of(recipe(name))
    assert plan["captured"] is captured
    assert captured or plan["uncaptured_reason"] in (NO_ROOM, RECOMPUTED)
    reasons = {row["strategy"]: row["reason"] for row in plan["rejected"]}
    assert reasons["ddp"].startswith("does not fit")


def test_unequal_cards_are_faster_split_than_the_large_one_alone(tune: Any) -> None:
    split = figures.plan_of(recipe("qwen3-14b-unequal-cards"))
    layers = {device["index"]: device["layers"][1] - device["layers"][0] for device in split["devices"]}
    assert layers[0] > layers[1], "the large card is device 0"
    options = (f"--config={recipe('qwen3-14b-unequal-cards')}", "--strategy=auto", "--json")
    hardware = figures.stated(recipe("qwen3-14b-unequal-cards"))["hardware"]
    alone = json.loads(tune("plan", *options, f"--hardware={hardware}", base=False).out)
    assert (alone["strategy"], alone["processes"]) == ("ddp", 1)
    assert alone["predicted_tokens_per_second"] < split["predicted_tokens_per_second"]


@pytest.mark.parametrize("name", ["llama-3.2-1b-lora-ddp", "qwen3-8b-lora-ddp"])
def test_short_rows_are_captured_in_one_micro_batch(name: str) -> None:
    """What these two recipes say of a run, which knows its rows."""
    config = make_config(read_yaml(recipe(name)))
    hardware = parse_hardware(figures.stated(recipe(name))["hardware"])
    rows = KnownRows([20, 60, 110, 110, 150, 400] * 50)
    facts = load_model_facts(config.model, offline=True)
    plan = make_plan(config, facts, "unsloth", hardware, load_registry(), rows=rows)
    assert plan.fits and plan.strategy == "ddp" and plan.captured and plan.padding_free
    assert plan.gradient_accumulation_steps == 1
