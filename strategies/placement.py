"""Layers to devices: contiguous cuts that are exact for their objective.

Two objectives, both solved exactly:

- `place_by_memory` minimises the largest fullness (predicted peak over usable memory) of all devices, which is the
  same as keeping the relatively smallest headroom as large as it can be;
- `place_by_time` minimises the slowest stage's seconds among cuts whose every peak fits, for a pipelined split.

A stage's cost depends on how many layers it holds and on whether it has the embedding or the head, never falls as
layers are added, and every stage has at least one layer. So handing out the layers one at a time, each to the stage
that costs least with one more, is optimal: were some cut better, each of its stages would hold no more layers than
those at which greedy stopped short of the better maximum, and the layers would not add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from strategies.base import Estimator
from strategies.contracts import Arrangement, Device, MemoryEstimate, Part
from strategies.fit import fullness

CLEARLY_BETTER = 0.99
"""An unnatural order of the devices must beat the natural one by this factor to be taken."""


@dataclass(frozen=True)
class Stage:
    """A device, the part of the model that it holds, and what that costs."""

    device: Device
    part: Part
    memory: MemoryEstimate
    device_seconds: float

    @property
    def fullness(self) -> float:
        """What it needs over usable memory."""
        return fullness(self.memory.needed_bytes, self.device)

    @property
    def fits(self) -> bool:
        return self.fullness <= 1


class StageCosts:
    """Costs of stages under one arrangement, each asked of the estimator once."""

    def __init__(self, num_layers: int, arrangement: Arrangement, estimate: Estimator) -> None:
        self.num_layers = num_layers
        self._arrangement = arrangement
        self._estimate = estimate
        self._fullness: dict[tuple[object, ...], float] = {}
        self._seconds: dict[tuple[object, ...], float] = {}

    def fullness(self, layers: int, embedding: bool, head: bool, device: Device) -> float:
        """How full a device gets with that many layers."""
        key = (layers, embedding, head, device.name, device.free_bytes)
        if key not in self._fullness:
            part = self._sample_part(layers, embedding, head)
            needed = self._estimate.memory(part, self._arrangement, device).needed_bytes
            self._fullness[key] = fullness(needed, device)
        return self._fullness[key]

    def seconds(self, layers: int, embedding: bool, head: bool, device: Device) -> float:
        """Device seconds of one micro-batch through that many layers."""
        key = (layers, embedding, head, device.name, device.matmul_flops_per_second)
        if key not in self._seconds:
            part = self._sample_part(layers, embedding, head)
            self._seconds[key] = self._estimate.micro_batch_seconds(part, self._arrangement, device)
        return self._seconds[key]

    def stages(self, counts: Sequence[int], devices: Sequence[Device]) -> tuple[Stage, ...]:
        """The stages of a cut, each estimated with the very layers it holds."""
        stages = []
        first = 0
        for i, (count, device) in enumerate(zip(counts, devices, strict=True)):
            part = Part(first, first + count - 1, embedding=i == 0, head=i == len(devices) - 1)
            memory = self._estimate.memory(part, self._arrangement, device)
            seconds = self._estimate.micro_batch_seconds(part, self._arrangement, device)
            stages.append(Stage(device, part, memory, seconds))
            first += count
        return tuple(stages)

    def _sample_part(self, layers: int, embedding: bool, head: bool) -> Part:
        first = 0 if embedding else self.num_layers - layers if head else 1
        return Part(first, first + layers - 1, embedding, head)


def place_by_memory(costs: StageCosts, devices: Sequence[Device]) -> tuple[Stage, ...]:
    """The cut over devices, in their order, whose fullest device is least full."""
    cost = _of_stage(costs.fullness, devices)
    return costs.stages(_hand_out(costs.num_layers, len(devices), cost), devices)


def place_by_time(costs: StageCosts, devices: Sequence[Device]) -> tuple[Stage, ...] | None:
    """The cut over devices, in their order, whose slowest stage is fastest while all fit; None if none fits."""
    fill = _of_stage(costs.fullness, devices)
    if any(fill(i, 1) > 1 for i in range(len(devices))):
        return None
    seconds = _of_stage(costs.seconds, devices)

    def seconds_if_it_fits(stage: int, layers: int) -> float:
        return seconds(stage, layers) if fill(stage, layers) <= 1 else float("inf")

    counts = _hand_out(costs.num_layers, len(devices), seconds_if_it_fits)
    stages = costs.stages(counts, devices)
    return stages if all(stage.fits for stage in stages) else None


def stage_orders(devices: Sequence[Device]) -> tuple[tuple[Device, ...], ...]:
    """Orders of the devices worth trying, the natural one first.

    Only the first and the last stage differ in cost (embedding, head), so for unequal devices every choice of those
    two is tried, with the rest in natural order; equal devices need no second order.
    """
    orders = [tuple(devices)]
    seen = {(_kind_of(devices[0]), _kind_of(devices[-1]))}
    for first in devices:
        for last in devices:
            ends = (_kind_of(first), _kind_of(last))
            if first is not last and ends not in seen:
                seen.add(ends)
                middle = (d for d in devices if d is not first and d is not last)
                orders.append((first, *middle, last))
    return tuple(orders)


def best_order(
    costs: StageCosts,
    devices: Sequence[Device],
    place: Callable[[StageCosts, Sequence[Device]], tuple[Stage, ...] | None],
    objective: Callable[[Sequence[Stage]], float],
) -> tuple[Stage, ...] | None:
    """The best placement over all orders worth trying; the natural order unless another is clearly better."""
    best: tuple[Stage, ...] | None = None
    for order in stage_orders(devices):
        stages = place(costs, order)
        if stages is not None and (best is None or objective(stages) < objective(best) * CLEARLY_BETTER):
            best = stages
    return best


def fullest(stages: Sequence[Stage]) -> float:
    """The largest fullness of all stages."""
    return max(stage.fullness for stage in stages)


def slowest(stages: Sequence[Stage]) -> float:
    """The slowest stage's device seconds."""
    return max(stage.device_seconds for stage in stages)


def _kind_of(device: Device) -> tuple[str, int, int]:
    # Equal cards differ by a few MiB in use; a tenth of a GiB is no reason to reorder them.
    return (device.name, device.capacity_bytes, device.free_bytes // (2**30 // 10))


def _of_stage(
    cost: Callable[[int, bool, bool, Device], float], devices: Sequence[Device]
) -> Callable[[int, int], float]:
    last = len(devices) - 1
    return lambda stage, layers: cost(layers, stage == 0, stage == last, devices[stage])


def _hand_out(num_layers: int, num_stages: int, cost: Callable[[int, int], float]) -> list[int]:
    """Layers of each stage such that the largest cost(stage, layers) is smallest."""
    if num_stages > num_layers:
        raise ValueError(f"{num_layers} layers cannot fill {num_stages} stages")
    if num_stages == 1:
        return [num_layers]
    counts = [1] * num_stages
    with_one_more = [cost(stage, 2) for stage in range(num_stages)] if num_layers > num_stages else []
    for _ in range(num_layers - num_stages):
        stage = min(range(num_stages), key=with_one_more.__getitem__)
        counts[stage] += 1
        with_one_more[stage] = cost(stage, counts[stage] + 1)
    return counts
