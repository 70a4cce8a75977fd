"""The naive schedule of a split model: one micro-batch after the other, its graph uncut, on the clock of the lanes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from strategies.stages import Stages
from strategies.visit import Clock, Mark, Segment, as_segments

Span = tuple[int, bool]
"""A stage, and whether it is its backward."""


class Turns:
    """Takes micro-batches in turn, each forward and backward, and notes when each stage worked.

    Gradients are those of the model in one piece; nothing of the model is changed.

    Args:
        stages: the split model.
        align_clocks: let the devices finish before each run, so that the timelines of distinct GPUs compare exactly.
    """

    sums_gradients = False

    def __init__(self, stages: Stages, align_clocks: bool = False) -> None:
        self._stages = stages
        self._align_clocks = align_clocks
        self._clock: Clock | None = None
        self._turns: list[_Turn] = []

    @property
    def devices(self) -> Sequence[torch.device]:
        """Where a micro-batch is worked on, each once, that of the inputs first."""
        return tuple(dict.fromkeys(self._stages.devices))

    @property
    def labels_device(self) -> torch.device:
        """Where the head computes the loss."""
        return self._stages.head_device

    def timeline(self) -> list[Segment]:
        """The schedule of the last run, by start; empty if some stage's work was not seen. Waits for the devices."""
        marks = [turn.marks() for turn in self._turns]
        if self._clock is None or not all(marks):
            return []
        return as_segments(self._clock, self._stages.devices, [mark for of_turn in marks for mark in of_turn])

    def run(
        self,
        micro_batches: Sequence[Any],
        forward: Callable[[int, Any], Tensor],
        *,
        backward: Callable[[Tensor], None] = Tensor.backward,
        key: int | None = None,
    ) -> list[Tensor]:
        """As `strategies.base.Schedule.run`. Random numbers come from the generators as they stand, whatever `key`."""
        self._clock = clock = Clock(self._stages.devices, self._align_clocks)
        self._turns = []
        losses = []
        for index, micro_batch in enumerate(micro_batches):
            turn = _Turn(self._stages, clock, index)
            turn.begin(0, backward=False)
            with self._stages.carried_by(turn):
                loss = forward(index, micro_batch)
            if torch.is_grad_enabled() and loss.requires_grad:
                backward(loss)
            turn.finish()
            losses.append(loss.detach())
            self._turns.append(turn)
        return losses


class _Turn:
    """One micro-batch: carries it as the plain split does, and marks when it comes to a stage and leaves it."""

    def __init__(self, stages: Stages, clock: Clock, micro_batch: int) -> None:
        self._stages = stages
        self._clock = clock
        self._micro_batch = micro_batch
        self._begun: dict[Span, Mark] = {}
        self._ended: dict[Span, Mark] = {}

    def begin(self, stage: int, backward: bool) -> None:
        """What this stage needs is on its device."""
        self._begun[stage, backward] = self._now(stage)

    def end(self, stage: int, backward: bool) -> None:
        """The stage has issued all its work in this direction."""
        self._ended[stage, backward] = self._now(stage)

    def cross(self, stage: int, tensors: Sequence[Tensor], late: bool) -> Sequence[Tensor]:
        """Bring tensors to `stage` by differentiable copies."""
        if late:
            return self._stages.cross(stage, tensors, late)
        self.end(stage - 1, backward=False)
        copies = self._stages.cross(stage, tensors, late)
        self.begin(stage, backward=False)
        for source, copy in zip(tensors, copies, strict=True):
            if copy.requires_grad:
                # The last of several gradients to cross ends the one stage's work and begins the other's.
                copy.register_hook(partial(self._gradient_leaves, stage))  # type: ignore[no-untyped-call]
                source.register_hook(partial(self._gradient_arrives, stage - 1))  # type: ignore[no-untyped-call]
        return copies

    def lend(self, weight: Tensor, device: torch.device) -> Tensor:
        """A differentiable copy of a tied weight."""
        return self._stages.lend(weight, device)

    def finish(self) -> None:
        """Forward and backward are through: what still runs ends here."""
        open_spans = [span for span in self._begun if span not in self._ended]
        last = len(self._stages) - 1
        for stage, backward in open_spans:
            if stage == last or backward:
                self.end(stage, backward)

    def marks(self) -> list[tuple[int, int, str, Mark, Mark]]:
        """The stages' spans; none if one of them began or ended unseen."""
        found = []
        last = len(self._stages) - 1
        for span, start in self._begun.items():
            if span not in self._ended:
                return []
            stage, backward = span
            direction = "forward+backward" if stage == last else "backward" if backward else "forward"
            found.append((stage, self._micro_batch, direction, start, self._ended[span]))
        return found if {stage for stage, *_ in found} == set(range(last + 1)) else []

    def _gradient_leaves(self, stage: int, _: Tensor) -> None:
        # The last stage goes from forward to backward without a break, as in lanes.
        self.end(stage, backward=stage < len(self._stages) - 1)

    def _gradient_arrives(self, stage: int, _: Tensor) -> None:
        self.begin(stage, backward=True)

    def _now(self, stage: int) -> Mark:
        return self._clock.mark(self._stages.devices[stage])
