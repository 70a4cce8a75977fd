"""The order of a split's micro-batches."""

from __future__ import annotations

from parallel_tune.sampler import GlobalBatches, MicroBatchSampler, shortest_at_the_ends


def test_micro_batches_of_a_split_rise_and_fall() -> None:
    longest_first = [[0], [1], [2], [3], []]
    assert shortest_at_the_ends(longest_first) == [[3], [1], [0], [2], []]


def test_the_order_changes_no_step_and_no_micro_batch() -> None:
    batches = GlobalBatches(lengths=tuple(range(20)), targets=tuple(range(20)), global_batch=8, seed=1)
    plain = list(MicroBatchSampler(batches, 0, 1, 2, 4))
    split = list(MicroBatchSampler(batches, 0, 1, 2, 4, is_split=True))
    assert plain != split
    for step in range(3):
        assert sorted(plain[4 * step : 4 * step + 4]) == sorted(split[4 * step : 4 * step + 4])
