"""Whether a predicted peak fits a device, how full it makes it, and the words that say so."""

from __future__ import annotations

from collections.abc import Sequence

from strategies.contracts import Device, DevicePlan, MemoryEstimate

SAFETY_MARGIN = 0.03
"""Share of the free memory that no plan touches.

It covers what a closed form cannot see: allocator fragmentation, a library that loads its workspace late, a desktop
that opens a window. The estimate already counts context and reserve, so this is for its error alone.
"""

GIB = 2**30


def usable_bytes(device: Device | DevicePlan) -> int:
    """What a plan may fill of a device: its free memory less the safety margin."""
    return int(device.free_bytes * (1 - SAFETY_MARGIN))


def fullness(peak_bytes: int, device: Device | DevicePlan) -> float:
    """Predicted use over usable memory; a peak fits when this is at most 1."""
    usable = usable_bytes(device)
    return peak_bytes / usable if usable > 0 else float("inf")


def gib(num_bytes: float) -> str:
    """Bytes as GiB with one decimal, e.g. "79.6 GiB"."""
    return f"{num_bytes / GIB:.1f} GiB"


def need(memory: MemoryEstimate) -> str:
    """What an estimate needs, in words: the predicted peak, and what past runs teach to leave beside it."""
    more = f" (and {gib(memory.caution_bytes)} that past runs here used beyond theirs)" if memory.caution_bytes else ""
    return gib(memory.peak_bytes) + more


def shortfall_bytes(device: DevicePlan) -> int:
    """Bytes by which a planned device is too small; 0 where it fits."""
    return max(0, device.memory.needed_bytes - usable_bytes(device))


MOST_APART = 2
"""Devices alike that have a sentence each."""


def shortfall_lines(devices: Sequence[DevicePlan]) -> tuple[str, ...]:
    """A sentence for each device that is too small for its share of the plan, or for many that are so alike."""
    alike: dict[tuple[str, str, str], list[int]] = {}
    for device in devices:
        if shortfall_bytes(device) > 0:
            has = f"{gib(usable_bytes(device))} usable, {gib(shortfall_bytes(device))} short"
            indices = alike.setdefault((device.name, need(device.memory), has), [])
            if device.index not in indices:
                indices.append(device.index)
    lines: list[str] = []
    for (name, needs, has), indices in alike.items():
        if len(indices) > MOST_APART:
            shown = f"{', '.join(map(str, indices[:-1]))} and {indices[-1]}"
            lines.append(f"devices {shown} ({name}) each need {needs} and have {has}")
        else:
            lines += [f"device {index} ({name}) needs {needs} and has {has}" for index in indices]
    return tuple(lines)
