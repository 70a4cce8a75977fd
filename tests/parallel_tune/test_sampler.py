"""The global batch: which samples meet in a step depends on seed, rows and G alone."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from parallel_tune.sampler import GlobalBatches, MicroBatchSampler

sizes = st.lists(st.integers(1, 300), min_size=1, max_size=70)


def batches(lengths: list[int], global_batch: int, seed: int = 3) -> GlobalBatches:
    return GlobalBatches(tuple(lengths), tuple(length - 1 for length in lengths), global_batch, seed)


def needed(global_batch: int, processes: int, micro_batch: int) -> int:
    return -(-global_batch // (processes * micro_batch))


@given(sizes, st.integers(1, 20), st.integers(1, 6), st.integers(1, 5), st.integers(0, 4), st.integers(0, 9))
def test_every_sample_exactly_once_an_epoch(
    lengths: list[int], global_batch: int, processes: int, micro_batch: int, epoch: int, seed: int
) -> None:
    made = batches(lengths, global_batch, seed)
    count = needed(global_batch, processes, micro_batch)
    fed: list[int] = []
    for rank in range(processes):
        sampler = MicroBatchSampler(made, rank, processes, micro_batch, count)
        sampler.set_epoch(epoch)
        mine = list(sampler)
        assert len(mine) == len(sampler) == made.steps_per_epoch * count
        assert all(len(one) <= micro_batch for one in mine)
        fed += [sample for one in mine for sample in one]
    assert sorted(fed) == list(range(len(lengths)))


@given(sizes, st.integers(1, 20), st.integers(1, 6), st.integers(1, 5), st.integers(0, 30))
def test_shares_partition_the_steps_samples(
    lengths: list[int], global_batch: int, processes: int, micro_batch: int, step: int
) -> None:
    made = batches(lengths, global_batch)
    shares = made.micro_batches(step, processes, micro_batch, needed(global_batch, processes, micro_batch))
    assert sorted(i for rank in shares for one in rank for i in one) == sorted(made.sample_ids(step))
    # No rank has more than one row more than another in a pass, and rank 0 is never without where another has some.
    for one in zip(*shares, strict=True):
        counts = [len(rows) for rows in one]
        assert max(counts) - min(counts) <= 1
        assert counts[0] == max(counts)


@given(sizes, st.integers(1, 20), st.integers(0, 30), st.integers(0, 9))
def test_steps_follow_the_documented_order(lengths: list[int], global_batch: int, step: int, seed: int) -> None:
    made = batches(lengths, global_batch, seed)
    epoch, place = divmod(step, made.steps_per_epoch)
    order = list(range(len(lengths)))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    ids = order[place * global_batch :][:global_batch]
    assert made.sample_ids(step) == ids
    assert made.samples(step) == len(ids) > 0
    assert made.tokens(step) == sum(lengths[i] for i in ids)
    assert made.target_tokens(step) == sum(lengths[i] - 1 for i in ids)


def test_rows_of_like_length_meet() -> None:
    made = batches([5, 100, 6, 90, 7, 80], 6)
    assert made.micro_batches(0, 1, 2, 3) == [[[1, 3], [5, 4], [2, 0]]]
    assert made.micro_batches(0, 2, 1, 3) == [[[1], [5], [2]], [[3], [4], [0]]]


@given(sizes, st.integers(1, 20), st.integers(1, 4), st.integers(1, 5), st.integers(0, 30))
def test_joined_rows_are_dealt_evenly(
    lengths: list[int], global_batch: int, processes: int, micro_batch: int, step: int
) -> None:
    made = replace(batches(lengths, global_batch), joined=True)
    shares = made.micro_batches(step, processes, micro_batch, needed(global_batch, processes, micro_batch))
    assert sorted(i for rank in shares for one in rank for i in one) == sorted(made.sample_ids(step))
    groups = [one for rank in shares for one in rank]
    assert all(len(one) <= micro_batch for one in groups)
    # No other group could have taken a row of the fullest one and stayed below it.
    sums = [sum(lengths[i] for i in one) for one in groups]
    fullest = groups[sums.index(max(sums))]
    for one, tokens in zip(groups, sums, strict=True):
        if fullest and len(one) < micro_batch:
            assert tokens + min(lengths[i] for i in fullest) >= max(sums)
    # Ranks work on like sums at once.
    for place in range(len(shares[0])):
        now = [sum(lengths[i] for i in rank[place]) for rank in shares]
        later = [sum(lengths[i] for i in one) for rank in shares for one in rank[place + 1 :]]
        assert min(now) >= max(later, default=0)


def test_joined_rows_of_a_step_make_like_sums() -> None:
    made = replace(batches([250, 160, 120, 110, 95, 80, 60, 40], 8), joined=True)
    for processes, count in ((1, 2), (2, 1)):
        shares = made.micro_batches(0, processes, 4, count)
        assert sorted(sum(made.lengths[i] for i in one) for rank in shares for one in rank) == [435, 480]


def test_epochs_differ_and_seeds_differ() -> None:
    made = batches([1] * 50, 50)
    assert made.sample_ids(0) != made.sample_ids(1)
    assert made.sample_ids(0) != batches([1] * 50, 50, seed=4).sample_ids(0)
