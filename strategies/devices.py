"""Which sets of a machine's devices are worth planning for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from strategies.contracts import Device, Hardware, Workload
from strategies.errors import ConfigError


def device_sets(workload: Workload, hardware: Hardware) -> tuple[tuple[Device, ...], ...]:
    """Sets of devices, larger ones first: all allowed, then with the least free or the slowest dropped.

    Dropping in any other order cannot help: the smallest card is what does not fit, the slowest what holds back.
    """
    if not hardware.devices:
        raise ConfigError("no device to plan for.", "Declare the hardware, e.g. --hardware cpu:1.")
    if workload.max_devices is not None and workload.max_devices < 1:
        raise ConfigError(f"max_devices must be at least 1, not {workload.max_devices}.", "Give a positive number.")
    most = min(len(hardware.devices), workload.max_devices or len(hardware.devices))
    by_memory = sorted(hardware.devices, key=lambda d: (-d.free_bytes, d.index))
    by_speed = sorted(hardware.devices, key=lambda d: (-d.matmul_flops_per_second, -d.free_bytes, d.index))
    sets: list[tuple[Device, ...]] = []
    for size in range(most, 0, -1):
        for ranked in (by_memory, by_speed):
            chosen = tuple(sorted(ranked[:size], key=lambda d: d.index))
            if chosen not in sets:
                sets.append(chosen)
    return tuple(sets)


def staged(devices: Sequence[Device], workload: Workload) -> tuple[Device, ...]:
    """The device of each of `workload.stages` stages; devices that hold several count as several smaller ones."""
    stages = workload.stages or len(devices)
    if not 2 <= stages <= workload.num_layers:
        raise ConfigError(
            f"{stages} stages cannot be made of {workload.num_layers} layers.",
            f"Give stages from 2 to {workload.num_layers}.",
        )
    used = devices[:stages]
    result: list[Device] = []
    for position, device in enumerate(used):
        count = stages // len(used) + (position < stages % len(used))
        # Memory is divided; the device works on one stage at a time, at its full rate.
        part = replace(device, capacity_bytes=device.capacity_bytes // count, free_bytes=device.free_bytes // count)
        result += [part] * count
    return tuple(result)


def unequal_speed(devices: Sequence[Device]) -> bool:
    """Whether leaving out a slow device could make the others faster."""
    rates = [d.matmul_flops_per_second for d in devices]
    return max(rates) > 1.01 * min(rates)
