"""Counts the bytes of live tensor storages, operation by operation; works on fake tensors and on real ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, follows every storage that an operation returns until it is freed.

    torch's own MemTracker wants a gradient for every parameter, which frozen ones never have; here a storage is just
    a storage. What a kernel holds inside itself is not seen.

    Attributes:
        live_bytes: bytes of the storages alive now.
        peaks_bytes: the largest `live_bytes` seen in each phase since `reset`.
    """

    def __init__(self, round_bytes: Callable[[int], int] = lambda size: size) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peaks_bytes: dict[str, int] = {}
        self._phase = ""
        self._round = round_bytes
        self._seen: dict[int, weakref.ref[Any]] = {}

    def count(self, tensors: Iterable[torch.Tensor]) -> None:
        """Take in tensors that were made before tracking began."""
        for tensor in tensors:
            self._follow(tensor)

    def enter_phase(self, name: str) -> None:
        """From here on, peaks belong to this phase."""
        self._phase = name
        self._note_peak()

    def reset(self) -> None:
        """Forget the peaks, keep the storages."""
        self.peaks_bytes = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # asks a tensor for its device, many times an operation
            return result
        for leaf in tree_iter(result):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf)
        self._note_peak()
        return result

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._seen.get(key)
        if known is not None and known() is storage:
            return
        size = self._round(storage.nbytes())

        def forget(_: weakref.ref[Any]) -> None:
            self.live_bytes -= size
            if self._seen.get(key) is reference:
                del self._seen[key]

        # The Python object of a storage lives exactly as long as the storage itself.
        reference = weakref.ref(storage, forget)
        self._seen[key] = reference
        self.live_bytes += size

    def _note_peak(self) -> None:
        if self.live_bytes > self.peaks_bytes.get(self._phase, -1):
            self.peaks_bytes[self._phase] = self.live_bytes
