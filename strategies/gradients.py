"""All gradients of a process in one buffer a device: what captured steps write to, and what processes sum at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_Kind = tuple[torch.dtype, torch.device]

PIECE_ELEMENTS = 1 << 22
"""Elements that are compared at once."""


def _kind(parameter: Tensor) -> _Kind:
    return parameter.dtype, parameter.device


class FlatGradients:
    """Gradients of some parameters as views of one buffer a dtype and device, at addresses that never change.

    Args:
        parameters: those that train.
        world_size: replicas over which gradients are averaged; they start from the first one's parameters.
        reduce_dtype: in which they are sent and summed, where that is narrower than their own.
    """

    def __init__(
        self, parameters: Sequence[Tensor], world_size: int = 1, reduce_dtype: torch.dtype = torch.float32
    ) -> None:
        self._parameters = list(parameters)
        self._world_size = world_size
        self._reduce_dtype = reduce_dtype
        sizes: dict[_Kind, int] = {}
        for parameter in self._parameters:
            sizes[_kind(parameter)] = sizes.get(_kind(parameter), 0) + parameter.numel()
        self._buffers = {
            (dtype, device): torch.zeros(size, dtype=dtype, device=device) for (dtype, device), size in sizes.items()
        }
        self._views = self._make_views()
        if world_size > 1:
            for parameter in self._parameters:
                dist.broadcast(parameter.data, src=0)

    def _make_views(self) -> list[Tensor]:
        used = dict.fromkeys(self._buffers, 0)
        views = []
        for parameter in self._parameters:
            kind = _kind(parameter)
            start = used[kind]
            used[kind] = start + parameter.numel()
            views.append(self._buffers[kind][start : used[kind]].view_as(parameter))
        return views

    def begin(self) -> None:
        """All gradients are zero and lie in the buffer. An optimizer may have let go of them since the last step."""
        for buffer in self._buffers.values():
            buffer.zero_()
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view

    def adopt(self) -> None:
        """All gradients lie in the buffer; those that exist keep their values, others are zero."""
        found = [parameter.grad for parameter in self._parameters]
        if all(gradient is None for gradient in found):
            self.begin()
            return
        for parameter, view, gradient in zip(self._parameters, self._views, found, strict=True):
            if gradient is None:
                view.zero_()
            elif gradient.data_ptr() != view.data_ptr():
                view.copy_(gradient)
            parameter.grad = view

    def average(self) -> None:
        """The mean over all replicas, as DDP's: a loss that is a mean over all tokens comes scaled by their number."""
        if self._world_size == 1:
            return
        for buffer in self._buffers.values():
            if buffer.dtype.itemsize > self._reduce_dtype.itemsize:
                # As DDP's hook of this name does: divided first, so that a sum is no larger than what it sums.
                rounded = buffer.to(self._reduce_dtype).div_(self._world_size)
                dist.all_reduce(rounded)
                buffer.copy_(rounded)
            else:
                dist.all_reduce(buffer)
                buffer.div_(self._world_size)

    def copy(self) -> list[Tensor]:
        """A copy of what the buffers hold."""
        return [buffer.clone() for buffer in self._buffers.values()]

    def restore(self, copied: Sequence[Tensor]) -> None:
        """Take back what `copy` gave."""
        for buffer, values in zip(self._buffers.values(), copied, strict=True):
            buffer.copy_(values)

    def copy_to(self, copied: Sequence[Tensor]) -> None:
        """Overwrite an earlier `copy` with what the buffers hold now."""
        for buffer, values in zip(self._buffers.values(), copied, strict=True):
            values.copy_(buffer)

    def distance(self, other: Sequence[Tensor]) -> float:
        """Euclidean distance of what the buffers hold from such a copy, as a share of the copy's length."""
        apart = size = 0.0
        for buffer, values in zip(self._buffers.values(), other, strict=True):
            # In float64, piece by piece: whole copies would be the most that a recording leaves idle.
            for start in range(0, buffer.numel(), PIECE_ELEMENTS):
                piece = slice(start, start + PIECE_ELEMENTS)
                wide = values[piece].double()
                size += float(wide.square().sum())
                apart += float(wide.sub_(buffer[piece]).square_().sum())
        if size == 0:
            return 0.0 if apart == 0 else float("inf")
        return float((apart / size) ** 0.5)
