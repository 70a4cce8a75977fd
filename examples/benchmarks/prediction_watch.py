"""What NVML says of the processes on a card while a row runs: whether it tells as much as the card's own figure."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

INTERVAL_SECONDS = 0.1


class ProcessMemory:
    """Watches a card's compute processes from a thread; a context manager.

    Attributes:
        peak_bytes: the most that they held together; None where NVML says nothing of processes, as in a container whose
            host hides them.
    """

    def __init__(self, uuid: str, nvml: Any = None) -> None:
        self.peak_bytes: int | None = None
        self._uuid = uuid
        self._nvml = nvml
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> ProcessMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        nvml = self._nvml
        if nvml is None:
            try:
                import pynvml as nvml
            except ImportError:
                return
        try:
            nvml.nvmlInit()
            handle = nvml.nvmlDeviceGetHandleByUUID(self._uuid)
            while not self._over.wait(INTERVAL_SECONDS):
                held = [process.usedGpuMemory for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]
                known = [size for size in held if size is not None]
                if known:
                    self.peak_bytes = max(self.peak_bytes or 0, sum(known))
        except nvml.NVMLError:
            return
