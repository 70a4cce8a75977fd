"""Which processes hold memory on which cards, by NVML."""

from __future__ import annotations

import psutil
import pynvml


def family(pid: int) -> set[int]:
    """Process ids of a command and all that it has started."""
    try:
        return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    except psutil.NoSuchProcess:
        return set()


def holders() -> dict[int, set[int]]:
    """The cards on which each process holds memory."""
    pynvml.nvmlInit()
    found: dict[int, set[int]] = {}
    for card in range(pynvml.nvmlDeviceGetCount()):
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(card)):
            found.setdefault(process.pid, set()).add(card)
    return found
