"""What NVML says of the processes on a card while a row runs: whether it tells as much as the card's own figure."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import psutil
from nvml_watch import NvmlWatch

INTERVAL_SECONDS = 0.02
"""Captured runs are at their peak for less than a tenth of a second."""


class ProcessMemory(NvmlWatch):
    """Watches a card's compute processes.

    Args:
        root: counts only this process and what descends from it; None: all processes on the card.

    Attributes:
        peak_bytes: the most that they held together; None where NVML says nothing of processes, as in a container whose
            host hides them.
    """

    def __init__(self, uuid: str, nvml: Any = None, root: int | None = None) -> None:
        super().__init__(INTERVAL_SECONDS, nvml)
        self.peak_bytes: int | None = None
        self._uuid = uuid
        self._root = root
        self._ours: dict[int, bool] = {}

    def looking(self, nvml: Any) -> Callable[[], None]:
        """Add up what the processes hold."""
        handle = nvml.nvmlDeviceGetHandleByUUID(self._uuid)

        def look() -> None:
            processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            held = [process.usedGpuMemory for process in processes if self._counts(process)]
            known = [size for size in held if size is not None]
            if known:
                self.peak_bytes = max(self.peak_bytes or 0, sum(known))

        return look

    def _counts(self, process: Any) -> bool:
        if self._root is None:
            return True
        if process.pid not in self._ours:
            descends = descends_from(process.pid, self._root)
            if descends is None:
                return False  # it has just ended; the number may be another's soon
            self._ours[process.pid] = descends
        return self._ours[process.pid]


def descends_from(pid: int, root: int) -> bool | None:
    """Whether a process is `root`, of its session, or below it; None if there is no such process."""
    try:
        if root in (pid, os.getsid(pid)):
            return True
        return any(parent.pid == root for parent in psutil.Process(pid).parents())
    except (ProcessLookupError, psutil.Error):
        return None
