"""Cards' clocks are watched while a run works, and only while it works."""

from __future__ import annotations

import time
from itertools import cycle
from typing import Any

import pytest


class FakeNvml:
    """Two cards: one that works at its limit of power half of the time, and waits; one that never reaches it."""

    NVML_CLOCK_SM = 1
    nvmlClocksThrottleReasonSwPowerCap = 4  # noqa: N815

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self._first = cycle([(1500, 700_000, 4), (1500, 690_000, 5), (345, 90_000, 1), (1980, 100_000, 0)])
        self._now: tuple[int, int, int] = (0, 0, 0)

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:  # noqa: N802
        assert kind == self.NVML_CLOCK_SM
        self._now = next(self._first) if handle == 0 else (1980, 500_000, 0)
        return self._now[0]

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        return self._now[1]

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:  # noqa: N802
        return self._now[2]


class Mute(FakeNvml):
    def nvmlInit(self) -> None:  # noqa: N802
        raise self.NVMLError


@pytest.fixture
def clocks(load_benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = load_benchmark("card_clocks")
    monkeypatch.setattr(module, "INTERVAL_SECONDS", 0.001)
    return module.CardClocks


def test_a_card_is_looked_at_while_it_works(clocks: Any) -> None:
    with clocks(2, FakeNvml()) as watched:
        while len(watched._samples[1].watts) < 40:
            time.sleep(0.001)
    first, second = watched.seen()
    assert (first["clock_mhz"], first["power_capped_share"]) == (1500, 1.0)
    assert first["watts"] == pytest.approx(695, abs=5.1)
    assert second == {"clock_mhz": 1980, "watts": 500, "power_capped_share": 0}


def test_nothing_is_seen_where_nothing_can_be_read(clocks: Any) -> None:
    with clocks(2, Mute()) as watched:
        pass
    assert watched.seen() == []
