"""The global batch: which samples meet in which optimizer step, and each rank's share of them.

The step's samples depend on the seed, the global batch and the number of rows alone, so every strategy, world size
and micro-batch trains on the same samples in the same step.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate


@dataclass(frozen=True)
class GlobalBatches:
    """The order of samples.

    Attributes:
        lengths: tokens of each sample.
        targets: predicted tokens of each sample.
        global_batch: samples of one optimizer step; the last step of an epoch has what is left.
    """

    lengths: tuple[int, ...]
    targets: tuple[int, ...]
    global_batch: int
    seed: int

    @property
    def num_samples(self) -> int:
        return len(self.lengths)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.global_batch)

    def sample_ids(self, step: int) -> list[int]:
        """Sample ids of optimizer step `step`, counted from 0 over all epochs."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.global_batch
        return list(_epoch_order(self.num_samples, self.seed, epoch)[start : start + self.global_batch])

    def micro_batches(
        self, step: int, processes: int, micro_batch: int, num_micro_batches: int
    ) -> list[list[list[int]]]:
        """Sample ids of each rank's micro-batches, indexed [rank][micro-batch]; some may be empty.

        Rows of similar length meet in a micro-batch, and all ranks work on similar lengths at once, so that little is
        padded and no rank waits long.
        """
        ids = sorted(self.sample_ids(step), key=lambda i: (-self.lengths[i], i))
        rows_at_once = processes * micro_batch
        shares: list[list[list[int]]] = [[[] for _ in range(num_micro_batches)] for _ in range(processes)]
        for position, sample in enumerate(ids):
            index, place = divmod(position, rows_at_once)
            shares[place % processes][index].append(sample)
        return shares

    def samples(self, step: int) -> int:
        """Samples of one step."""
        return len(self.sample_ids(step))

    def longest_row(self, steps: int) -> int:
        """Tokens of the longest row among the first `steps` steps."""
        return max(self.lengths[i] for step in range(min(steps, self.steps_per_epoch)) for i in self.sample_ids(step))

    def largest_sums(self, steps: int, processes: int) -> list[int]:
        """Entry k-1: the most tokens, padding not counted, of any micro-batch of k rows in the first `steps` steps.

        A step's rows are dealt out longest first, so that the first rank's first micro-batch is its largest.
        """
        largest: list[int] = []
        for step in range(steps):
            lengths = sorted((self.lengths[i] for i in self.sample_ids(step)), reverse=True)
            sums = list(accumulate(lengths[::processes]))
            largest += sums[len(largest) :]
            largest[: len(sums)] = [max(pair) for pair in zip(largest, sums, strict=False)]
        # A short step has no more rows to give, and counts for larger micro-batches with what it has.
        return list(accumulate(largest, max))

    def target_tokens(self, step: int) -> int:
        """Predicted tokens of one step over all ranks: the loss is the mean over these."""
        return sum(self.targets[i] for i in self.sample_ids(step))

    def tokens(self, step: int) -> int:
        """Tokens of one step over all ranks, padding not counted."""
        return sum(self.lengths[i] for i in self.sample_ids(step))


@lru_cache(maxsize=4)
def _epoch_order(num_samples: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(num_samples))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return tuple(order)


def shortest_at_the_ends(micro_batches: Sequence[list[int]]) -> list[list[int]]:
    """Micro-batches that come longest first, arranged to rise and fall in length.

    A split model's last device waits for the first micro-batch to come, its first device for the last one to come back:
    both had better be short, while neighbours, which are worked on at once, stay alike.
    """
    return [*reversed(micro_batches[1::2]), *micro_batches[0::2]]


class MicroBatchSampler:
    """One rank's micro-batches in order, for a DataLoader's `batch_sampler`; an epoch at a time.

    Every step has the same number of micro-batches on every rank; the empty ones of a short last step become
    zero-weight passes, so that no rank skips a collective.

    Args:
        is_split: whether several devices work on the one process's micro-batches, one after the other.
    """

    def __init__(
        self,
        batches: GlobalBatches,
        rank: int,
        processes: int,
        micro_batch: int,
        num_micro_batches: int,
        is_split: bool = False,
    ) -> None:
        self._batches = batches
        self._rank = rank
        self._arguments = (processes, micro_batch, num_micro_batches)
        self._is_split = is_split
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._batches.steps_per_epoch * self._arguments[2]

    def __iter__(self) -> Iterator[list[int]]:
        first = self._epoch * self._batches.steps_per_epoch
        for step in range(first, first + self._batches.steps_per_epoch):
            micro_batches = self._batches.micro_batches(step, *self._arguments)[self._rank]
            yield from shortest_at_the_ends(micro_batches) if self._is_split else micro_batches
