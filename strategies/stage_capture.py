"""Which micro-batches of a split model are replayed: recordings of each size, made and checked as sizes come again."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from strategies.compiled_layers import CompiledLayers
from strategies.cuts import pass_through
from strategies.gradients import FlatGradients
from strategies.replay import (
    SAME_GRADIENTS,
    Backward,
    Forward,
    ReplayReport,
    Signature,
    as_compiled,
    signature_of,
    size_of,
    what_stopped,
)
from strategies.stage_recording import Alone, Recording, StageRecorder, record
from strategies.stages import Stages

_log = logging.getLogger(__name__)

Batch = dict[str, Tensor]


class StageCapture:
    """Recordings of a split model's micro-batches, for `Lanes` to replay.

    A micro-batch whose values are all tensors on the stages' devices is run eagerly when its shapes are new. When they
    come again, each lane's pass is recorded on the first one's values, and checked on the second one's against an eager
    pass. Activations of two micro-batches in flight must not share memory, so every lane has recordings of its own.

    Args:
        parameters: gives those that train; asked at the first step, when a trainer has settled their dtype.
        recorder: what records.
        compiled: layers to compile for recordings; None leaves them as they are.
    """

    def __init__(
        self,
        stages: Stages,
        parameters: Callable[[], Sequence[Tensor]],
        recorder: StageRecorder,
        compiled: CompiledLayers | None = None,
    ) -> None:
        self._stages = stages
        self._parameters = parameters
        self._recorder = recorder
        self._compiled = compiled
        self._gradients: FlatGradients | None = None
        self._first: dict[Signature, Batch] = {}
        self._recordings: dict[Signature, list[Recording]] = {}
        self._run: list[list[Recording] | None] = []
        self.report = ReplayReport(compiled=compiled is not None)

    def prepare(self, micro_batches: Sequence[Any], forward: Forward, backward: Backward, num_lanes: int) -> None:
        """Record what is due before lanes work on these micro-batches. No lane may be at work.

        Gradients that exist stay, in buffers at addresses that never change, to which replays add.
        """
        signatures = [self._signature(batch) for batch in micro_batches]
        if self.report.reason is None:
            if self._gradients is None:
                self._gradients = FlatGradients(self._parameters())
            self._gradients.adopt()
        for index, (batch, signature) in enumerate(zip(micro_batches, signatures, strict=True)):
            if self.report.reason is not None or signature is None or signature in self._recordings:
                continue
            first = self._first.pop(signature, None)
            if first is None:
                self._first[signature] = _cloned(batch)
            else:
                self._record(index, first, batch, forward, backward, num_lanes)
        self._run = [self._recordings.get(signature) if signature else None for signature in signatures]
        sizes = [size_of(batch) for batch in micro_batches]
        self.report.elements += sum(sizes)
        self.report.replayed_elements += sum(size for size, found in zip(sizes, self._run, strict=True) if found)

    def recording(self, lane: int, index: int) -> Recording | None:
        """What a lane replays for a micro-batch of the run that was prepared; None where it runs it eagerly."""
        found = self._run[index]
        return found[lane] if found else None

    def give_up(self, reason: str) -> None:
        """Run everything eagerly from here on, and free all recordings."""
        if self.report.reason is not None:
            return
        _log.warning("steps are no longer captured, since %s", reason)
        self.report.reason = reason
        self._recordings.clear()
        self._first.clear()
        self._run.clear()
        self._recorder.forget()

    def _signature(self, batch: Any) -> Signature | None:
        """Names, shapes and dtypes; None where something cannot be replaced by copying to a stage's device."""
        values = batch.values() if isinstance(batch, dict) else [None]
        usable = all(isinstance(value, Tensor) and value.device in self._stages.devices for value in values)
        return signature_of(batch) if usable else None

    def _record(
        self, index: int, first: Batch, batch: Batch, forward: Forward, backward: Backward, num_lanes: int
    ) -> None:
        """Record each lane's pass on `first`; keep it if the gradients of `batch` are those of an eager pass."""
        assert self._gradients is not None
        started = time.monotonic()
        gradients, kept = self._gradients, self._gradients.copy()
        gradients.begin()
        stages, alone = self._stages, Alone(self._stages)
        pass_forward = partial(forward, index)
        with stages.uncounted():
            pass_through(stages, alone, partial(pass_forward, batch), backward)
            eager = gradients.copy()
            recordings, errors = [], []
            try:
                a_pass = partial(pass_through, stages, alone, partial(pass_forward, batch), backward)
                with as_compiled(self._compiled, a_pass, gradients, eager, self.report):
                    for lane in range(num_lanes):
                        recordings.append(record(stages, self._recorder, lane, _cloned(first), pass_forward, backward))
                        gradients.begin()
                        recordings[-1].play(alone, batch)
                        errors.append(gradients.distance(eager))
            except Exception as error:  # whatever a model does that cannot be recorded, it can still be run
                _log.warning("a stage cannot be captured", exc_info=error)
                self.give_up(f"a stage cannot be captured: {what_stopped(error)}")
            else:
                self._judge(first, recordings, errors)
        alone.go(0, backward=False)  # a stage that failed has left its device the current one
        gradients.begin()
        gradients.restore(kept)
        self.report.capture_seconds += time.monotonic() - started

    def _judge(self, first: Batch, recordings: list[Recording], errors: list[float]) -> None:
        if any(math.isnan(error) for error in errors):
            # Gradients that overflowed, as with the first scales of float16, tell nothing.
            self._first[signature_of(first)] = first
            return
        self.report.gradient_error = max(self.report.gradient_error, *errors)
        if (worst := max(errors)) > SAME_GRADIENTS:
            self.give_up(f"a captured step's gradients are {worst:.1%} off those of the same step run eagerly")
            return
        self._recordings[signature_of(first)] = recordings
        self.report.recordings += 1
        self.report.sizes = sorted([*self.report.sizes, size_of(first)])


def _cloned(batch: Batch) -> Batch:
    return {name: value.clone() for name, value in batch.items()}
