"""The global batch is what was asked for, however it is worked off."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.batching import MAX_MICRO_BATCH, batching
from strategies.contracts import Workload
from strategies.errors import ConfigError


def work(**values: int | None) -> Workload:
    return Workload(model="m", engine="transformers", num_layers=4, sequence_length=128, **values)


def test_defaults_make_eight_rows_a_process() -> None:
    batch = batching(work(), processes=3)
    assert batch.global_batch == 24
    assert batch.candidates == ((1, 8), (2, 4), (4, 2), (8, 1))


@pytest.mark.parametrize(
    ("given_values", "processes", "global_batch", "candidates"),
    [
        ({"micro_batch": 3}, 2, 24, ((3, 4),)),
        ({"gradient_accumulation_steps": 5}, 2, 20, ((2, 5),)),
        ({"micro_batch": 3, "gradient_accumulation_steps": 5}, 2, 30, ((3, 5),)),
        ({"global_batch": 12}, 5, 12, ((1, 3), (2, 2), (3, 1))),
        ({"global_batch": 12}, 1, 12, ((1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1))),
        ({"global_batch": 12, "micro_batch": 2}, 5, 12, ((2, 2),)),
        ({"global_batch": 12, "gradient_accumulation_steps": 2}, 5, 12, ((2, 2),)),
        ({"global_batch": 12, "micro_batch": 2, "gradient_accumulation_steps": 2}, 3, 12, ((2, 2),)),
        ({"global_batch": 10, "micro_batch": 2, "gradient_accumulation_steps": 2}, 3, 10, ((2, 2),)),
        ({"global_batch": 1}, 4, 1, ((1, 1),)),
    ],
)
def test_what_is_given_is_kept(
    given_values: dict[str, int], processes: int, global_batch: int, candidates: tuple[tuple[int, int], ...]
) -> None:
    batch = batching(work(**given_values), processes)
    assert (batch.global_batch, batch.candidates) == (global_batch, candidates)


@pytest.mark.parametrize("steps", [1, 3])
def test_three_numbers_that_disagree_are_refused_with_both_products(steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"global_batch is 8, but 2 .* make {2 * 2 * steps}") as refusal:
        batching(work(global_batch=8, micro_batch=2, gradient_accumulation_steps=steps), 2)
    assert "gradient_accumulation_steps 2" in refusal.value.hint


@pytest.mark.parametrize("name", ["global_batch", "micro_batch", "gradient_accumulation_steps"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_below_one_are_refused(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, not {value}"):
        batching(work(**{name: value}), 1)


@given(st.integers(1, 600), st.integers(1, 9))
def test_every_candidate_covers_the_share_without_a_step_too_many(global_batch: int, processes: int) -> None:
    share = math.ceil(global_batch / processes)
    candidates = batching(work(global_batch=global_batch), processes).candidates
    assert candidates
    assert (1, share) in candidates
    for micro_batch, steps in candidates:
        assert micro_batch <= MAX_MICRO_BATCH
        assert micro_batch * (steps - 1) < share <= micro_batch * steps
    assert len(candidates) <= 30
