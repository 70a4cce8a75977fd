"""Strategies are found by name, and what is wrong with one is said without disturbing the others."""

from __future__ import annotations

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from strategies.ddp import DDP
from strategies.errors import ConfigError
from strategies.model_parallel import ModelParallel
from strategies.registry import ENTRY_POINT_GROUP, StrategyRegistry, load_registry

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
INSTANCE = DDP()


def declared_points() -> list[EntryPoint]:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    return [
        EntryPoint(name, value, ENTRY_POINT_GROUP) for name, value in project["entry-points"][ENTRY_POINT_GROUP].items()
    ]


def test_built_ins_come_through_the_entry_points() -> None:
    registry = load_registry(declared_points())
    assert registry.names() == ("ddp", "model_parallel")
    assert [s.name for s in registry.in_auto_order()] == ["ddp", "model_parallel"]
    assert isinstance(registry.get("ddp"), DDP)
    assert registry.warnings() == ()


def test_unknown_name_lists_what_exists_and_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no strategy 'model_paralel'") as refusal:
        load_registry(declared_points()).get("model_paralel")
    assert "Did you mean 'model_parallel'" in refusal.value.hint
    assert "ddp, model_parallel" in refusal.value.hint


def test_duplicate_is_refused_and_names_both() -> None:
    registry = StrategyRegistry()
    registry.register(DDP())
    with pytest.raises(ConfigError, match=r"two strategies are called 'ddp': strategies\.ddp\.DDP and") as refusal:
        registry.register(DDP())
    assert "Registered: ddp" in refusal.value.hint


def test_two_packages_may_not_share_a_name() -> None:
    points = [*declared_points(), EntryPoint("ddp", "elsewhere:DDP", ENTRY_POINT_GROUP)]
    with pytest.raises(ConfigError, match=r"strategies\.ddp:DDP and elsewhere:DDP"):
        load_registry(points)


def test_one_package_found_twice_counts_once() -> None:
    assert load_registry([*declared_points(), *declared_points()]).names() == ("ddp", "model_parallel")


def test_broken_package_is_reported_and_stops_nobody_else() -> None:
    points = [*declared_points(), EntryPoint("mine", "no_such_module:Mine", ENTRY_POINT_GROUP)]
    registry = load_registry(points)
    assert registry.names() == ("ddp", "model_parallel")
    (line,) = registry.warnings()
    assert "'mine' is left out" in line
    assert "No module named 'no_such_module'" in line
    with pytest.raises(ConfigError, match=r"'mine' could not be loaded: .*no_such_module"):
        registry.get("mine")


def test_an_entry_point_may_be_an_instance_but_not_under_another_name() -> None:
    here = EntryPoint("other", "strategies.ddp:DDP", ENTRY_POINT_GROUP)
    assert "it calls itself 'ddp'" in load_registry([here]).warnings()[0]


def test_an_object_that_is_no_strategy_is_refused() -> None:
    with pytest.raises(ConfigError, match="lacks name, auto_order, assess, plan, open"):
        StrategyRegistry().register(object())  # type: ignore[arg-type]


def test_auto_is_no_name() -> None:
    strategy = ModelParallel()
    strategy.name = "auto"
    with pytest.raises(ConfigError, match="cannot be called 'auto'"):
        StrategyRegistry().register(strategy)


def test_an_empty_registry_says_that_the_installation_is_incomplete() -> None:
    with pytest.raises(ConfigError, match="none is registered") as refusal:
        load_registry([]).get("ddp")
    assert "pip install" in refusal.value.hint
