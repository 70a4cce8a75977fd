"""The global batch of an optimizer step, and the ways in which processes may work it off."""

from __future__ import annotations

import math
from dataclasses import dataclass

from strategies.contracts import Workload
from strategies.errors import ConfigError

DEFAULT_MICRO_BATCH = 2
DEFAULT_ACCUMULATION = 4
MAX_MICRO_BATCH = 64
"""Largest micro-batch that a plan chooses by itself: beyond it a step gains nothing and only memory is spent."""


@dataclass(frozen=True)
class Batching:
    """Samples of one optimizer step, and candidates to reach them.

    Attributes:
        global_batch: samples per optimizer step over all processes.
        candidates: (micro_batch, gradient_accumulation_steps) of one process, micro-batches ascending.
    """

    global_batch: int
    candidates: tuple[tuple[int, int], ...]


def batching(workload: Workload, processes: int) -> Batching:
    """The global batch for a number of processes, and how each may work off its share.

    With a global batch given, it stays the same for any number of processes, and each works off
    ceil(global_batch / processes) rows. Without one it is micro-batch x accumulation x processes, and what the user
    left out may be rearranged as long as that product holds.

    Raises:
        ConfigError: a number below 1, or numbers that contradict each other.
    """
    _check_positive(workload)
    micro, steps, asked = workload.micro_batch, workload.gradient_accumulation_steps, workload.global_batch
    if asked is None:
        share = (micro or DEFAULT_MICRO_BATCH) * (steps or DEFAULT_ACCUMULATION)
        return Batching(share * processes, _candidates(share, micro, steps))
    if micro is not None and steps is not None:
        _check_agreement(asked, micro, steps, processes)
    return Batching(asked, _candidates(math.ceil(asked / processes), micro, steps))


def _candidates(share: int, micro: int | None, steps: int | None) -> tuple[tuple[int, int], ...]:
    if micro is not None and steps is not None:
        return ((micro, steps),)
    if micro is not None:
        return ((micro, math.ceil(share / micro)),)
    if steps is not None:
        return ((math.ceil(share / steps), steps),)
    sizes = {2**i for i in range(MAX_MICRO_BATCH.bit_length())} | {b for b in range(1, share + 1) if share % b == 0}
    sizes = {b for b in sizes if b <= min(share, MAX_MICRO_BATCH)}
    # The smallest micro-batch that needs as few steps: 12 rows in two steps are 6 + 6, not 8 + 4.
    return tuple(sorted({(math.ceil(share / math.ceil(share / b)), math.ceil(share / b)) for b in sizes}))


def _check_positive(workload: Workload) -> None:
    for name in ("global_batch", "micro_batch", "gradient_accumulation_steps"):
        value = getattr(workload, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}.", f"Give {name} a positive number.")


def _check_agreement(asked: int, micro: int, steps: int, processes: int) -> None:
    reached = processes * micro * steps
    # One process's rows may not divide evenly, but a micro-step that no rank needs is a contradiction.
    if reached >= asked > processes * micro * (steps - 1):
        return
    needed = math.ceil(math.ceil(asked / processes) / micro)
    raise ConfigError(
        f"global_batch is {asked}, but {processes} process(es) x micro-batch {micro} x {steps} accumulation steps "
        f"make {reached}.",
        f"Leave one of the three out, or give gradient_accumulation_steps {needed}.",
    )
