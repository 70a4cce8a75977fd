"""The autograd graph of one micro-batch, cut at every boundary between stages, and its backward pass over the cuts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from strategies.crossing import copy_to
from strategies.errors import ParallelTuneError
from strategies.stages import Stages


class CannotCutError(ParallelTuneError):
    """The model's forward does something that a cut graph cannot follow."""


class Passage(Protocol):
    """What happens around a micro-batch's steps from stage to stage."""

    def go(self, stage: int, backward: bool) -> None:
        """The stage that comes next; called before anything is done on its device."""

    def carry(self, tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """Copies on `device`, cut off from any graph; also called while a stage is at work, for what it needs late."""

    def lend(self, weight: Tensor, device: torch.device) -> Tensor:
        """A copy of a weight of stage 0 on `device`, cut off from any graph; a leaf of this micro-batch's own."""
        return self.carry([weight], device)[0]

    def arrive(self) -> None:
        """What crosses the boundary is there: the stage's own work begins."""


class Cuts:
    """Carries one micro-batch over the boundaries, cutting its graph there; a `Carrier`.

    At a boundary each tensor with a gradient becomes a leaf on the next stage's device. Afterwards `backward` runs one
    backward pass per stage, last stage first, and takes each leaf's gradient to the tensor that the leaf was made from.

    Args:
        passage: told of every step.

    Attributes:
        stage: where the forward pass is.
        pairs: for each stage, the tensors that came to it with a gradient: (the one of the stage before, the leaf).
        lent: tied weights of stage 0 and the leaves that the head worked with.
    """

    def __init__(self, stages: Stages, passage: Passage) -> None:
        self.stage = 0
        self.pairs: list[list[tuple[Tensor, Tensor]]] = [[] for _ in stages.devices]
        self.lent: list[tuple[Tensor, Tensor]] = []
        self._stages = stages
        self._passage = passage
        self._grad = torch.is_grad_enabled()

    def cross(self, stage: int, tensors: Sequence[Tensor], late: bool) -> Sequence[Tensor]:
        """Bring tensors to `stage`.

        Raises:
            CannotCutError: stages do not follow one another, or the boundary lies inside a reentrant checkpoint.
        """
        if stage != self.stage + (0 if late else 1):
            raise CannotCutError(f"stage {stage} follows stage {self.stage}: the layers run more than once a pass")
        if torch.is_grad_enabled() != self._grad:
            raise CannotCutError(f"the layers of stage {stage} run inside a checkpoint that spans several layers")
        if not late:
            self._passage.go(stage, backward=False)
            self.stage = stage
            self._stages.count(stage)
        copies = self._passage.carry(tensors, self._stages.devices[stage])
        self._note(tensors, copies, self.pairs[stage])
        if not late:
            self._passage.arrive()
        return copies

    def lend(self, weight: Tensor, device: torch.device) -> Tensor:
        """A leaf that stands for a weight of stage 0."""
        leaf = self._passage.lend(weight, device)
        self._note([weight], [leaf], self.lent)
        return leaf

    def _note(self, tensors: Sequence[Tensor], copies: Sequence[Tensor], pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Make leaves of copies whose gradient has to find the way back."""
        for tensor, copy in zip(tensors, copies, strict=True):
            if self._grad and tensor.requires_grad:
                pairs.append((tensor, copy.requires_grad_()))

    def backward(self) -> None:
        """Walk from the last stage's cut back to stage 0; the last stage's own backward has been run."""
        for stage in reversed(range(len(self.pairs) - 1)):
            self._passage.go(stage, backward=True)
            pairs, self.pairs[stage + 1] = self.pairs[stage + 1], []
            if any(leaf.grad is not None for _, leaf in pairs):
                self._stages.count(stage + 1, backward=True)
            if stage == 0:
                pairs, self.lent = pairs + self.lent, []
            roots = [source for source, leaf in pairs if leaf.grad is not None]
            gradients = [self._brought(leaf.grad, source.device) for source, leaf in pairs if leaf.grad is not None]
            pairs.clear()  # the leaves and their gradients are of no more use
            self._passage.arrive()
            if roots:
                torch.autograd.backward(roots, gradients)

    def _brought(self, gradient: Tensor, device: torch.device) -> Tensor:
        return gradient if gradient.device == device else self._passage.carry([gradient], device)[0]


def pass_through(
    stages: Stages, passage: Passage, forward: Callable[[], Tensor], backward: Callable[[Tensor], None]
) -> Tensor:
    """One micro-batch: forward through all stages, the last stage's backward, and back over the cuts.

    Returns:
        The loss, detached.
    """
    cuts = Cuts(stages, passage)
    passage.go(0, backward=False)
    passage.arrive()
    with stages.carried_by(cuts):
        loss = forward()
    value = loss.detach()
    if torch.is_grad_enabled():
        if loss.requires_grad:
            backward(loss)
        del loss
        cuts.backward()
    return value


def copies_on(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """What a `Passage` carries where nothing has to stay in its place."""
    return [copy_to(tensor.detach(), device) for tensor in tensors]
