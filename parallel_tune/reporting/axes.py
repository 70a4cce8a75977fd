"""Axes with few, round ticks, and numbers as people write them."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """A linear scale from `low` to `high`, with its round ticks inside."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        """Where a value lies: 0 at `low`, 1 at `high`."""
        return (value - self.low) / (self.high - self.low)

    def labels(self) -> list[str]:
        """The ticks with the digits that they need, e.g. "1,500", "0.25", "0.5e-4"."""
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else 1.0
        largest = max((abs(tick) for tick in self.ticks), default=0.0)
        exponent = _exponent(largest) if 0 < largest < 5e-3 else 0
        digits = max(0, exponent - _exponent(step))
        ending = f"e{exponent}" if exponent else ""
        return [f"{tick / 10.0**exponent:,.{digits}f}{ending}" if tick else "0" for tick in self.ticks]


def make_axis(
    values: list[float], count: int = 5, whole: bool = False, zero: bool = False, tight: bool = False
) -> Axis:
    """An axis for these values.

    Args:
        count: about how many ticks.
        whole: ticks at whole numbers only.
        zero: begin at zero.
        tight: end at the values themselves rather than at a tick.
    """
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    low = min(low, 0.0) if zero else low
    if high - low < 1e-9 * max(1e-3, abs(low), abs(high)):
        # One value: some room around it.
        room = 0.1 * abs(high) if abs(high) > 1e-12 else 1.0
        low, high = low if zero else low - room, high + room
    if whole:
        low, high = float(math.floor(low)), float(math.ceil(high))
    step = round_step((high - low) / count)
    if whole:
        step = max(1.0, step)
    if not tight:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        high = max(high, low + step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, tuple(index * step for index in range(first, last + 1)))


def round_step(rough: float) -> float:
    """The 1, 2 or 5 times a power of ten that is nearest above."""
    power = 10.0 ** math.floor(math.log10(rough))
    return float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9)))


def _exponent(value: float) -> int:
    return math.floor(math.log10(value) + 1e-9)


def size(num_bytes: float) -> str:
    """Bytes in GiB, or in MiB where GiB would show nothing."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
