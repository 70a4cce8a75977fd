"""What a thread does not inherit from its maker, carried over: grad mode, autocast, saved-tensor hooks."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_DEVICE_TYPES = ("cpu", "cuda")


@dataclass(frozen=True)
class Ambient:
    """The state of the thread that called `capture`.

    Attributes:
        autocast: device type -> (enabled, dtype).
        saved_tensor_hooks: the innermost pair of pack and unpack, or None.
        variables: its context variables; each lane gets a copy.
    """

    grad: bool
    autocast: dict[str, tuple[bool, torch.dtype]]
    saved_tensor_hooks: Any
    variables: contextvars.Context


def capture() -> Ambient:
    """The state of this thread."""
    return Ambient(
        grad=torch.is_grad_enabled(),
        autocast={kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _DEVICE_TYPES},
        saved_tensor_hooks=torch._C._autograd._top_saved_tensors_default_hooks(True),
        variables=contextvars.copy_context(),
    )


@contextmanager
def entered(ambient: Ambient) -> Iterator[None]:
    """Within it, this thread's state is as `ambient` says (context variables aside: run in a copy of them).

    Autocast keeps no cache of cast weights: that cache is the whole process's, and would hand a tensor of one lane's
    graph to another lane.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(ambient.grad))
        for kind, (enabled, dtype) in ambient.autocast.items():
            if enabled:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
        if ambient.saved_tensor_hooks is not None:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(*ambient.saved_tensor_hooks))
        yield
