"""One micro-batch's way through the segments: taking and giving back tokens, streams and events, the clock."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from strategies.board import Board
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


class Clock:
    """Times on the host or, for a CUDA device, of the device itself, by events.

    Args:
        align: wait for the devices before the clock starts, so that times of distinct GPUs compare exactly.
    """

    def __init__(self, devices: Sequence[torch.device], align: bool) -> None:
        self._zero: dict[torch.device, torch.cuda.Event] = {}
        gpus = {device for device in devices if device.type == "cuda"}
        if align:
            for device in gpus:
                torch.cuda.synchronize(device)
        self._start = time.perf_counter()
        for device in gpus:
            self._zero[device] = self.mark(device)  # type: ignore[assignment]

    def mark(self, device: torch.device) -> float | torch.cuda.Event:
        """This moment on `device`, in its current stream's order."""
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event

    def seconds(self, device: torch.device, mark: float | torch.cuda.Event) -> float:
        """A mark in seconds since the clock's start; waits until the device has reached it."""
        if isinstance(mark, float):
            return mark - self._start
        mark.synchronize()
        return float(self._zero[device].elapsed_time(mark)) / 1000


@dataclass
class Course:
    """What the visits of one run share.

    Attributes:
        devices: of the stages.
        tokens: the token of each stage.
        seeds: devices whose generator each forward segment seeds, by stage; empty for a model without dropout.
        key: tells this run's random numbers from other runs'.
        last_use: for each token, the event that ends its last holder's work on the GPU.
        marks: (stage, micro-batch, direction, start, end) in the clock's marks.
    """

    board: Board
    clock: Clock
    devices: tuple[torch.device, ...]
    tokens: tuple[int, ...]
    seeds: tuple[tuple[torch.device, ...], ...]
    key: tuple[int, ...]
    last_use: dict[int, torch.cuda.Event] = field(default_factory=dict)
    marks: list[tuple[int, int, str, float | torch.cuda.Event, float | torch.cuda.Event]] = field(default_factory=list)

    def segments(self) -> list[Segment]:
        """The schedule as it ran, by start; waits for the devices to finish it."""
        result = []
        for stage, micro_batch, direction, start, end in self.marks:
            seconds = [self.clock.seconds(self.devices[stage], mark) for mark in (start, end)]
            result.append(Segment(stage, micro_batch, direction, *seconds))
        return sorted(result, key=lambda segment: segment.start)


class Visit:
    """One micro-batch in one lane; holds at most one token at a time."""

    def __init__(self, course: Course, micro_batch: int) -> None:
        self._course = course
        self._micro_batch = micro_batch
        self._stage = -1
        self._backward = False
        self._start: float | torch.cuda.Event = 0.0

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
            torch.cuda.set_device(device)  # hand-written kernels launch on the current device
            if (event := course.last_use.get(course.tokens[stage])) is not None:
                torch.cuda.current_stream(device).wait_event(event)
        self._start = course.clock.mark(device)
        if not backward:
            for seeded in course.seeds[stage]:
                generator_of(seeded).manual_seed(seed_of(*course.key, self._micro_batch, stage))

    def leave(self) -> None:
        """Give the token back, if one is held, after the work issued on the device so far."""
        if self._stage < 0:
            return
        course, stage = self._course, self._stage
        device = course.devices[stage]
        end = course.clock.mark(device)
        if isinstance(end, torch.cuda.Event):
            course.last_use[course.tokens[stage]] = end
        last = stage == len(course.devices) - 1
        direction = "forward+backward" if last else "backward" if self._backward else "forward"
        course.marks.append((stage, self._micro_batch, direction, self._start, end))
        self._stage = -1
        course.board.release(stage, self._micro_batch, self._backward)
