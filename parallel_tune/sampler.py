"""The global batch: which samples meet in which optimizer step, and each rank's share of them.

The step's samples depend on the seed, the global batch and the number of rows alone, so every strategy, world size
and micro-batch trains on the same samples in the same step.
"""

from __future__ import annotations

import heapq
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
        joined: rows of a micro-batch are joined, so that their sum counts; else the longest one does.
    """

    lengths: tuple[int, ...]
    targets: tuple[int, ...]
    global_batch: int
    seed: int
    joined: bool = False

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

        Joined rows are dealt so that all micro-batches have about as many tokens: none needs much more memory than the
        others, no rank and no stage waits long. Of padded ones those of similar length meet in a micro-batch, and all
        ranks work on similar lengths at once, so that little is padded.
        """
        ids = sorted(self.sample_ids(step), key=lambda i: (-self.lengths[i], i))
        if self.joined:
            dealt = deal_evenly(ids, self.lengths, processes * num_micro_batches, micro_batch)
            return [dealt[rank::processes] for rank in range(processes)]
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

    def largest_micro_batch(self, steps: int, processes: int, micro_batch: int, num_micro_batches: int) -> int:
        """The most tokens, padding not counted, of any micro-batch in the first `steps` steps."""
        if not self.joined:
            sums = self.largest_sums(steps, processes)
            return sums[min(micro_batch, len(sums)) - 1]
        return max(
            sum(self.lengths[i] for i in rows)
            for step in range(steps)
            for rank in self.micro_batches(step, processes, micro_batch, num_micro_batches)
            for rows in rank
        )

    def largest_sums(self, steps: int, processes: int) -> list[int]:
        """Entry k-1: the most tokens, padding not counted, of any micro-batch of k rows in the first `steps` steps.

        Of rows that are not joined: a step deals them out longest first, so the first rank begins with its largest.
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


def deal_evenly(ids: Sequence[int], lengths: Sequence[int], count: int, most: int) -> list[list[int]]:
    """Samples in `count` groups of at most `most`, of about as many tokens each; those with more tokens come first.

    Each sample, the longest first, goes to the group with the fewest tokens (Graham 1969, LPT).

    Args:
        ids: longest first.
    """
    groups: list[list[int]] = [[] for _ in range(count)]
    sums = [0] * count
    open_groups = [(0, number) for number in range(count)]
    for sample in ids:
        tokens, number = heapq.heappop(open_groups)
        groups[number].append(sample)
        sums[number] = tokens + lengths[sample]
        if len(groups[number]) < most:
            heapq.heappush(open_groups, (sums[number], number))
    return [groups[number] for number in sorted(range(count), key=lambda number: (-sums[number], number))]


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
