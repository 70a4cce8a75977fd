"""Lanes: the schedule that keeps every device of a split model busy.

K threads, the lanes, each carry whole micro-batches. Each stage has a token, and only the lane that holds it issues
work there; at a boundary the autograd graph is cut and the token handed on, so that another micro-batch follows while
this one works at the next stage. Gradients are bitwise those of one micro-batch after the other.
"""

from __future__ import annotations

import copy
import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from strategies.ambient import Ambient, capture, entered
from strategies.board import Aborted, Board
from strategies.cuts import pass_through
from strategies.probe import Finding, probe
from strategies.randomness import get_states, set_states
from strategies.stage_capture import StageCapture
from strategies.stages import Stages
from strategies.visit import Clock, Course, Segment, Visit

_log = logging.getLogger(__name__)

Forward = Callable[[int, Any], Tensor]
Backward = Callable[[Tensor], None]
Streams = Mapping[torch.device, torch.cuda.Stream]


class Lanes:
    """Runs micro-batches through a split model, several at once. Use as a context manager, or call `close()`.

    The first run sends one micro-batch through the model more than asked (forward only), to see whether its graph can
    be cut at the stages; where it cannot, every run works off one micro-batch after the other, and `reason` says why.
    Activation checkpoints are made non-reentrant while the lanes are open.

    Args:
        stages: the split model.
        num_lanes: micro-batches in flight at once; one is the naive schedule.
        seed: of dropout masks, which depend on (seed, key of the run, micro-batch, stage) alone.
        align_clocks: let the devices finish before each run, so that the timelines of distinct GPUs compare exactly.
        captured: recordings of micro-batches, which lanes then replay; None to run all of them eagerly.
    """

    sums_gradients = False

    def __init__(
        self,
        stages: Stages,
        num_lanes: int,
        seed: int = 0,
        align_clocks: bool = False,
        captured: StageCapture | None = None,
    ) -> None:
        if num_lanes < 1:
            raise ValueError(f"num_lanes must be at least 1, not {num_lanes}")
        self._stages = stages
        self._num_lanes = num_lanes
        self._seed = seed
        self._align_clocks = align_clocks
        self._captured = captured
        self._findings: dict[bool, Finding] = {}
        self._runs = 0
        self._course: Course | None = None
        self._checkpoints: list[tuple[Any, Any]] = []
        self._wake = threading.Condition()
        self._job: _Job | None = None
        self._posted = 0
        self._closed = False
        self._threads: list[threading.Thread] = []

    @property
    def reason(self) -> str | None:
        """Why micro-batches run one after the other; None while nothing forbids lanes."""
        return next((finding.reason for finding in self._findings.values() if finding.reason), None)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        return tuple(dict.fromkeys(self._stages.devices))

    @property
    def labels_device(self) -> torch.device:
        """Where the head computes the loss."""
        return self._stages.head_device

    def timeline(self) -> list[Segment]:
        """The schedule of the last run, by start. Empty if that run was not in lanes. Waits for the devices."""
        return self._course.segments() if self._course else []

    def run(
        self,
        micro_batches: Sequence[Any],
        forward: Forward,
        *,
        backward: Backward = Tensor.backward,
        key: int | None = None,
    ) -> list[Tensor]:
        """Forward and backward of all micro-batches; gradients are added to `.grad`. Without grad mode, forward only.

        Labels and what else only the head needs should lie on `stages.head_device`: a lane must not touch a device
        whose token it does not hold.

        Args:
            micro_batches: what `forward` gets, one at a time.
            forward: (index, micro-batch) -> scalar loss; runs the model once, in a lane's thread.
            backward: runs the loss's backward, e.g. `accelerator.backward`; also in the lane's thread.
            key: tells this run's dropout masks from others', e.g. the training step; runs are counted without it.

        Returns:
            The losses, detached, in order.

        Raises:
            BaseException: the first error of any lane, or the interrupt of this thread, after all lanes ended.
        """
        self._runs += 1
        self._course = None
        if self._closed:
            raise RuntimeError("these lanes are closed")
        if not micro_batches:
            return []
        finding = self._probe(lambda: forward(0, copy.copy(micro_batches[0])))
        replays = self._recorded(finding, micro_batches, forward, backward)
        if finding.reason is not None:
            return _one_by_one(micro_batches, forward, backward)

        self._start_threads()
        devices, random = self._stages.devices, finding.random_devices
        tokens = _tokens(devices, random)
        course = Course(
            board=Board(tokens, len(micro_batches), self._num_lanes),
            clock=Clock(devices, self._align_clocks),
            devices=devices,
            streams={gpu: torch.cuda.current_stream(gpu) for gpu in _gpus(devices)},
            seeds=tuple(_seeded(device, random) for device in devices),
            key=(self._seed, self._runs if key is None else key),
        )
        job = _Job(self._stages, course, micro_batches, forward, backward, self._num_lanes, replays)
        states = get_states(random) if random else {}
        try:
            self._execute(job)
        finally:
            set_states(states)
            job.join_streams()
            course.lent.clear()
        if course.board.error is not None:
            raise course.board.error
        self._course = course
        return job.losses

    def close(self) -> None:
        """End the threads and give the model its own checkpoints back. A second call does nothing."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        for module, original in self._checkpoints:
            module._gradient_checkpointing_func = original
        self._checkpoints.clear()

    def __enter__(self) -> Lanes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _probe(self, forward: Callable[[], Tensor]) -> Finding:
        """Look at the model once in training and once in evaluation mode, between which dropout differs."""
        training = self._stages.model.training
        self._take_checkpoints(keep_random=True)
        if training not in self._findings:
            self._findings[training] = probe(self._stages, forward)
            if (reason := self._findings[training].reason) is not None:
                _log.warning("lanes: micro-batches run one after the other, since %s", reason)
        if not self._findings[training].random_devices:
            self._take_checkpoints(keep_random=False)
        return self._findings[training]

    def _recorded(
        self, finding: Finding, micro_batches: Sequence[Any], forward: Forward, backward: Backward
    ) -> StageCapture | None:
        """What lanes replay in a run with gradients, after what is due for it was recorded."""
        if self._captured is None or not torch.is_grad_enabled():
            return None
        if finding.reason is not None:
            self._captured.give_up(f"the model's graph cannot be cut: {finding.reason}")
        elif finding.random_devices:
            self._captured.give_up("the model draws random numbers, which would differ from those of eager lanes")
        self._captured.prepare(micro_batches, forward, backward, self._num_lanes)
        return self._captured

    def _take_checkpoints(self, keep_random: bool) -> None:
        """Make all activation checkpoints non-reentrant; done before each run, as trainers switch them on late.

        Reentrant ones run a backward pass inside the backward pass and some, such as Unsloth's offloading one, keep
        buffers that all threads share. Generators are only stored and restored where the forward uses them.
        """
        for module in self._recomputing:
            own = getattr(module, "_gradient_checkpointing_func", None)
            if own is None:
                continue
            if not isinstance(own, _Checkpoint):
                self._checkpoints.append((module, own))
            module._gradient_checkpointing_func = _Checkpoint(  # type: ignore[assignment]
                checkpoint, use_reentrant=False, preserve_rng_state=keep_random
            )

    @functools.cached_property
    def _recomputing(self) -> tuple[nn.Module, ...]:
        """Modules that have checkpoints, or may be given some: transformers goes by the same flag.

        Searched once. There are thousands of modules, and in the 10 to 20 ms of a search before each run no GPU works.
        """
        flags = ("gradient_checkpointing", "_gradient_checkpointing_func")
        return tuple(module for module in self._stages.model.modules() if any(hasattr(module, flag) for flag in flags))

    def _execute(self, job: _Job) -> None:
        """Let the lanes do the job and wait until all have ended, also when this thread is interrupted meanwhile."""
        while True:
            try:
                self._post(job)
                job.wait()
                break
            except BaseException as interrupt:
                job.course.board.fail(interrupt)
        self._job = None

    def _start_threads(self) -> None:
        while len(self._threads) < self._num_lanes:
            streams = {gpu: torch.cuda.Stream(gpu) for gpu in _gpus(self._stages.devices)}  # type: ignore[no-untyped-call]
            name = f"lane-{len(self._threads)}"
            arguments = (len(self._threads), streams)
            self._threads.append(threading.Thread(target=self._lane, args=arguments, name=name, daemon=True))
        for thread in self._threads:
            if thread.ident is None:
                thread.start()

    def _post(self, job: _Job) -> None:
        """Give the job to the lanes; doing so twice does no harm."""
        with self._wake:
            if self._job is not job:
                self._job = job
                self._posted += 1
            self._wake.notify_all()

    def _lane(self, number: int, streams: Streams) -> None:
        """A lane's thread: one job after the other, holding on to none."""
        done = 0
        while True:
            with self._wake:
                while self._posted == done and not self._closed:
                    self._wake.wait()
                if self._closed:
                    return
                done, job = self._posted, self._job
            if job is not None:
                job.work(number, streams)
            del job


class _Checkpoint(functools.partial):  # type: ignore[type-arg]
    """A checkpoint function that lanes set; its class tells it from the model's own."""


class _Job:
    """One run, as the lanes see it."""

    def __init__(
        self,
        stages: Stages,
        course: Course,
        micro_batches: Sequence[Any],
        forward: Forward,
        backward: Backward,
        num_lanes: int,
        replays: StageCapture | None,
    ) -> None:
        self.course = course
        self.losses: list[Any] = [None] * len(micro_batches)
        self._stages = stages
        self._micro_batches = micro_batches
        self._forward = forward
        self._backward = backward
        self._replays = replays
        self._ambient: Ambient = capture()
        self._working = num_lanes
        self._ended = threading.Condition()
        self._gpus = _gpus(stages.devices)
        self._begin = {gpu: torch.cuda.current_stream(gpu).record_event() for gpu in self._gpus}
        self._ends: list[torch.cuda.Event] = []

    def wait(self) -> None:
        """Wait until every lane has ended its part."""
        with self._ended:
            while self._working:
                # A signal that another thread happened to receive only reaches this one when it wakes up.
                self._ended.wait(timeout=0.1)

    def work(self, lane: int, streams: Streams) -> None:
        """A lane's part: micro-batches as long as there are any. Raises nothing; errors go to the board."""
        try:
            self._ambient.variables.copy().run(self._work, lane, streams)
        except Aborted:
            pass
        except BaseException as error:
            self.course.board.fail(error)
        finally:
            with self._ended:
                self._working -= 1
                self._ended.notify_all()

    def join_streams(self) -> None:
        """Let what this thread issues from now on wait for the lanes' work."""
        for event in self._ends:
            for gpu in self._gpus:
                torch.cuda.current_stream(gpu).wait_event(event)

    def _work(self, lane: int, streams: Streams) -> None:
        for gpu, stream in streams.items():
            torch.cuda.set_stream(stream)
            stream.wait_event(self._begin[gpu])
        try:
            with entered(self._ambient):
                while (index := self.course.board.take()) is not None:
                    self._micro_batch(lane, index, streams)
        finally:
            self._ends.extend(stream.record_event() for stream in streams.values())

    def _micro_batch(self, lane: int, index: int, streams: Streams) -> None:
        """One micro-batch through all stages and back, replayed where it is recorded."""
        visit, batch = Visit(self.course, index, streams), self._micro_batches[index]
        try:
            if recording := self._replays and self._replays.recording(lane, index):
                self.losses[index] = recording.play(visit, batch)
            else:
                forward = functools.partial(self._forward, index, batch)
                self.losses[index] = pass_through(self._stages, visit, forward, self._backward)
            visit.leave()
        except BaseException:
            self.course.board.drop(index)
            raise


def _one_by_one(micro_batches: Sequence[Any], forward: Forward, backward: Backward) -> list[Tensor]:
    """The naive schedule, graph uncut."""
    losses = []
    for index, micro_batch in enumerate(micro_batches):
        loss = forward(index, micro_batch)
        if torch.is_grad_enabled() and loss.requires_grad:
            backward(loss)
        losses.append(loss.detach())
    return losses


def _tokens(devices: Sequence[torch.device], random: frozenset[torch.device]) -> tuple[int, ...]:
    """The token of each stage: its own on the CPU, unless stages draw random numbers from one generator.

    A GPU has one token, as it has one stream of work: Unsloth unpacks 4-bit weights into a buffer that all layers of a
    device share, which is right as long as one lane at a time issues work there.
    """
    if torch.device("cpu") in random:
        return (0,) * len(devices)
    return tuple(devices.index(device) if device.type == "cuda" else stage for stage, device in enumerate(devices))


def _seeded(device: torch.device, random: frozenset[torch.device]) -> tuple[torch.device, ...]:
    """The generators that a segment on `device` must seed."""
    return tuple(used for used in random if used in (device, torch.device("cpu")))


def _gpus(devices: Sequence[torch.device]) -> list[torch.device]:
    """The distinct GPUs, in order."""
    return list(dict.fromkeys(device for device in devices if device.type == "cuda"))
