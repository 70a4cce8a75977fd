"""What a plan says of its lanes: what they gain, why there are none, and how busy each device will be."""

from __future__ import annotations

from collections.abc import Sequence

from strategies.candidate import Candidate
from strategies.contracts import Workload
from strategies.fit import gib, need, usable_bytes


def lane_reasons(chosen: Candidate, candidates: Sequence[Candidate], workload: Workload) -> tuple[str, ...]:
    """The sentences on the schedule of a split; none where one device holds the model.

    Args:
        candidates: all that were looked at.
    """
    if len(chosen.stages) == 1:
        return (
            ("no lanes: one device holds the whole model; --stages 2 splits it there",) if workload.force_lanes else ()
        )
    if chosen.arrangement.lanes == 1:
        return (f"no lanes, one micro-batch at a time: {_why_none(chosen, candidates, workload)}", _busy(chosen))
    lanes = chosen.arrangement.lanes
    fewer = lanes < (workload.lanes or lanes)
    if chosen.stages[0].device.kind == "cpu" or len({stage.device.index for stage in chosen.stages}) == 1:
        asked = "" if fewer else ", as was asked for"
        said = [f"{lanes} lanes{asked}; the stages share one device: little is gained"]
    else:
        said = _gain(chosen)
    if fewer:
        said.append(f"{lanes} lanes in place of {workload.lanes}: a step has no more micro-batches")
    if workload.gradient_checkpointing == "unsloth":
        said.append(
            "checkpointing full in place of unsloth: offloading keeps buffers that are the whole process's, so lanes "
            "keep layer inputs on the device, which the figures count; --pipeline off offloads them"
        )
    return tuple(said)


def _gain(chosen: Candidate) -> list[str]:
    stages, m, lanes = chosen.stages, chosen.arrangement.gradient_accumulation_steps, chosen.arrangement.lanes
    naive = m * max(chosen.host_seconds, sum(stage.device_seconds for stage in stages))
    times = naive / chosen.step_seconds
    gain = f"{lanes} lanes keep the cards busy: {times:.2f}x of one micro-batch at a time is predicted"
    if len({stage.device.index for stage in stages}) < len(stages):
        return [gain, _busy(chosen)]  # the bound is one of stages that have a device each
    bound = len(stages) * m / (m + len(stages) - 1)
    return [
        f"{gain}; {bound:.2f}x is the bound for {m} micro-batches on {len(stages)} equal stages",
        f"{_busy(chosen)}; {m}/{m + len(stages) - 1} = {m / (m + len(stages) - 1):.0%} would be each stage's if all "
        "took as long",
    ]


def _busy(chosen: Candidate) -> str:
    m = chosen.arrangement.gradient_accumulation_steps
    seconds: dict[int, float] = {}
    for stage in chosen.stages:
        seconds[stage.device.index] = seconds.get(stage.device.index, 0.0) + m * stage.device_seconds
    shares = ", ".join(f"{busy / chosen.step_seconds:.0%} of device {index}" for index, busy in seconds.items())
    return f"busy share expected: {shares}"


def _why_none(chosen: Candidate, candidates: Sequence[Candidate], workload: Workload) -> str:
    same = [c for c in candidates if len(c.stages) == len(chosen.stages)]
    in_lanes = [c for c in same if c.arrangement.lanes > 1]
    if not workload.pipeline:
        return "--pipeline off"
    if workload.lanes == 1:
        return "--lanes 1"
    if chosen.stages[0].device.kind == "cpu" and not workload.force_lanes:
        return "virtual devices share one CPU, so nothing is gained; --pipeline on does it all the same"
    if len({stage.device.index for stage in chosen.stages}) == 1 and not workload.force_lanes:
        return "all stages share one device, so nothing is gained; --pipeline on does it all the same"
    if not in_lanes:
        return "an optimizer step is a single micro-batch; a larger global batch, or a smaller micro-batch, makes more"
    fitting = [c for c in in_lanes if c.fits]
    if not fitting:
        closest = min(in_lanes, key=lambda c: c.fullness)
        full = max(closest.stages, key=lambda stage: stage.fullness)
        return (
            f"the activations of {closest.arrangement.lanes} micro-batches at once do not fit: {closest.how} device "
            f"{full.device.index} ({full.device.name}) would need {need(full.memory)}, and "
            f"{gib(usable_bytes(full.device))} of it is usable"
        )
    best = max(fitting, key=lambda c: c.tokens_per_second)
    return (
        f"{best.arrangement.lanes} lanes {best.how} are predicted at {best.tokens_per_second:,.0f} tokens/s, this at "
        f"{chosen.tokens_per_second:,.0f}: the host that issues the work, not the devices, sets the pace"
    )
