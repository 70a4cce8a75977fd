"""The captured step: forward and backward of a micro-batch recorded once as a CUDA graph, then replayed.

Short micro-batches leave a GPU waiting for the host, which issues thousands of small kernels. A replay issues one
launch. It needs tensors of fixed sizes at fixed addresses: micro-batches are copied into static ones, gradients add up
in `FlatGradients`, which are averaged over replicas after the last micro-batch.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from strategies.compiled_layers import CompiledLayers
from strategies.gradients import FlatGradients
from strategies.randomness import leave_capture

_log = logging.getLogger(__name__)

Forward = Callable[[int, Any], Tensor]
Backward = Callable[[Tensor], None]
Signature = tuple[tuple[str, torch.Size, torch.dtype], ...]

SAME_GRADIENTS = 0.05
"""Largest distance of a replay's gradients from those of the same micro-batch run eagerly. Equal kernels give equal
bits; kernels that add in no fixed order were seen 1.3% apart from themselves in bfloat16."""

ROUNDED_OTHERWISE = 0.25
"""Largest distance of a compiled pass's gradients from those of the same pass as it is: fused kernels round in other
places. In bfloat16 11% were seen through 32 layers of an 8B Llama shape, whose eager passes are 2% apart."""


class Recorder(Protocol):
    """Records work once, to be repeated on the same memory."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What repeats the work, and the tensor that holds its result after each repetition. Does not do the work."""

    def make_room(self) -> None:
        """Give idle memory back: what is allocated next then keeps no larger block from being given back."""

    def forget(self) -> None:
        """Free what was recorded; nothing of it is repeated any more."""


class CudaGraphs:
    """CUDA graphs on one device that share one pool of memory, since they never run at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []  # The pool lives as long as one of them

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, which load data or watch NCCL, may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = work()
        except BaseException:
            leave_capture(self._stream.device)
            raise
        self._graphs.append(graph)
        return graph.replay, result

    def make_room(self) -> None:
        torch.cuda.empty_cache()

    def forget(self) -> None:
        self._graphs.clear()


@dataclass
class _Recording:
    inputs: dict[str, Tensor]
    replay: Callable[[], None]
    loss: Tensor


@dataclass
class ReplayReport:
    """What was replayed.

    Attributes:
        reason: why nothing is captured any more; None while all is well.
        elements: of all micro-batches' largest tensors (their tokens, filled up to the fixed size).
        replayed_elements: those of replayed ones.
        capture_seconds: spent on recording, and on checking each recording against an eager run.
        gradient_error: the largest distance found by these checks; of compiled layers, from a compiled pass.
        compiled: whether layers were to be compiled for recordings.
        compiled_error: the largest distance of a compiled pass's gradients from an uncompiled one's.
        uncompiled_reason: why they are not any more.
    """

    reason: str | None = None
    recordings: int = 0
    elements: int = 0
    replayed_elements: int = 0
    capture_seconds: float = 0.0
    gradient_error: float = 0.0
    sizes: list[int] = field(default_factory=list)
    compiled: bool = False
    compiled_error: float = 0.0
    uncompiled_reason: str | None = None


class Replay:
    """Runs micro-batches in turn, those of a known shape by replay; a `Schedule`.

    Micro-batches are dictionaries. One whose values are all tensors is run eagerly when its shapes are new, recorded
    when they come again (on the first one's values, then checked on the second one's: what a recording took for
    constant shows), and replayed from then on. One that holds anything else has no fixed shape and is run eagerly.
    What a forward pass reads must be in its micro-batch; random numbers differ from replay to replay.

    Args:
        parameters: gives those that train; asked at the first step, when a trainer has settled their dtype.
        recorder: what records.
        world_size: replicas that average their gradients.
        reduce_dtype: in which they do.
        compiled: layers to compile for recordings; None leaves them as they are.
    """

    sums_gradients = True

    def __init__(
        self,
        parameters: Callable[[], Sequence[Tensor]],
        device: torch.device,
        recorder: Recorder,
        world_size: int = 1,
        reduce_dtype: torch.dtype = torch.float32,
        compiled: CompiledLayers | None = None,
    ) -> None:
        self._parameters = parameters
        self._device = device
        self._recorder = recorder
        self._world_size = world_size
        self._reduce_dtype = reduce_dtype
        self._compiled = compiled
        self._gradients: FlatGradients | None = None
        self._first: dict[Signature, dict[str, Tensor]] = {}
        self._recordings: dict[Signature, _Recording] = {}
        self.report = ReplayReport(compiled=compiled is not None)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        return (self._device,)

    @property
    def labels_device(self) -> torch.device:
        return self._device

    def run(
        self,
        micro_batches: Sequence[Any],
        forward: Forward,
        *,
        backward: Backward,
        key: int | None = None,
    ) -> list[Tensor]:
        """Forward and backward of all micro-batches, gradients averaged over replicas; the losses, detached.

        Every replica calls it with as many micro-batches. `key` is not used.
        """
        if self._gradients is None:
            self._gradients = FlatGradients(self._parameters(), self._world_size, self._reduce_dtype)
        self._gradients.begin()
        losses = [self._one(index, batch, forward, backward) for index, batch in enumerate(micro_batches)]
        self._gradients.average()
        return losses

    def _one(self, index: int, batch: Mapping[str, Any], forward: Forward, backward: Backward) -> Tensor:
        report = self.report
        size = size_of(batch)
        report.elements += size
        signature = _signature(batch)
        if signature is None or report.reason is not None:
            return _eager(index, batch, forward, backward)
        recording = self._recordings.get(signature)
        if recording is not None:
            report.replayed_elements += size
            return _replayed(recording, batch)
        first = self._first.pop(signature, None)
        if first is None:
            self._first[signature] = {name: value.clone() for name, value in batch.items()}
            return _eager(index, batch, forward, backward)
        with self._room():
            return self._recorded(index, first, batch, size, forward, backward)

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Room for a recording, whose time is taken.

        Recordings have memory of their own. Copies of gradients in blocks that an eager pass has left would keep these
        from being given back when recording begins, and both would be held at once: hence the room before and after.
        """
        started = time.monotonic()
        self._recorder.make_room()
        yield
        self._recorder.make_room()
        self.report.capture_seconds += time.monotonic() - started

    def _recorded(
        self,
        index: int,
        first: dict[str, Tensor],
        batch: Mapping[str, Tensor],
        size: int,
        forward: Forward,
        backward: Backward,
    ) -> Tensor:
        """Run `batch` eagerly, record on `first`, and keep the recording if it gives the gradients just seen."""
        assert self._gradients is not None
        before, after = self._gradients.copy(), self._gradients.copy()
        loss = _eager(index, batch, forward, backward)
        self._gradients.copy_to(after)
        eager = [old.neg_().add_(new) for old, new in zip(before, after, strict=True)]
        if (recording := self._record(index, first, batch, eager, forward, backward)) is not None:
            self._gradients.begin()
            _replayed(recording, batch)
            error = self._gradients.distance(eager)
            if math.isnan(error):  # gradients that overflowed, as with the first scales of float16, tell nothing
                self._first[signature_of(batch)] = first
            elif error <= SAME_GRADIENTS:
                self.report.gradient_error = max(self.report.gradient_error, error)
                self._recordings[signature_of(batch)] = recording
                self.report.recordings += 1
                self.report.sizes = sorted([*self.report.sizes, size])
            else:
                self.report.gradient_error = error
                self._give_up(f"a captured step's gradients are {error:.1%} off those of the same step run eagerly")
        self._gradients.begin()
        self._gradients.restore(after)
        return loss

    def _record(
        self,
        index: int,
        inputs: dict[str, Tensor],
        batch: Mapping[str, Tensor],
        eager: Sequence[Tensor],
        forward: Forward,
        backward: Backward,
    ) -> _Recording | None:
        assert self._gradients is not None
        try:
            compiled_pass = partial(_eager, index, batch, forward, backward)
            with as_compiled(self._compiled, compiled_pass, self._gradients, eager, self.report):
                replay, loss = self._recorder.record(lambda: _eager(index, inputs, forward, backward))
        except Exception as error:  # whatever a model does that cannot be recorded, it can still be run
            _log.warning("the step cannot be captured", exc_info=error)
            self._give_up(f"the step cannot be captured: {what_stopped(error)}")
            return None
        return _Recording(inputs, replay, loss)

    def _give_up(self, reason: str) -> None:
        self.report.reason = reason
        self._recordings.clear()
        self._first.clear()
        self._recorder.forget()


def as_compiled(
    layers: CompiledLayers | None,
    a_pass: Callable[[], Any],
    gradients: FlatGradients,
    eager: Sequence[Tensor],
    report: ReplayReport,
) -> AbstractContextManager[None]:
    """Compile the layers in a pass, which a recording cannot do, and use them so in the context that is returned; where
    that fails, or gives other gradients, the context leaves them as they are, and the report says why.

    Args:
        eager: the gradients of the pass without compiling. They become those of the compiled pass, which a recording of
            compiled layers is to be held against.
    """
    if layers is None:
        return nullcontext()
    if layers.reason is None:
        try:
            gradients.begin()
            with layers.used():
                a_pass()
            apart = gradients.distance(eager)
        except Exception as error:  # what cannot be compiled can still be recorded
            layers.give_up(f"torch.compile failed: {what_stopped(error)}")
        else:
            if apart > ROUNDED_OTHERWISE:
                layers.give_up(f"gradients of compiled layers are {apart:.1%} off those of the same step run eagerly")
            else:
                gradients.copy_to(eager)
            # Gradients that overflowed tell nothing.
            report.compiled_error = max(report.compiled_error, 0.0 if math.isnan(apart) else apart)
        report.uncompiled_reason = layers.reason
    return layers.used()


def what_stopped(error: BaseException) -> str:
    """What went wrong first, in a line: ending a capture that failed raises an error of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def size_of(batch: Mapping[str, Any]) -> int:
    """Elements of a micro-batch's largest tensor."""
    return max((value.numel() for value in batch.values() if isinstance(value, Tensor)), default=0)


def _eager(index: int, batch: Mapping[str, Any], forward: Forward, backward: Backward) -> Tensor:
    loss = forward(index, batch)
    backward(loss)
    return loss.detach()


def _replayed(recording: _Recording, batch: Mapping[str, Tensor]) -> Tensor:
    for name, value in recording.inputs.items():
        value.copy_(batch[name], non_blocking=True)
    recording.replay()
    return recording.loss.detach().clone()  # the next replay writes to the same place


def _signature(batch: Mapping[str, Any]) -> Signature | None:
    """Names, shapes and dtypes; None where something is not a tensor, so cannot be replaced by copying."""
    return signature_of(batch) if all(isinstance(value, Tensor) for value in batch.values()) else None


def signature_of(batch: Mapping[str, Tensor]) -> Signature:
    """Names, shapes and dtypes."""
    return tuple((name, value.shape, value.dtype) for name, value in sorted(batch.items()))
