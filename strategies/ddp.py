"""`ddp`: one process and one whole replica of the model per device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from strategies.base import Estimator
from strategies.batching import DEFAULT_ACCUMULATION, DEFAULT_MICRO_BATCH, Batching, batching
from strategies.candidate import (
    Candidate,
    capture_choices,
    checkpointing_choices,
    choose,
    held_back_reasons,
    left_out_reasons,
    noun,
    to_plan,
)
from strategies.contracts import Arrangement, Device, Hardware, Part, Plan, Verdict, Workload
from strategies.devices import device_sets, unequal_speed
from strategies.errors import ConfigError
from strategies.fit import gib, need, usable_bytes
from strategies.placement import Stage

if TYPE_CHECKING:
    from strategies.base import Session

ALL_REDUCE_BYTES_PER_SECOND = {"cuda": 2e10, "cpu": 1e9}
"""Assumed rate at which gradients are summed over processes: PCIe 4 without NVLink, or gloo on the loopback."""


class DDP:
    """Replicate the model: each device trains its share of the global batch, and gradients are summed once a step."""

    name = "ddp"
    auto_order = 10

    def assess(self, workload: Workload, hardware: Hardware, estimate: Estimator) -> Verdict:
        """Whether a replica fits some device, with the numbers that decide it."""
        plan = self.plan(workload, hardware, estimate)
        return Verdict(plan.fits, plan.reasons[0])

    def plan(self, workload: Workload, hardware: Hardware, estimate: Estimator) -> Plan:
        """On all devices that hold a replica: the fastest micro-batch and checkpointing that fit each of them."""
        candidates: list[Candidate] = []
        contradiction: ConfigError | None = None
        for devices in device_sets(workload, hardware):
            enough = any(c.fits and len(c.stages) > len(devices) for c in candidates)
            if enough and not unequal_speed(hardware.devices):
                break
            try:
                batch = batching(workload, len(devices))
            except ConfigError as error:
                contradiction = contradiction or error
                continue
            candidates += _candidates(workload, devices, batch, estimate)
        if contradiction is not None:
            candidates = _settle(contradiction, workload, hardware, estimate)
        # All devices that hold a replica work, as the user expects; that a slow one costs more than it adds is said.
        chosen = choose(candidates, may_leave_out_slow=False)
        reasons = (
            _reason(chosen),
            *_idle_reasons(chosen),
            *held_back_reasons(chosen, candidates),
        )
        left_out = left_out_reasons(chosen, candidates, hardware.devices)
        return to_plan(self.name, workload, chosen, {"": "local_rank"}, reasons, left_out)

    def open(self, plan: Plan, timeout_seconds: int) -> Session:
        """Open the session of this rank."""
        from strategies.sessions import open_replica

        return open_replica(plan, timeout_seconds)


def _candidates(
    workload: Workload, devices: tuple[Device, ...], batch: Batching, estimate: Estimator
) -> list[Candidate]:
    found = []
    for checkpointing in checkpointing_choices(workload, devices[0]):
        for captured in capture_choices(workload, checkpointing):
            for micro_batch, steps in batch.candidates:
                arrangement = Arrangement(len(devices), micro_batch, steps, checkpointing, captured=captured)
                candidate = _candidate(workload, devices, batch.global_batch, arrangement, estimate)
                found.append(candidate)
                if not candidate.fits:
                    break  # larger micro-batches need more
    return found


def _candidate(
    workload: Workload, devices: tuple[Device, ...], global_batch: int, arrangement: Arrangement, estimate: Estimator
) -> Candidate:
    whole = Part(0, workload.num_layers - 1, embedding=True, head=True)
    first_alike: dict[Device, Stage] = {}
    replicas = []
    for device in devices:
        alike = replace(device, index=0)
        if alike not in first_alike:
            memory = estimate.memory(whole, arrangement, device)
            first_alike[alike] = Stage(device, whole, memory, estimate.micro_batch_seconds(whole, arrangement, device))
        replicas.append(replace(first_alike[alike], device=device))
    # Ranks wait for each other once a step, and a rank issues its next kernels while its device still works.
    slowest = max(*(r.device_seconds for r in replicas), estimate.host_seconds(whole, arrangement))
    seconds = arrangement.gradient_accumulation_steps * slowest + _all_reduce_seconds(replicas)
    return Candidate(arrangement, global_batch, tuple(replicas), seconds, workload.sequence_length)


def _all_reduce_seconds(replicas: Sequence[Stage]) -> float:
    # A ring sends and receives each gradient 2 (p - 1) / p times.
    processes = len(replicas)
    rate = ALL_REDUCE_BYTES_PER_SECOND[replicas[0].device.kind]
    return 2 * (processes - 1) / processes * replicas[0].memory.gradients_bytes / rate


def _settle(contradiction: ConfigError, workload: Workload, hardware: Hardware, estimate: Estimator) -> list[Candidate]:
    """The user's batch numbers suit another number of processes: their error, unless no replica fits anyway."""
    micro = workload.micro_batch or DEFAULT_MICRO_BATCH
    steps = workload.gradient_accumulation_steps or DEFAULT_ACCUMULATION
    candidates: list[Candidate] = []
    for devices in device_sets(workload, hardware):
        batch = Batching(micro * steps * len(devices), ((micro, steps),))
        candidates += _candidates(workload, devices, batch, estimate)
        if any(c.fits for c in candidates):
            raise contradiction
    return candidates


def _reason(chosen: Candidate) -> str:
    fullest = max(chosen.stages, key=lambda stage: stage.fullness)
    device = fullest.device
    needs = f"a replica needs {need(fullest.memory)} a {noun(device)} {chosen.how}"
    room = f"{gib(device.free_bytes)} free, {gib(usable_bytes(device))} of it usable"
    if not chosen.fits:
        return f"{needs}; the largest {noun(device)}, device {device.index} ({device.name}), has {room}"
    if len(chosen.stages) == 1:
        return f"{needs}; device {device.index} ({device.name}) has {room}"
    which = f"the fullest, device {device.index} ({device.name}), has {room}"
    return f"{needs} and fits each of {len(chosen.stages)}; {which}"


def _idle_reasons(chosen: Candidate) -> tuple[str, ...]:
    processes, rows = len(chosen.stages), chosen.global_batch
    if not chosen.fits or rows >= processes:
        return ()
    return (
        f"{processes} processes for a global batch of {rows}: {processes - rows} without a row in each step; "
        f"--max_devices {rows} leaves them out, and a larger global batch has work for all",
    )
