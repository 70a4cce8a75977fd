"""What the latest steps of a split model took, stage by stage, beside the schedule that runs them."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from strategies.base import Schedule
from strategies.visit import Segment

if TYPE_CHECKING:
    import torch

WARM_UP_STEPS = 2
"""Steps of a process that compile, load kernels and fill caches: they say nothing of the others."""
LATEST_STEPS = 10


class TimedSchedule(Schedule, Protocol):
    """A schedule that knows when each stage worked."""

    def timeline(self) -> list[Segment]:
        """The schedule of the last run; empty where it is not known. Waits for the devices."""


@dataclass(frozen=True)
class StageSeconds:
    """What a micro-batch took at each stage: the median of the latest steps.

    Attributes:
        seconds: of each stage, forward and backward.
        micro_batch_tokens: padding included.
        steps: how many were looked at.
    """

    seconds: tuple[float, ...]
    micro_batch_tokens: float
    steps: int


class Recorded:
    """A schedule, and what its latest runs took.

    Args:
        schedule: what runs the steps. May be asked for anew in each step, as lanes may turn out to be impossible.
        places: the physical device of each stage.
        tokens: of a micro-batch.
        at_once: how many stages a device works on at once without holding any up.
    """

    sums_gradients = False

    def __init__(
        self,
        schedule: Callable[[], TimedSchedule],
        places: Sequence[Hashable],
        tokens: Callable[[Any], int],
        at_once: float = 1.0,
    ) -> None:
        self._schedule = schedule
        self._at_once = at_once
        self._places = tuple(places)
        self._count_tokens = tokens
        self._steps: deque[tuple[list[float], float, int]] = deque(maxlen=LATEST_STEPS)
        self._runs = 0
        self._ran: TimedSchedule | None = None
        self._tokens: list[int] = []

    @property
    def devices(self) -> Sequence[torch.device]:
        """Where a micro-batch is worked on, each once, that of the inputs first."""
        return self._schedule().devices

    @property
    def labels_device(self) -> torch.device:
        """Where the loss is computed."""
        return self._schedule().labels_device

    def timeline(self) -> list[Segment]:
        """The schedule of the last run; empty where it is not known. Waits for the devices."""
        return self._ran.timeline() if self._ran is not None else []

    def run(
        self,
        micro_batches: Sequence[Any],
        forward: Callable[[int, Any], Any],
        *,
        backward: Callable[[Any], None],
        key: int | None = None,
    ) -> list[Any]:
        """As the schedule's. Its clock waits for the devices before each run: what the last one took is known then."""
        self._keep()
        self._ran = None
        schedule = self._schedule()
        losses = schedule.run(micro_batches, forward, backward=backward, key=key)
        self._runs += 1
        self._ran = schedule
        self._tokens = [self._count_tokens(micro_batch) for micro_batch in micro_batches]
        return losses

    def stage_seconds(self) -> StageSeconds | None:
        """Of the runs so far, the first ones left out; None if there were too few. Waits for the devices."""
        self._keep()
        if not self._steps:
            return None
        tokens = statistics.median(total / count for _, total, count in self._steps)
        # Steps differ in their tokens: what a token takes is what they share.
        each = zip(*([second / total for second in seconds] for seconds, total, _ in self._steps), strict=True)
        return StageSeconds(tuple(statistics.median(stage) * tokens for stage in each), tokens, len(self._steps))

    def _keep(self) -> None:
        total, tokens, self._tokens = sum(self._tokens), self._tokens, []
        if self._ran is None or total <= 0 or self._runs <= WARM_UP_STEPS:
            return
        if segments := self._ran.timeline():
            self._steps.append((undisturbed_seconds(segments, self._places, self._at_once), total, len(tokens)))


def undisturbed_seconds(segments: Sequence[Segment], places: Sequence[Hashable], at_once: float = 1.0) -> list[float]:
    """Seconds of work of each stage, as if it had had its device to itself.

    Stages that worked at once on one device, as virtual ones of a CPU do, are taken to have shared it evenly.

    Args:
        places: the physical device of each stage.
        at_once: how many stages a device works on at once without holding any up.
    """
    seconds = [0.0] * len(places)
    by_place: dict[Hashable, list[Segment]] = defaultdict(list)
    for segment in segments:
        by_place[places[segment.stage]].append(segment)
    for there in by_place.values():
        moments = sorted(
            [(segment.start, 1, segment.stage) for segment in there]
            + [(segment.end, -1, segment.stage) for segment in there]
        )
        working = [0] * len(places)
        before = moments[0][0]
        for moment, change, stage in moments:
            if busy := sum(working):
                for each, count in enumerate(working):
                    seconds[each] += (moment - before) * count * min(1.0, at_once / busy)
            working[stage] += change
            before = moment
    return seconds
