"""Cuts are exact for their objective: brute force finds nothing better."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.contracts import Arrangement, Device, MemoryEstimate, Part
from strategies.fit import SAFETY_MARGIN
from strategies.placement import (
    StageCosts,
    best_order,
    fullest,
    place_by_memory,
    place_by_time,
    slowest,
    stage_orders,
)

ARRANGEMENT = Arrangement(1, 1, 1, "full")


@dataclass
class TableEstimator:
    """Any costs that never fall with layers: steps[n] is what the n-th layer of a stage adds."""

    steps: Sequence[int]
    ends: tuple[int, int]
    time_of_layer: dict[str, int]
    head_time: int
    calls: list[Part] = field(default_factory=list)

    def memory(self, part: Part, arrangement: Arrangement, device: Device) -> MemoryEstimate:
        self.calls.append(part)
        used = sum(self.steps[: part.num_layers]) + part.embedding * self.ends[0] + part.head * self.ends[1]
        return MemoryEstimate(used, 0, 0, 0, 0, 0)

    def micro_batch_seconds(self, part: Part, arrangement: Arrangement, device: Device) -> float:
        return self.time_of_layer[device.name] * part.num_layers + part.head * self.head_time

    def host_seconds(self, part: Part, arrangement: Arrangement) -> float:
        return 0.0


def device(index: int, free: int, name: str = "card") -> Device:
    return Device(index, name, "cuda", free, free)


def cuts(num_layers: int, stages: int) -> Iterator[list[int]]:
    for inner in itertools.combinations(range(1, num_layers), stages - 1):
        bounds = (0, *inner, num_layers)
        yield [b - a for a, b in itertools.pairwise(bounds)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, list[Device], TableEstimator]:
    num_layers = draw(st.integers(1, 9))
    stages = draw(st.integers(1, min(4, num_layers)))
    # Uneven cards: 24+8 and 80+24 among them.
    sizes = draw(st.lists(st.sampled_from([8_000, 24_000, 24_100, 80_000]), min_size=stages, max_size=stages))
    names = draw(st.lists(st.sampled_from(["slow", "fast"]), min_size=stages, max_size=stages))
    steps = draw(st.lists(st.integers(0, 9_000), min_size=num_layers, max_size=num_layers))
    ends = draw(st.tuples(st.integers(0, 9_000), st.integers(0, 30_000)))
    devices = [device(i, s, n) for i, (s, n) in enumerate(zip(sizes, names, strict=True))]
    return num_layers, devices, TableEstimator(steps, ends, {"slow": 5, "fast": 2}, draw(st.integers(0, 20)))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_no_cut_leaves_the_fullest_device_emptier(case: tuple[int, list[Device], TableEstimator]) -> None:
    num_layers, devices, estimate = case
    costs = StageCosts(num_layers, ARRANGEMENT, estimate)
    stages = place_by_memory(costs, devices)
    best = min(fullest(costs.stages(counts, devices)) for counts in cuts(num_layers, len(devices)))
    assert fullest(stages) == best


@settings(max_examples=300, deadline=None)
@given(cases())
def test_no_cut_that_fits_has_a_faster_slowest_stage(case: tuple[int, list[Device], TableEstimator]) -> None:
    num_layers, devices, estimate = case
    costs = StageCosts(num_layers, ARRANGEMENT, estimate)
    stages = place_by_time(costs, devices)
    all_cuts = [costs.stages(counts, devices) for counts in cuts(num_layers, len(devices))]
    fitting = [slowest(cut) for cut in all_cuts if fullest(cut) <= 1]
    if stages is None:
        assert not fitting
    else:
        assert fullest(stages) <= 1
        assert slowest(stages) == min(fitting)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_no_order_of_the_devices_is_clearly_better(case: tuple[int, list[Device], TableEstimator]) -> None:
    num_layers, devices, estimate = case
    costs = StageCosts(num_layers, ARRANGEMENT, estimate)
    stages = best_order(costs, devices, place_by_memory, fullest)
    assert stages is not None
    best = min(fullest(place_by_memory(costs, order)) for order in itertools.permutations(devices))
    assert fullest(stages) <= best / 0.99 + 1e-9


@given(cases())
def test_stages_hold_all_layers_once_and_the_ends_where_they_belong(
    case: tuple[int, list[Device], TableEstimator],
) -> None:
    num_layers, devices, estimate = case
    stages = place_by_memory(StageCosts(num_layers, ARRANGEMENT, estimate), devices)
    held = [layer for s in stages for layer in range(s.part.first_layer, s.part.last_layer + 1)]
    assert held == list(range(num_layers))
    assert all(s.part.num_layers >= 1 for s in stages)
    assert [s.part.embedding for s in stages] == [i == 0 for i in range(len(stages))]
    assert [s.part.head for s in stages] == [i == len(stages) - 1 for i in range(len(stages))]


def test_the_head_takes_layers_off_its_device() -> None:
    estimate = TableEstimator([100] * 32, (100, 900), {"card": 1}, 0)
    stages = place_by_memory(StageCosts(32, ARRANGEMENT, estimate), [device(0, 4_000), device(1, 4_000)])
    assert [s.part.num_layers for s in stages] == [20, 12]


def test_time_is_balanced_with_the_head_counted() -> None:
    estimate = TableEstimator([1] * 32, (0, 0), {"card": 1}, 4)
    stages = place_by_time(StageCosts(32, ARRANGEMENT, estimate), [device(0, 4_000), device(1, 4_000)])
    assert stages is not None
    assert [s.part.num_layers for s in stages] == [18, 14]


def test_few_estimator_calls_for_126_layers_on_8_devices() -> None:
    estimate = TableEstimator([100] * 126, (50, 900), {"card": 1}, 0)
    devices = [device(i, 4_000) for i in range(8)]
    place_by_memory(StageCosts(126, ARRANGEMENT, estimate), devices)
    assert len(estimate.calls) < 126


def test_a_small_first_card_may_change_places() -> None:
    # The head alone overfills the 8,000 card, so the large one must come last.
    estimate = TableEstimator([500] * 8, (0, 9_000), {"card": 1}, 0)
    devices = [device(0, 24_000), device(1, 8_000)]
    stages = best_order(StageCosts(8, ARRANGEMENT, estimate), devices, place_by_memory, fullest)
    assert stages is not None
    assert [s.device.index for s in stages] == [1, 0]
    assert fullest(stages) <= 1


def test_equal_devices_keep_their_order() -> None:
    devices = [Device(i, "card", "cuda", 80 * 2**30, 79 * 2**30 + i) for i in range(4)]
    assert stage_orders(devices) == (tuple(devices),)


def test_margin_is_kept_free() -> None:
    estimate = TableEstimator([0], (0, 1_000), {"card": 1}, 0)
    (stage,) = place_by_memory(StageCosts(1, ARRANGEMENT, estimate), [device(0, 1_000)])
    assert stage.fullness == pytest.approx(1 / (1 - SAFETY_MARGIN), rel=1e-2)
    assert not stage.fits
