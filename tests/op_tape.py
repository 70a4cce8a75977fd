"""A graph recorder for the CPU: what torch's operations did is kept, one by one, and done again on the same tensors.

Like a CUDA graph it knows nothing of Python: a value that the host read is constant from then on, so that reading one
while recording is an error here, as it is there. Unlike one it does the work while it records, and never reuses memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class OperationTape:
    """Records operations of the thread that calls `begin` and `end`; a `StageRecorder`."""

    def __init__(self) -> None:
        self.passes = 0
        self.recorded: list[tuple[int, int]] = []
        self.forgotten = False
        self._mode: _Operations | None = None

    def ready(self) -> None:
        self.passes += 1

    def begin(self, lane: int, stage: int) -> None:
        assert self._mode is None, "recordings may not be nested"
        self.recorded.append((lane, stage))
        self._mode = _Operations()
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> Callable[[], None]:
        assert self._mode is not None
        mode, self._mode = self._mode, None
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        assert mode.operations, "an empty recording"
        return mode.repeat

    def abandon(self) -> None:
        if self._mode is not None:
            self.end()

    def forget(self) -> None:
        self.forgotten = True


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            raise RuntimeError(f"{func} reads a value while it is recorded")
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def repeat(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, result in self.operations:
                aliases = [each.alias_info for each in func._schema.returns]
                if any(alias is not None and not alias.is_write for alias in aliases):
                    continue  # a view shows what its tensor holds
                again = func(*args, **kwargs)
                if any(alias is not None for alias in aliases):
                    continue  # done in place
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor):
                        old.data.copy_(new)
