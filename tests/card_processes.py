"""A card whose processes are made up, for tests."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace


class FakeNvml:
    """A card on which processes, by their numbers, hold what a function says when it is asked."""

    NVMLError = OSError

    def __init__(self, held: Callable[[], dict[int, int | None]]) -> None:
        self._held = held

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return uuid

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:  # noqa: N802
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in self._held().items()]
