"""One micro-batch's way through all stages, recorded once and then repeated: a recording for each segment.

A recording is cut wherever work moves to another stage, and wherever something is copied to a stage that is at work
already. Copies between stages stay outside, into tensors that keep their place. A recording so needs a few calls of the
host for each segment, where the segment itself needs thousands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from strategies.cuts import Passage, copies_on, pass_through
from strategies.stages import Stages


class StageRecorder(Protocol):
    """Records what is done between `begin` and `end`, to be repeated on the same memory.

    Recordings of one lane are repeated in the order in which they were made, at most one of all lanes at a time on a
    device. What a recording leaves in memory of its own stays until the lane's next pass; at the last stage, which a
    micro-batch leaves with nothing but what it copied elsewhere, only until any other recording of it is repeated.
    """

    def ready(self) -> None:
        """A pass is about to be recorded."""

    def begin(self, lane: int, stage: int) -> None:
        """Record from here on."""

    def end(self) -> Callable[[], None]:
        """What repeats the work since `begin`, which may or may not have been done while it was recorded."""

    def abandon(self) -> None:
        """Record no more, after an error; what was being recorded, if anything, is no recording."""

    def forget(self) -> None:
        """Free all that was recorded; nothing of it is repeated any more."""


class StageVisit(Protocol):
    """What a recording does around its segments; see `Visit`."""

    def go(self, stage: int, backward: bool) -> None: ...

    def settle(self) -> None: ...

    def arrive(self) -> None: ...


@dataclass
class _Piece:
    """Copies, each (from, to), then recorded work."""

    copies: list[tuple[Tensor, Tensor]]
    repeat: Callable[[], None]


@dataclass
class _Segment:
    """A stage's part of a micro-batch's forward or backward.

    Attributes:
        leaves: what came to the stage with a gradient to send back, and where that gradient is put.
    """

    stage: int
    backward: bool
    pieces: list[_Piece] = field(default_factory=list)
    leaves: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class _Take(Passage):
    """The passage of a micro-batch that is recorded in this thread."""

    def __init__(self, stages: Stages, recorder: StageRecorder, lane: int) -> None:
        self.segments: list[_Segment] = []
        self._last = len(stages) - 1
        self._recorder = recorder
        self._lane = lane
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._running = False

    def go(self, stage: int, backward: bool) -> None:
        self.finish()
        self.segments.append(_Segment(stage, backward))

    def carry(self, tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        was_running = self._running
        self._end_piece()
        carried = []
        for tensor in tensors:
            source = tensor.detach()
            target = torch.empty_like(source, device=device)
            target.copy_(source)
            self._copies.append((source, target))
            carried.append(target.detach())
            if tensor.requires_grad:
                self.segments[-1].leaves.append((carried[-1], torch.empty_like(target)))
        if was_running:
            self.arrive()
        return carried

    def arrive(self) -> None:
        self._recorder.begin(self._lane, self.segments[-1].stage)
        self._running = True

    def finish(self) -> None:
        """The segment under way is over: what it sends back must outlast the memory of its recording."""
        if not self._running:
            return
        segment = self.segments[-1]
        if segment.backward or segment.stage == self._last:
            for leaf, place in self.segments[segment.stage].leaves:
                if leaf.grad is not None:
                    place.copy_(leaf.grad)
                    leaf.grad = place
        self._end_piece()

    def _end_piece(self) -> None:
        if self._running:
            self._running = False
            self.segments[-1].pieces.append(_Piece(self._copies, self._recorder.end()))
            self._copies = []


class Recording:
    """A micro-batch's way through all stages, at fixed sizes.

    Attributes:
        inputs: what the forward pass reads; a micro-batch is copied into it.
    """

    def __init__(
        self,
        stages: Stages,
        inputs: dict[str, Tensor],
        segments: Sequence[_Segment],
        loss: Tensor,
        crossings: Sequence[tuple[int, int]],
    ) -> None:
        self._stages = stages
        self._segments = segments
        self._loss = loss
        self._crossings = crossings
        first_stage = {device: stage for stage, device in reversed(list(enumerate(stages.devices)))}
        self._inputs: list[list[tuple[str, Tensor]]] = [[] for _ in stages.devices]
        for name, value in inputs.items():
            self._inputs[first_stage[value.device]].append((name, value))

    @torch.no_grad()
    def play(self, visit: StageVisit, micro_batch: Mapping[str, Tensor]) -> Tensor:
        """Forward and backward of a micro-batch; gradients are added where they were when this was recorded.

        Each value of the micro-batch goes to its place when the lane has the token of a stage on its device.

        Returns:
            The loss.
        """
        loss = self._loss
        for segment in self._segments:
            visit.go(segment.stage, segment.backward)
            visit.settle()
            if not segment.backward:
                for name, value in self._inputs[segment.stage]:
                    value.copy_(micro_batch[name], non_blocking=True)
            for number, piece in enumerate(segment.pieces):
                for source, target in piece.copies:
                    target.copy_(source, non_blocking=True)
                if number == 0:
                    visit.arrive()
                piece.repeat()
            if not segment.backward and segment.stage == len(self._stages) - 1:
                loss = self._loss.clone()  # its place is the next micro-batch's as soon as the token is given back
        for stage, (forward, backward) in enumerate(self._crossings, start=1):
            for _ in range(forward):
                self._stages.count(stage)
            for _ in range(backward):
                self._stages.count(stage, backward=True)
        return loss


def record(
    stages: Stages,
    recorder: StageRecorder,
    lane: int,
    inputs: dict[str, Tensor],
    forward: Callable[[dict[str, Tensor]], Tensor],
    backward: Callable[[Tensor], None],
) -> Recording:
    """Record a pass over `inputs`, which the recording keeps. Nothing else may work on the stages' devices meanwhile.

    Raises:
        Exception: whatever the recorder or the model raises where it cannot be recorded.
    """
    take = _Take(stages, recorder, lane)
    recorder.ready()
    with stages.uncounted():
        before = [(count.forward, count.backward) for count in stages.crossings]
        try:
            loss = pass_through(stages, take, lambda: forward(inputs), backward)
            take.finish()
        except BaseException:
            recorder.abandon()
            raise
        crossed = [
            (count.forward - earlier[0], count.backward - earlier[1])
            for count, earlier in zip(stages.crossings, before, strict=True)
        ]
    return Recording(stages, inputs, take.segments, loss, crossed)


class Alone(Passage):
    """The passage of a micro-batch that has all devices to itself, in this thread and on its current streams."""

    def __init__(self, stages: Stages) -> None:
        self._devices = stages.devices

    def go(self, stage: int, backward: bool) -> None:
        if self._devices[stage].type == "cuda":
            torch.cuda.set_device(self._devices[stage])

    def carry(self, tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        return copies_on(tensors, device)

    def settle(self) -> None:
        """One stream a device keeps the order."""

    def arrive(self) -> None:
        """Nothing is timed."""
