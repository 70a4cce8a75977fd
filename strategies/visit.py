"""One micro-batch's way through the segments: taking and giving back tokens, streams and events, the clock."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from strategies.board import Board
from strategies.cuts import copies_on
from strategies.randomness import generator_of, seed_of


@dataclass(frozen=True)
class Segment:
    """A part of the schedule as it ran, in seconds since the run began: one bar of its picture.

    Attributes:
        stage: where; the device is that of the stage.
        direction: "forward" or "backward"; at the last stage a micro-batch's both are one "forward+backward".
    """

    stage: int
    micro_batch: int
    direction: str
    start: float
    end: float


def busy_shares(segments: Sequence[Segment], num_stages: int) -> list[float]:
    """For each stage, the share of the whole schedule's time that it worked."""
    whole = max(segment.end for segment in segments) - min(segment.start for segment in segments)
    busy = [0.0] * num_stages
    for segment in segments:
        busy[segment.stage] += segment.end - segment.start
    return [seconds / whole if whole > 0 else 0.0 for seconds in busy]


ALIGNING_TRIES = 4


class Clock:
    """Times on the host or, for a CUDA device, of the device itself, by events.

    Args:
        align: wait for the devices before the clock starts, and find out when each one's first event took place on the
            host's clock, so that times of distinct GPUs compare to some microseconds, whoever else uses them.
    """

    def __init__(self, devices: Sequence[torch.device], align: bool) -> None:
        gpus = {device for device in devices if device.type == "cuda"}
        if align:
            for device in gpus:
                torch.cuda.synchronize(device)
        self._start = time.perf_counter()
        self._zero: dict[torch.device, tuple[torch.cuda.Event, float]] = {
            device: self._aligned(device) if align else (self.mark(device), 0.0)  # type: ignore[misc]
            for device in gpus
        }

    def _aligned(self, device: torch.device) -> tuple[torch.cuda.Event, float]:
        """An event, and when it took place: of several, the one that the host saw come and go the quickest."""
        best, moment, shortest = None, 0.0, float("inf")
        for _ in range(ALIGNING_TRIES):
            before = time.perf_counter()
            event = self.mark(device)
            assert isinstance(event, torch.cuda.Event)
            event.synchronize()
            after = time.perf_counter()
            if after - before < shortest:
                best, moment, shortest = event, (before + after) / 2 - self._start, after - before
        assert best is not None
        return best, moment

    def mark(self, device: torch.device) -> Mark:
        """This moment on `device`, in its current stream's order."""
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event

    def seconds(self, device: torch.device, mark: Mark) -> float:
        """A mark in seconds since the clock's start; waits until the device has reached it."""
        if isinstance(mark, float):
            return mark - self._start
        mark.synchronize()
        zero, moment = self._zero[device]
        return moment + float(zero.elapsed_time(mark)) / 1000


Mark = float | torch.cuda.Event
Marks = Sequence[tuple[int, int, str, Mark, Mark]]
"""(stage, micro-batch, direction, start, end), in a clock's marks."""


def as_segments(clock: Clock, devices: Sequence[torch.device], marks: Marks) -> list[Segment]:
    """The schedule as it ran, by start; waits for the devices to finish it."""
    result = []
    for stage, micro_batch, direction, start, end in marks:
        seconds = [clock.seconds(devices[stage], mark) for mark in (start, end)]
        result.append(Segment(stage, micro_batch, direction, *seconds))
    return sorted(result, key=lambda segment: segment.start)


@dataclass
class Course:
    """What the visits of one run share.

    Attributes:
        devices: of the stages.
        streams: where each GPU's segments work, all lanes' alike.
        seeds: devices whose generator each forward segment seeds, by stage; empty for a model without dropout.
        key: tells this run's random numbers from other runs'.
        lent: copies of weights of stage 0 by the weight's id and the device. Weights are the same throughout a run.
        marks: (stage, micro-batch, direction, start, end) in the clock's marks.
    """

    board: Board
    clock: Clock
    devices: tuple[torch.device, ...]
    streams: Mapping[torch.device, torch.cuda.Stream]
    seeds: tuple[tuple[torch.device, ...], ...]
    key: tuple[int, ...]
    lent: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)
    marks: list[tuple[int, int, str, Mark, Mark]] = field(default_factory=list)

    def segments(self) -> list[Segment]:
        """The schedule as it ran, by start; waits for the devices to finish it."""
        return as_segments(self.clock, self.devices, self.marks)


class Visit:
    """One micro-batch in one lane; holds at most one token at a time.

    On the GPU whose token it holds the lane works on the stream that all lanes share there, so that their work keeps
    the order in which they held the token. On any other GPU its stream is one of its own, which has waited for what
    the lane did there: copies to the next GPU leave on it, without holding up whoever has the token now.

    Args:
        aside: the lane's own stream of each GPU.
    """

    def __init__(self, course: Course, micro_batch: int, aside: Mapping[torch.device, torch.cuda.Stream]) -> None:
        self._course = course
        self._micro_batch = micro_batch
        self._aside = aside
        self._stage = -1
        self._backward = False
        self._start: Mark = 0.0

    def go(self, stage: int, backward: bool) -> None:
        """Leave the segment held, if any, then wait for this one and enter it.

        Raises:
            Aborted: another lane failed.
        """
        self.leave()
        course, device = self._course, self._course.devices[stage]
        course.board.acquire(stage, self._micro_batch, backward)
        self._stage, self._backward = stage, backward
        if device.type == "cuda":
            torch.cuda.set_stream(course.streams[device])
            torch.cuda.set_device(device)  # hand-written kernels launch on the current device
        if not backward:
            for seeded in course.seeds[stage]:
                generator_of(seeded).manual_seed(seed_of(*course.key, self._micro_batch, stage))

    def carry(self, tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """Copies that leave on the lane's own stream of the device they come from."""
        return copies_on(tensors, device)

    def lend(self, weight: Tensor, device: torch.device) -> Tensor:
        """The run's copy, made for the first micro-batch; only one lane at a time holds the device's token."""
        key = id(weight), device
        if key not in self._course.lent:
            (self._course.lent[key],) = self.carry([weight], device)
        return self._course.lent[key].detach()

    def settle(self) -> None:
        """Let the segment's work wait for what the lane last copied away from its device: a recording's tensors, unlike
        others, are written again where they lie."""
        device = self._course.devices[self._stage]
        if device.type == "cuda":
            torch.cuda.current_stream(device).wait_stream(self._aside[device])

    def arrive(self) -> None:
        """The segment's inputs are on its device: its time begins."""
        self._start = self._course.clock.mark(self._course.devices[self._stage])

    def leave(self) -> None:
        """Give the token back, if one is held, after the work issued on the device so far."""
        if self._stage < 0:
            return
        course, stage = self._course, self._stage
        device = course.devices[stage]
        end = course.clock.mark(device)
        if isinstance(end, torch.cuda.Event):
            self._aside[device].wait_event(end)
            torch.cuda.set_stream(self._aside[device])
        last = stage == len(course.devices) - 1
        direction = "forward+backward" if last else "backward" if self._backward else "forward"
        course.marks.append((stage, self._micro_batch, direction, self._start, end))
        self._stage = -1
        course.board.release(stage, self._micro_batch, self._backward)
