"""Rows of the prediction benchmark side by side on one card, as many as its memory holds by their plans."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from prediction_again import read_arguments
from prediction_edges import facts_of
from prediction_rows import Row

from parallel_tune.planning import make_plan
from strategies.contracts import Device, Hardware
from strategies.registry import load_registry

SHARE = 0.85
"""Of the card's free memory, that rows together may have by their plans."""
FIXED_SEGMENTS = 1.2
"""By how much a row may exceed its plan whose allocator is another than the plan's: 12% were seen."""
ALWAYS_FREE_BYTES = 10 << 30
"""Unsloth sizes the chunks of its loss by the card's free memory where that is below 8 GiB, and goes without a second
buffer where it is low: a row beside others must not go another way than alone."""

POLL_SECONDS = 0.5
"""How long to wait at a time: an interrupt that comes just before a wait does not end it."""

RowT = TypeVar("RowT")
"""What runs: a row, or what another benchmark has instead."""


@dataclass(frozen=True)
class Task(Generic[RowT]):
    """A row that waits or runs.

    Attributes:
        bytes: what it is expected to hold on the card.
        alone: nothing else may run beside it.
    """

    row: RowT
    bytes: int
    alone: bool = False


def expected_bytes(row: Row, device: Device) -> int:
    """What a row holds by its plan, for rows of full length. Stages that share the card are counted a context each,
    which is too much rather than too little."""
    config = read_arguments(row.arguments(), row.shape)
    plan = make_plan(config, facts_of(row.shape), row.engine, Hardware((device,)), load_registry())
    planned = sum(device.predicted_peak_bytes for device in plan.devices)
    return int(planned * FIXED_SEGMENTS) if row.allocator == "fixed" else planned


def room_bytes(free_bytes: int) -> int:
    """What rows together may hold of a card of which so much is free; one alone may have more."""
    return min(int(SHARE * free_bytes), free_bytes - ALWAYS_FREE_BYTES)


def next_task(waiting: Sequence[Task[RowT]], running: Sequence[Task[RowT]], jobs: int, room: int) -> Task[RowT] | None:
    """The first that may begin now; None if all must wait.

    Where nothing runs, that is the first of all, however large. A smaller one may overtake a larger one, but none
    overtakes one that has to be alone: it would wait for ever.
    """
    if not running:
        return waiting[0] if waiting else None
    if len(running) >= jobs or any(task.alone for task in running):
        return None
    held = sum(task.bytes for task in running)
    for task in waiting:
        if task.alone:
            return None
        if held + task.bytes <= room:
            return task
    return None


def run_side_by_side(
    tasks: Sequence[Task[RowT]],
    jobs: int,
    room: int,
    run: Callable[[RowT, int, threading.Event], Any],
    done: Callable[[Task[RowT], Any], bool],
    in_time: Callable[[RowT], bool],
    settle: Callable[[], None],
) -> int:
    """Run all, and say how many are left because time is short.

    Args:
        run: called in a thread, with the number of a slot that no other row has meanwhile, and with an event: once it
            is set the row must end.
        done: takes what `run` returned, and says whether to run the row once more, alone; called in this thread, one
            after the other.
        in_time: whether a row may still begin; after the first that may not none does.
        settle: called before a row begins while nothing runs.

    Raises:
        BaseException: what one of these raised, KeyboardInterrupt too, when all rows have ended.
    """
    waiting = list(tasks)
    running: dict[Future[Any], tuple[Task[RowT], int]] = {}
    left = 0
    over = threading.Event()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while waiting or running:
                while (task := next_task(waiting, [it for it, _ in running.values()], jobs, room)) is not None:
                    if not in_time(task.row):
                        left = len(waiting)
                        waiting.clear()
                        break
                    if not running:
                        settle()
                    waiting.remove(task)
                    slot = min(set(range(jobs)) - {taken for _, taken in running.values()})
                    running[pool.submit(run, task.row, slot, over)] = (task, slot)
                ended, _ = wait(running, POLL_SECONDS, return_when=FIRST_COMPLETED)
                # What was measured is kept before another row's failure ends everything.
                for future in sorted(ended, key=lambda future: future.exception() is not None):
                    task, _ = running.pop(future)
                    if done(task, future.result()):
                        waiting.append(replace(task, alone=True))
        except BaseException:
            over.set()
            raise
    return left
