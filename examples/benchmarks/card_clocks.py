"""How fast cards ran and what power they drew meanwhile: a card at its limit of power lowers its clock."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nvml_watch import NvmlWatch

INTERVAL_SECONDS = 0.02
BUSY_SHARE = 0.5
"""Of the most power that was seen: below, the card waited, whatever its clock."""


@dataclass
class _Samples:
    clocks_mhz: list[int] = field(default_factory=list)
    watts: list[float] = field(default_factory=list)
    capped: list[bool] = field(default_factory=list)


class CardClocks(NvmlWatch):
    """Watches the first cards; without NVML it sees nothing, and says so."""

    def __init__(self, cards: int, nvml: Any = None) -> None:
        super().__init__(INTERVAL_SECONDS, nvml)
        self._samples = [_Samples() for _ in range(cards)]

    def seen(self) -> list[dict[str, float]]:
        """Of each card: medians of the clock (MHz) and the power (W) while it worked, and the share of that time in
        which the driver held the clock down for the power's sake. Empty where nothing could be read."""
        found = []
        for card in self._samples:
            busy = [at for at, watts in enumerate(card.watts) if watts >= BUSY_SHARE * max(card.watts)]
            if not busy:
                return []
            found.append(
                {
                    "clock_mhz": statistics.median(card.clocks_mhz[at] for at in busy),
                    "watts": statistics.median(card.watts[at] for at in busy),
                    "power_capped_share": statistics.mean(card.capped[at] for at in busy),
                }
            )
        return found

    def looking(self, nvml: Any) -> Callable[[], None]:
        """Take a sample of each card."""
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(len(self._samples))]

        def look() -> None:
            for handle, card in zip(handles, self._samples, strict=True):
                clock = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
                watts = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
                reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
                card.clocks_mhz.append(clock)
                card.watts.append(watts)
                card.capped.append(bool(reasons & nvml.nvmlClocksThrottleReasonSwPowerCap))

        return look
