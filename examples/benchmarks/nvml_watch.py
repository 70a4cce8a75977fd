"""Looks at cards from a thread while something else works."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self


class NvmlWatch(ABC):
    """A context manager that looks again and again as long as it is entered; not at all where NVML cannot be had.

    Args:
        nvml: pynvml, but for tests.
    """

    def __init__(self, interval_seconds: float, nvml: Any = None) -> None:
        self._interval_seconds = interval_seconds
        self._nvml = nvml
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @abstractmethod
    def looking(self, nvml: Any) -> Callable[[], None]:
        """What one look does. An NVMLError of it ends the watch."""

    def __enter__(self) -> Self:
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
            look = self.looking(nvml)
            while not self._over.wait(self._interval_seconds):
                look()
        except nvml.NVMLError:
            return
