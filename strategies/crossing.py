"""How tensors get from one stage of a split model to the next, once per micro-batch.

Works by swapping the class of a layer for a subclass whose `__call__` moves its inputs: this lies outside any
activation checkpoint of the layer, in every mode, so nothing here runs again when a layer is recomputed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Carrier(Protocol):
    """Who carries tensors over boundaries for one thread; boundary k lies before stage k."""

    def cross(self, stage: int, tensors: Sequence[Tensor], late: bool) -> Sequence[Tensor]:
        """Copies of `tensors` on the device of `stage`.

        late: the stage has begun already; one of its later layers wants a tensor that its first did not get.
        """

    def lend(self, weight: Tensor, device: torch.device) -> Tensor:
        """A copy on `device` of a weight that stage 0 owns and trains; its gradient must find the way back."""


@dataclass
class Crossings:
    """How often one boundary was crossed, by whole micro-batches; recomputation does not count."""

    forward: int = 0
    backward: int = 0


@dataclass
class _Pass:
    """One forward pass of one thread.

    Attributes:
        copies: for each stage, id of a tensor as the model's outer loop holds it -> (that tensor, its copy). Holding
            the tensor keeps its id from being used again.
        weights: id of a lent weight -> its copy.
    """

    copies: list[dict[int, tuple[Tensor, Tensor]]]
    weights: dict[int, Tensor] = field(default_factory=dict)


def recomputing() -> bool:
    """Whether this code runs inside a backward pass, hence in the recomputation of a checkpoint."""
    return bool(torch._C._current_graph_task_id() != -1)


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` that shares no storage with `tensor`, even if it lies there already."""
    if tensor.device == device:
        return tensor.clone()
    copy = tensor.to(device, non_blocking=True)
    if tensor.device.type == "cuda":
        # The copy runs on this thread's stream, the tensor may belong to another: not to be freed under the copy.
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return copy


class _Carry(torch.autograd.Function):
    """Copies tensors to a device, and their gradients back."""

    @staticmethod
    def forward(
        ctx: Any, device: torch.device, on_backward: Callable[[], None], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.on_backward = on_backward
        ctx.homes = [tensor.device for tensor in tensors]
        copies = tuple(copy_to(tensor, device) for tensor in tensors)
        needed = ctx.needs_input_grad[2:]
        ctx.mark_non_differentiable(*(copy for copy, need in zip(copies, needed, strict=True) if not need))
        return copies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        ctx.on_backward()
        back = (None if g is None else g.to(home) for g, home in zip(gradients, ctx.homes, strict=True))
        return (None, None, *back)


def _nothing() -> None:
    """Counts nothing."""


class Crossroads:
    """The boundaries of one split model: what crosses them, for any number of threads at once.

    Attributes:
        devices: the device of each stage.
        counts: crossings of boundary k, which lies before stage k; entry 0 stays at zero.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = tuple(devices)
        self.counts = [Crossings() for _ in devices]
        self._lock = threading.Lock()
        self._local = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> Crossroads:
        """A deep copy of the model (a trainer's reference model, say) is split alike, by the same boundaries."""
        return self

    def count(self, stage: int, backward: bool = False) -> None:
        """Note that the boundary before `stage` was crossed."""
        with self._lock:
            if backward:
                self.counts[stage].backward += 1
            else:
                self.counts[stage].forward += 1

    @contextmanager
    def carried_by(self, carrier: Carrier) -> Iterator[None]:
        """Within it, `carrier` carries what this thread's forward passes bring to a boundary."""
        before = getattr(self._local, "carrier", None)
        self._local.carrier = carrier
        try:
            yield
        finally:
            self._local.carrier = before
            self._local.current = None

    def begin(self, *_: Any) -> None:
        """A forward pass of this thread begins."""
        self._local.current = _Pass(copies=[{} for _ in self.devices])

    def end_layers(self, *_: Any) -> None:
        """The last layer is done: let go of what was copied for the layers."""
        if (current := self._current()) is not None:
            current.copies = [{} for _ in self.devices]

    def end(self, *_: Any) -> None:
        """The forward pass of this thread is over."""
        self._local.current = None

    def cross(self, stage: int, tensors: Sequence[Tensor], late: bool) -> Sequence[Tensor]:
        """Carry as the plain split does: one autograd node per boundary."""
        on_backward = _nothing
        if not late and not recomputing():
            self.count(stage)
            on_backward = lambda: self.count(stage, backward=True)  # noqa: E731
        carried: tuple[Tensor, ...] = _Carry.apply(self.devices[stage], on_backward, *tensors)  # type: ignore[no-untyped-call]
        return carried

    def lend(self, weight: Tensor, device: torch.device) -> Tensor:
        """A differentiable copy."""
        (copy,) = _Carry.apply(device, _nothing, weight)  # type: ignore[no-untyped-call]
        return copy  # type: ignore[no-any-return]

    def arrive(self, stage: int, first: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The inputs of a layer, on the device of its stage.

        At a stage's first layer everything crosses. At a later one the hidden state is there already, while the extras
        (masks, rotary tables, positions) come from the model's outer loop and still lie on the first device: each is
        copied once a stage.
        """
        found: dict[int, Tensor] = {}
        extras = (args, kwargs) if first else (args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})
        _collect(extras, found)
        current = None if recomputing() else self._current()
        known = {} if current is None else current.copies[stage]
        new = [tensor for key, tensor in found.items() if key not in known]
        if new:
            # What also crossed the boundary before this one goes on from there, so that each hop is a single boundary.
            before = current.copies[stage - 1] if current is not None else {}
            sources = [before.get(id(tensor), (tensor, tensor))[1] for tensor in new]
            carrier: Carrier = getattr(self._local, "carrier", None) or self
            copies = (carrier if current is not None else self).cross(stage, sources, late=not first)
            known.update({id(tensor): (tensor, copy) for tensor, copy in zip(new, copies, strict=True)})
        moved = _replace((args, kwargs), {key: known[key][1] for key in found}, self.devices[stage])
        return moved[0], moved[1]

    def lent_weight(self, weight: Tensor, device: torch.device) -> Tensor | None:
        """This pass's copy of a trained weight, or None outside a pass."""
        current = self._current()
        if current is None:
            return None
        if id(weight) not in current.weights:
            carrier: Carrier = getattr(self._local, "carrier", None) or self
            current.weights[id(weight)] = carrier.lend(weight, device)
        return current.weights[id(weight)]

    def in_pass(self) -> bool:
        """Whether a forward pass of this thread is under way."""
        return self._current() is not None

    def _current(self) -> _Pass | None:
        return getattr(self._local, "current", None)


def receiving_class(base: type[nn.Module], roads: Crossroads, stage: int, first: bool) -> type[nn.Module]:
    """A subclass of a layer's class, of the same name, whose call first brings its inputs to its stage."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = roads.arrive(stage, first, args, kwargs)
        return base.__call__(self, *args, **kwargs)

    return _subclass(base, {"__call__": call})


def borrowing_class(base: type[nn.Module], roads: Crossroads, name: str, device: torch.device) -> type[nn.Module]:
    """A subclass of a head's class whose parameter `name`, tied to the embedding, is read from a copy on `device`.

    Only reads within a forward pass are answered so; the parameter, and with it the tie and the state dict, stays.
    """
    frozen: dict[tuple[int, int], Tensor] = {}

    def read(self: nn.Module) -> Tensor | None:
        weight = self._parameters[name]
        if weight is None or not roads.in_pass():
            return weight
        if weight.requires_grad:
            return roads.lent_weight(weight, device)
        key = (weight.data_ptr(), weight._version)  # a frozen weight is copied again only if it was overwritten
        if key not in frozen:
            frozen.clear()
            frozen[key] = copy_to(weight.detach(), device)
        return frozen[key]

    return _subclass(base, {name: property(read)})


def _subclass(base: type[nn.Module], members: dict[str, Any]) -> type[nn.Module]:
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {**names, **members, "of_split_model": True})


def _collect(value: Any, found: dict[int, Tensor]) -> None:
    """Gather the tensors in nested tuples, lists and dictionaries, by id, in order."""
    if isinstance(value, Tensor):
        found[id(value)] = value
    elif isinstance(value, (tuple, list)):
        for item in value:
            _collect(item, found)
    elif type(value) is dict:
        for item in value.values():
            _collect(item, found)


def _replace(value: Any, copies: dict[int, Tensor], device: torch.device) -> Any:
    """The same nest with its tensors replaced; flex attention's block masks, which are no tensors, move themselves."""
    if isinstance(value, Tensor):
        return copies.get(id(value), value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_replace(item, copies, device) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_replace(item, copies, device) for item in value)
    if type(value) is dict:
        return {key: _replace(item, copies, device) for key, item in value.items()}
    if type(value).__name__ == "BlockMask":
        return value.to(device)
    return value
