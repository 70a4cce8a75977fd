"""What each device of a running plan has in use, read from outside: through NVML for GPUs, so without a CUDA context,
and from the worker processes on a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from parallel_tune.hardware import probe_details
from parallel_tune.nvml import used_bytes
from parallel_tune.rundir import RunDir
from strategies.contracts import Plan


@dataclass(frozen=True)
class Reading:
    """One device at one moment.

    Attributes:
        busy_share: the share of the last moments in which it worked, 0 to 1.
    """

    used_bytes: int
    busy_share: float


Gauge = Callable[[], list[Reading | None]]
"""A reading for each device of the plan, in its order; None for one that cannot be read."""


def open_gauge(plan: Plan, run: RunDir, environ: Mapping[str, str]) -> Gauge:
    """The gauge for a plan's devices."""
    if plan.devices[0].kind == "cpu":
        return cpu_gauge(plan, run)
    import pynvml

    uuids = probe_details(environ).uuids
    return nvml_gauge(pynvml, [uuids[device.index] for device in plan.devices])


def nvml_gauge(nvml: Any, uuids: list[str]) -> Gauge:
    """Reads GPUs by their identity. NVML stays open as long as this process lives."""
    nvml.nvmlInit()
    handles = [nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]

    def read(handle: Any) -> Reading | None:
        try:
            try:
                used = used_bytes(nvml, handle)
            except nvml.NVMLError:
                used = nvml.nvmlDeviceGetMemoryInfo(handle).used
            return Reading(int(used), nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
        except nvml.NVMLError:
            return None

    return lambda: [read(handle) for handle in handles]


def cpu_gauge(plan: Plan, run: RunDir) -> Gauge:
    """Reads the workers' resident memory. Where one process holds several devices they cannot be told apart."""
    processes: dict[int, psutil.Process] = {}
    cores = len(os.sched_getaffinity(0)) / plan.processes

    def read(rank: int) -> Reading | None:
        try:
            process = processes.get(rank) or psutil.Process(int(run.process_id(rank).read_text()))
            processes[rank] = process
            return Reading(process.memory_info().rss, min(1.0, process.cpu_percent() / 100 / cores))
        except (OSError, ValueError, psutil.Error):
            processes.pop(rank, None)
            return None

    if plan.processes < len(plan.devices):
        return lambda: [None] * len(plan.devices)
    return lambda: [read(rank) for rank in range(plan.processes)]
