"""Selection: ddp first, a named strategy honoured or refused, and the reasons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from strategies.contracts import Hardware, Workload
from strategies.ddp import DDP
from strategies.errors import ConfigError, NoStrategyFits
from strategies.model_parallel import ModelParallel
from strategies.registry import StrategyRegistry
from strategies.selector import closest_plan, select

Make = Callable[..., Any]


@pytest.fixture
def registry() -> StrategyRegistry:
    made = StrategyRegistry()
    made.register(ModelParallel())
    made.register(DDP())
    return made


def test_auto_replicates_where_a_replica_fits(model: Make, cards: Make, registry: StrategyRegistry) -> None:
    workload, estimate = model("8b")
    plan = select(workload, cards("H100", "H100"), estimate, registry)
    assert plan.strategy == "ddp"
    (other,) = plan.rejected
    assert other.strategy == "model_parallel"
    assert other.reason == "would fit, 26,545 tokens/s predicted against 39,570; auto takes ddp first"


def test_auto_splits_where_none_does(model: Make, cards: Make, registry: StrategyRegistry) -> None:
    workload, estimate = model("70b")
    plan = select(workload, cards("H100", "H100"), estimate, registry)
    assert plan.strategy == "model_parallel"
    (other,) = plan.rejected
    assert other.strategy == "ddp"
    assert "does not fit: a replica needs 142.7 GiB a card" in other.reason


def test_a_named_strategy_is_honoured(model: Make, cards: Make, registry: StrategyRegistry) -> None:
    workload, estimate = model("8b")
    plan = select(workload, cards("H100", "H100"), estimate, registry, "model_parallel")
    assert plan.strategy == "model_parallel"
    assert plan.rejected[0].reason.endswith("model_parallel was asked for")


def test_a_named_strategy_is_refused_and_never_swapped(model: Make, cards: Make, registry: StrategyRegistry) -> None:
    workload, estimate = model("70b")
    with pytest.raises(NoStrategyFits) as refusal:
        select(workload, cards("H100", "H100"), estimate, registry, "ddp")
    assert refusal.value.exit_code == 3
    for index in (0, 1):
        short = f"device {index} (H100) needs 142.7 GiB and has 76.8 GiB usable, 66.0 GiB short"
        assert short in refusal.value.message
    assert "model_parallel would fit" in refusal.value.hint
    closest = closest_plan(workload, cards("H100", "H100"), estimate, registry, "ddp")
    assert (closest.strategy, closest.fits) == ("ddp", False)


def test_many_cards_that_are_too_small_alike_are_told_once(
    model: Make, cards: Make, registry: StrategyRegistry
) -> None:
    workload, estimate = model("70b")
    with pytest.raises(NoStrategyFits) as refusal:
        select(workload, cards(*["H100"] * 4), estimate, registry, "ddp")
    short = "devices 0, 1, 2 and 3 (H100) each need 142.7 GiB and have 76.8 GiB usable, 66.0 GiB short."
    assert refusal.value.message == f"ddp does not fit: {short}"


def test_nothing_fits(model: Make, cards: Make, registry: StrategyRegistry) -> None:
    workload, estimate = model("405b")
    with pytest.raises(NoStrategyFits, match=r"no strategy fits\. Closest is model_parallel: device 0"):
        select(workload, cards("H100", "H100"), estimate, registry)
    with pytest.raises(NoStrategyFits, match="ddp does not fit, nor does another strategy"):
        select(workload, cards("H100", "H100"), estimate, registry, "ddp")
    closest = closest_plan(workload, cards("H100", "H100"), estimate, registry)
    assert (closest.strategy, closest.fits, closest.rejected[0].strategy) == ("model_parallel", False, "ddp")


def test_unknown_strategy_and_empty_registry(model: Make, cards: Make, registry: StrategyRegistry) -> None:
    workload, estimate = model("8b")
    with pytest.raises(ConfigError, match="no strategy 'dpp'"):
        select(workload, cards("H100"), estimate, registry, "dpp")
    with pytest.raises(ConfigError, match="none is registered"):
        select(workload, cards("H100"), estimate, StrategyRegistry())


def test_a_third_party_strategy_is_asked_in_its_turn(model: Make, cards: Make, registry: StrategyRegistry) -> None:
    class Eager(DDP):
        name = "eager"
        auto_order = 5

    class Broken(ModelParallel):
        name = "broken"
        auto_order = 90

        def plan(self, workload: Workload, hardware: Hardware, estimate: Any) -> Any:
            raise KeyError("oops")

    registry.register(Eager())
    registry.register(Broken())
    workload, estimate = model("8b")
    plan = select(workload, cards("H100"), estimate, registry)
    assert plan.strategy == "eager"
    assert {r.strategy for r in plan.rejected} == {"ddp", "model_parallel", "broken"}
    assert any("failed to plan: KeyError: 'oops'" in r.reason for r in plan.rejected)
