"""One way of carrying out the workload, with what it costs, and the choice among several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from strategies.contracts import Arrangement, Checkpointing, Device, DevicePlan, Plan, Workload
from strategies.fit import gib, usable_bytes
from strategies.placement import Stage, fullest

SPEED_TIE = 0.01
"""Predicted speeds closer than this share are equal: the simpler or emptier plan is taken."""

WORTH_LEAVING_OUT = 1.10
"""A faster device works alone only if the plan without the slower one is predicted to be this much faster."""

ABOUT_AS_CLOSE = 1.05
"""Plans that miss by no more than this factor of the smallest miss are shown on as many devices as they have."""

CHECKPOINTING_WORDS: Mapping[Checkpointing, str] = {
    "none": "without checkpointing",
    "full": "with checkpointing",
    "unsloth": "with offloaded checkpointing",
}
_CHECKPOINTING_RANK: Mapping[Checkpointing, int] = {"none": 0, "unsloth": 1, "full": 2}


@dataclass(frozen=True)
class Candidate:
    """An arrangement on certain devices. `stages` are replicas, or the parts of a split in their order.

    Attributes:
        host_seconds: of issuing one micro-batch through all parts of a split.
    """

    arrangement: Arrangement
    global_batch: int
    stages: tuple[Stage, ...]
    step_seconds: float
    sequence_length: int
    host_seconds: float = 0.0

    @property
    def fits(self) -> bool:
        return all(stage.fits for stage in self.stages)

    @property
    def fullness(self) -> float:
        """Of the fullest device."""
        return fullest(self.stages)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the global batch, rows full, over the predicted seconds of a step."""
        return self.global_batch * self.sequence_length / self.step_seconds if self.step_seconds > 0 else 0.0

    @property
    def slowest_rate(self) -> float:
        """FLOP per second of the slowest device."""
        return min(stage.device.matmul_flops_per_second for stage in self.stages)

    @property
    def how(self) -> str:
        """E.g. "at micro-batch 2 with checkpointing"."""
        words = CHECKPOINTING_WORDS[self.arrangement.gradient_checkpointing]
        return f"at micro-batch {self.arrangement.micro_batch} {words}"


def checkpointing_choices(workload: Workload, device: Device) -> tuple[Checkpointing, ...]:
    """The forms of activation checkpointing that a plan may choose: what the user said, or all that the engine has."""
    if workload.gradient_checkpointing is not None:
        return (workload.gradient_checkpointing,)
    if workload.engine == "unsloth" and device.kind == "cuda":
        return ("none", "unsloth", "full")
    return ("none", "full")


def capture_choices(workload: Workload, checkpointing: Checkpointing) -> tuple[bool, ...]:
    """Whether a plan may capture its steps, and may leave it; none where it must and cannot."""
    if not workload.capture or checkpointing != "none":
        return () if workload.force_capture else (False,)
    # A captured step needs more memory: where it does not fit, the same run eagerly may.
    return (True,) if workload.force_capture else (True, False)


def choose(candidates: Sequence[Candidate], may_leave_out_slow: bool) -> Candidate:
    """The fastest that fits, on as many devices as do; if none fits, the one that comes closest.

    `may_leave_out_slow` lets a faster plan on fewer devices win, where the others are slower devices.
    """
    fitting = [c for c in candidates if c.fits]
    if not fitting:
        closest = min(c.fullness for c in candidates)
        close = [c for c in candidates if c.fullness <= closest * ABOUT_AS_CLOSE]
        return min(close, key=lambda c: (-len(c.stages), c.fullness))
    sizes = sorted({len(c.stages) for c in fitting}, reverse=True)
    best = _fastest([c for c in fitting if len(c.stages) == sizes[0]])
    for size in sizes[1:] if may_leave_out_slow else ():
        smaller = _fastest([c for c in fitting if len(c.stages) == size])
        # Equal devices are never left idle for a predicted gain; only a slower one can hold the others back.
        if (
            smaller.slowest_rate > best.slowest_rate
            and smaller.tokens_per_second > best.tokens_per_second * WORTH_LEAVING_OUT
        ):
            best = smaller
    return best


def left_out_reasons(chosen: Candidate, candidates: Sequence[Candidate], devices: Sequence[Device]) -> tuple[str, ...]:
    """A sentence for each device that the chosen plan does not use."""
    if not chosen.fits:
        return ()
    used = {stage.device.index for stage in chosen.stages}
    reasons = []
    for device in devices:
        if device.index in used:
            continue
        with_it = [c for c in candidates if any(s.device.index == device.index for s in c.stages)]
        what = f"device {device.index} ({device.name}, {gib(usable_bytes(device))} usable) is left out: "
        if any(c.fits for c in with_it):
            speed = choose(with_it, may_leave_out_slow=False).tokens_per_second
            what += f"with it {speed:,.0f} tokens/s are predicted, without it {chosen.tokens_per_second:,.0f}"
        elif with_it:
            needs = min(s.memory.peak_bytes for c in with_it for s in c.stages if s.device.index == device.index)
            what += f"its share would need {gib(needs)}"
        else:
            what += "the plan has no use for it"
        reasons.append(what)
    return tuple(reasons)


def held_back_reasons(chosen: Candidate, candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """A sentence where fewer, faster devices alone would be faster."""
    faster = choose(candidates, may_leave_out_slow=True)
    if not chosen.fits or len(faster.stages) == len(chosen.stages):
        return ()
    slow = {s.device.index: s.device.name for s in chosen.stages if s.device not in [f.device for f in faster.stages]}
    names = ", ".join(f"device {index} ({name})" for index, name in slow.items())
    return (
        f"{names} holds the others back: without it {faster.tokens_per_second:,.0f} tokens/s are predicted, with it "
        f"{chosen.tokens_per_second:,.0f}; --max_devices {len(faster.stages)} leaves it out",
    )


def noun(device: Device) -> str:
    """What the words call a device."""
    return "card" if device.kind == "cuda" else "virtual device"


def to_plan(
    strategy: str,
    workload: Workload,
    chosen: Candidate,
    device_map: Mapping[str, int | str],
    reasons: Sequence[str],
    left_out: Sequence[str],
) -> Plan:
    """The plan that carries out a candidate.

    Args:
        left_out: further reasons, on the devices that it does not use.
    """
    arrangement = chosen.arrangement
    return Plan(
        strategy=strategy,
        fits=chosen.fits,
        engine=workload.engine,
        processes=arrangement.processes,
        devices=tuple(_device_plan(stage) for stage in chosen.stages),
        device_map=dict(device_map),
        micro_batch=arrangement.micro_batch,
        gradient_accumulation_steps=arrangement.gradient_accumulation_steps,
        global_batch=chosen.global_batch,
        gradient_checkpointing=arrangement.gradient_checkpointing,
        predicted_tokens_per_second=round(chosen.tokens_per_second, 1),
        lanes=arrangement.lanes,
        captured=arrangement.captured,
        reasons=(*reasons, *left_out),
        left_out=tuple(left_out),
    )


def _fastest(candidates: Sequence[Candidate]) -> Candidate:
    top = max(c.tokens_per_second for c in candidates)
    equal = [c for c in candidates if c.tokens_per_second >= top * (1 - SPEED_TIE)]
    return min(
        equal,
        key=lambda c: (
            _CHECKPOINTING_RANK[c.arrangement.gradient_checkpointing],
            not c.arrangement.captured,
            c.arrangement.lanes,
            c.fullness,
        ),
    )


def _device_plan(stage: Stage) -> DevicePlan:
    device, memory = stage.device, stage.memory
    return DevicePlan(
        index=device.index,
        name=device.name,
        kind=device.kind,
        capacity_bytes=device.capacity_bytes,
        free_bytes=device.free_bytes,
        predicted_allocated_bytes=memory.allocated_bytes,
        predicted_peak_bytes=memory.peak_bytes,
        layers=(stage.part.first_layer, stage.part.last_layer),
        memory=memory,
    )


def over_devices(stages: int, devices: int, kind: str) -> str:
    """Where a split model lies, e.g. "over 2 cards", or "in 3 stages over 2 cards" where some share one."""
    where = f"over {devices} {kind}s" if devices > 1 else f"on 1 {kind}"
    return where if stages == devices else f"in {stages} stages {where}"
