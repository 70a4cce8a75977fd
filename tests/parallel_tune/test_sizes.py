"""Few fixed sizes hold all micro-batches, with the least padding that so many sizes allow."""

from __future__ import annotations

import random
from itertools import combinations
from types import SimpleNamespace

import pytest

from parallel_tune.data.batching import IGNORED, fill_up, join
from parallel_tune.data.sizes import SIZE_COSTS_TOKENS, STEP_TOKENS, choose_sizes, size_for
from parallel_tune.gathering import fixed_sizes
from parallel_tune.sampler import GlobalBatches


def cost(tokens: list[int], sizes: tuple[int, ...]) -> int:
    return sum(size_for(count, sizes) or 10**9 for count in tokens) + SIZE_COSTS_TOKENS * len(sizes)


@pytest.mark.parametrize("seed", range(8))
def test_no_other_sizes_cost_less(seed: int) -> None:
    draws = random.Random(seed)
    tokens = [draws.randint(1, 600) for _ in range(draws.choice([40, 200, 4000]))]
    chosen = choose_sizes(tokens)
    steps = range(STEP_TOKENS, 641, STEP_TOKENS)
    most = len(tokens) // 16
    others = [sizes for k in range(1, min(most, 10) + 1) for sizes in combinations(steps, k)]
    assert cost(tokens, chosen) == min(cost(tokens, sizes) for sizes in others if sizes[-1] >= max(tokens))
    assert size_for(max(tokens), chosen) == chosen[-1]


def test_rows_of_one_length_need_one_size_and_no_padding() -> None:
    assert choose_sizes([2048] * 100) == (2048,)


def test_few_micro_batches_are_not_worth_it() -> None:
    assert choose_sizes([100] * 15) == ()
    assert choose_sizes([100] * 16) == (128,)


def test_of_micro_batches_at_once_the_largest_decides() -> None:
    """A rank that has less waits for the one that has more: a size for its own micro-batch would save nothing."""
    lengths = (100, 300) * 400
    batches = GlobalBatches(lengths, (), 2, seed=0, joined=True)
    plan = SimpleNamespace(processes=2, micro_batch=1, gradient_accumulation_steps=1)
    longer = [max(lengths[sample] for sample in batches.sample_ids(step)) for step in range(400)]
    sizes, most_rows = fixed_sizes(batches, [1] * 800, plan, 400)
    assert (sizes, most_rows) == (choose_sizes(longer), 1)
    both_short = longer.count(100)
    # The short ones of mixed pairs are no reason for a size of their own; pairs that are all short are, if many.
    assert (128 in sizes) == (both_short * (320 - 128) > SIZE_COSTS_TOKENS)
    few = SimpleNamespace(processes=4, micro_batch=1, gradient_accumulation_steps=1)
    assert fixed_sizes(GlobalBatches(lengths, (), 4, seed=0, joined=True), [1] * 800, few, 15) == ((), 1)


def test_long_micro_batches_have_coarser_sizes() -> None:
    draws = random.Random(0)
    tokens = [draws.randint(1, 100_000) for _ in range(20_000)]
    chosen = choose_sizes(tokens)
    assert max(tokens) <= chosen[-1] < max(tokens) + 1024
    assert len(chosen) <= 12


def test_no_size_holds_more_than_the_largest() -> None:
    assert size_for(129, (64, 128)) is None
    assert size_for(65, (64, 128)) == 128


def test_what_fills_a_batch_up_is_a_row_of_its_own_that_is_not_learned() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8, 9], "labels": [IGNORED, 9]}]
    batch = fill_up(join(rows, 0), 0, 8, 3)  # type: ignore[arg-type]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 9, IGNORED, IGNORED, IGNORED]]
    assert batch["cu_seq_lens"].tolist() == [0, 3, 5, 8, 8]
    with pytest.raises(AssertionError, match="do not fit"):
        fill_up(join(rows, 0), 0, 4, 3)  # type: ignore[arg-type]
