"""`model_parallel`: one process, the layers of one model split over the devices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from strategies.base import Estimator
from strategies.batching import batching
from strategies.candidate import (
    Candidate,
    capture_choices,
    checkpointing_choices,
    choose,
    left_out_reasons,
    noun,
    over_devices,
    to_plan,
)
from strategies.contracts import Arrangement, Checkpointing, Device, Hardware, Plan, Verdict, Workload
from strategies.devices import device_sets, staged, unequal_speed
from strategies.fit import gib, need, usable_bytes
from strategies.lane_words import lane_reasons
from strategies.placement import Stage, StageCosts, best_order, fullest, place_by_memory, place_by_time, slowest

if TYPE_CHECKING:
    from strategies.base import Session

LANES_AVAILABLE = True
"""Whether the lane engine can carry out plans with several micro-batches in flight."""


class ModelParallel:
    """Split the model: each device holds consecutive layers, and micro-batches pass through all of them.

    Attributes:
        lanes_available: whether plans may keep several micro-batches in flight.
    """

    name = "model_parallel"
    auto_order = 20

    def __init__(self, lanes_available: bool = LANES_AVAILABLE) -> None:
        self.lanes_available = lanes_available

    def assess(self, workload: Workload, hardware: Hardware, estimate: Estimator) -> Verdict:
        """Whether the split fits, with the numbers that decide it."""
        plan = self.plan(workload, hardware, estimate)
        return Verdict(plan.fits, plan.reasons[0])

    def plan(self, workload: Workload, hardware: Hardware, estimate: Estimator) -> Plan:
        """The fastest split that fits, over all devices that can hold a part."""
        batch = batching(workload, processes=1)
        candidates: list[Candidate] = []
        for devices in _sets(workload, hardware):
            if candidates and not _worth_dropping(candidates, hardware):
                break
            for checkpointing, lanes, captured in self._all_ways(workload, devices):
                for micro_batch, steps in batch.candidates:
                    arrangement = Arrangement(
                        1, micro_batch, steps, checkpointing, min(lanes, steps), len(devices), captured
                    )
                    candidate = _candidate(workload, devices, batch.global_batch, arrangement, estimate)
                    candidates.append(candidate)
                    if not candidate.fits:
                        break  # larger micro-batches need more
        if workload.force_lanes:
            candidates = [c for c in candidates if c.arrangement.lanes > 1] or candidates
        chosen = choose(candidates, may_leave_out_slow=True)
        reasons = (
            _reason(chosen),
            *lane_reasons(chosen, candidates, workload),
        )
        left_out = left_out_reasons(chosen, candidates, hardware.devices)
        return to_plan(self.name, workload, chosen, device_map(workload, chosen.stages), reasons, left_out)

    def open(self, plan: Plan, timeout_seconds: int) -> Session:
        """Open the session of the one process."""
        from strategies.sessions import open_split

        return open_split(plan)

    def _all_ways(self, workload: Workload, devices: Sequence[Device]) -> Iterator[tuple[Checkpointing, int, bool]]:
        """Each of `_ways`, captured and not, as far as it may be."""
        for checkpointing, lanes in self._ways(workload, devices):
            for captured in capture_choices(workload, checkpointing):
                yield checkpointing, lanes, captured

    def _ways(self, workload: Workload, devices: Sequence[Device]) -> Iterator[tuple[Checkpointing, int]]:
        """Forms of checkpointing, and lanes.

        Unsloth's offloaded checkpoints keep buffers that are the whole process's: lanes keep layer inputs on the device
        in their place, for a user who asked for offloading too.
        """
        asked = workload.gradient_checkpointing
        for checkpointing in checkpointing_choices(workload, devices[0]):
            for lanes in self._lane_choices(workload, devices):
                if lanes == 1 or checkpointing != "unsloth":
                    yield checkpointing, lanes
                elif asked == "unsloth":
                    yield "full", lanes

    def _lane_choices(self, workload: Workload, devices: Sequence[Device]) -> tuple[int, ...]:
        if not self.lanes_available or not workload.pipeline or len(devices) == 1:
            return (1,)
        # As many as stages: a lane that waits for its turn would only hold memory.
        lanes = workload.lanes or len(devices)
        # Virtual devices of one CPU share its cores, and stages of one GPU the GPU: nothing would overlap.
        overlap = devices[0].kind == "cuda" and len({device.index for device in devices}) > 1
        return (lanes,) if workload.force_lanes else (1, lanes) if overlap else (1,)


def device_map(workload: Workload, stages: Sequence[Stage]) -> dict[str, int | str]:
    """Module name -> device index, explicit for every module of the model."""
    names = workload.modules
    first, last = stages[0].device.index, stages[-1].device.index
    layers = {
        f"{names.layers}.{layer}": stage.device.index
        for stage in stages
        for layer in range(stage.part.first_layer, stage.part.last_layer + 1)
    }
    return {
        **dict.fromkeys(names.embedding, first),
        **layers,
        **dict.fromkeys(names.tail, last),
        # A tied weight is loaded once, where the embedding is.
        names.head: first if workload.tied_embeddings else last,
    }


def step_seconds(stages: Sequence[Stage], host_seconds: float, micro_batches: int, lanes: int) -> float:
    """Predicted seconds of an optimizer step.

    With one lane, stages work one after another. With lanes they overlap: the first micro-batch fills the pipeline and
    the busiest device paces the rest, which for p equal stages is the bound p m / (m + p - 1) of the naive speed; fewer
    lanes than stages keep no more than so many at work. The one process issues all kernels, so it never gets below the
    host's time.
    """
    once = sum(stage.device_seconds for stage in stages)
    if lanes == 1:
        return micro_batches * max(once, host_seconds)
    paced = max(once + (micro_batches - 1) * _busiest(stages), micro_batches * once / lanes)
    return max(paced, micro_batches * host_seconds)


def _busiest(stages: Sequence[Stage]) -> float:
    """Seconds of a micro-batch on the device that works longest at it; virtual devices are all one CPU."""
    seconds: dict[int, float] = defaultdict(float)
    for stage in stages:
        seconds[stage.device.index if stage.device.kind == "cuda" else 0] += stage.device_seconds
    return max(seconds.values())


def _worth_dropping(candidates: Sequence[Candidate], hardware: Hardware) -> bool:
    """Whether fewer devices than those tried so far could do better.

    Where these hold the model, only by leaving out a slow one. Where they do not, only if some device was overfull
    with a single layer: else a cut over fewer devices has no less on the others, and the best cut was too full.
    """
    if any(c.fits for c in candidates):
        return unequal_speed(hardware.devices)
    return any(stage.part.num_layers == 1 and not stage.fits for c in candidates for stage in c.stages)


def _sets(workload: Workload, hardware: Hardware) -> list[tuple[Device, ...]]:
    if workload.stages is not None:
        return [staged(device_sets(workload, hardware)[0], workload)]
    # Every stage holds a layer at least.
    return [s for s in device_sets(workload, hardware) if len(s) <= workload.num_layers]


def _candidate(
    workload: Workload, devices: tuple[Device, ...], global_batch: int, arrangement: Arrangement, estimate: Estimator
) -> Candidate:
    costs = StageCosts(workload.num_layers, arrangement, estimate)
    stages = best_order(costs, devices, place_by_time, slowest) if arrangement.lanes > 1 else None
    stages = stages or best_order(costs, devices, place_by_memory, fullest)
    assert stages is not None  # place_by_memory always answers
    host = sum(estimate.host_seconds(stage.part, arrangement) for stage in stages)
    seconds = step_seconds(stages, host, arrangement.gradient_accumulation_steps, arrangement.lanes)
    return Candidate(arrangement, global_batch, stages, seconds, workload.sequence_length, host)


def _reason(chosen: Candidate) -> str:
    stages = chosen.stages
    full = max(stages, key=lambda stage: stage.fullness)
    kind = noun(full.device)
    devices = len({stage.device.index for stage in stages})
    over = f"split {over_devices(len(stages), devices, kind)}" if len(stages) > 1 else f"whole on one {kind}"
    total = sum(stage.memory.peak_bytes for stage in stages)
    return (
        f"{over} the model needs {gib(total)} in all {chosen.how}; the fullest, device {full.device.index} "
        f"({full.device.name}), needs {need(full.memory)} and has {gib(full.device.free_bytes)} free, "
        f"{gib(usable_bytes(full.device))} of it usable"
    )
