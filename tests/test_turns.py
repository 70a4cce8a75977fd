"""The naive schedule, timed: its gradients are the model's own, and its timeline shows one stage at work at a time."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from lane_steps import CPU, CUTS, assert_same, batches, checkpointing, gradients, loss_of, naive, tiny

from strategies.pipeline import Lanes
from strategies.recording import LATEST_STEPS, WARM_UP_STEPS, Recorded, undisturbed_seconds
from strategies.stages import split
from strategies.turns import Turns
from strategies.visit import Segment


def in_turns(turns: Turns, model: Any, inputs: list[Any]) -> Any:
    model.zero_grad(set_to_none=True)
    return turns.run(inputs, loss_of(model)), gradients(model)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["off", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("kind", ["full", "lora", "tied"])
def test_gradients_are_bitwise_and_every_stage_is_seen(kind: str, mode: str, stages: int) -> None:
    model = tiny(kind)
    checkpointing(model, mode)
    inputs = batches(3)
    expected = naive(model, inputs)
    turns = Turns(split(model, CUTS[stages], [CPU] * stages))
    assert_same(expected, in_turns(turns, model, inputs))
    last = stages - 1
    one = [(stage, "forward") for stage in range(last)]
    back = [(stage, "backward") for stage in reversed(range(last))]
    way = [*one, (last, "forward+backward"), *back]
    timeline = turns.timeline()
    assert [(s.micro_batch, s.stage, s.direction) for s in timeline] == [(m, *step) for m in range(3) for step in way]
    assert all(before.end <= after.start for before, after in pairwise(timeline))
    assert all(segment.end > segment.start for segment in timeline)


def test_dropout_draws_what_the_model_draws() -> None:
    model, inputs = tiny("lora", dropout=0.3), batches(3)
    torch.manual_seed(1)
    expected = naive(model, inputs)
    turns = Turns(split(model, CUTS[3], [CPU] * 3))
    torch.manual_seed(1)
    assert_same(expected, in_turns(turns, model, inputs))


def test_stages_that_train_nothing_have_no_backward() -> None:
    model = tiny()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "layers.3" in name
    turns = Turns(split(model, CUTS[3], [CPU] * 3))
    in_turns(turns, model, batches(1))
    assert [(s.stage, s.direction) for s in turns.timeline()] == [
        (0, "forward"), (1, "forward"), (2, "forward+backward"),
    ]  # fmt: skip


def test_without_gradients_there_are_forwards_alone() -> None:
    model = tiny()
    turns = Turns(split(model, CUTS[2], [CPU] * 2))
    with torch.no_grad():
        turns.run(batches(2), loss_of(model))
    assert [(s.micro_batch, s.stage) for s in turns.timeline()] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_an_error_leaves_no_half_timeline_and_the_next_run_is_right() -> None:
    model, inputs = tiny(), batches(2)
    expected = naive(model, inputs)
    model.zero_grad(set_to_none=True)
    turns = Turns(split(model, CUTS[2], [CPU] * 2))
    with pytest.raises(IndexError):
        turns.run([inputs[0], {name: ids + 1000 for name, ids in inputs[1].items()}], loss_of(model))
    assert {segment.micro_batch for segment in turns.timeline()} == {0}
    assert_same(expected, in_turns(turns, model, inputs))


def test_stages_at_work_at_once_share_their_device() -> None:
    segments = [Segment(0, 0, "forward", 0.0, 2.0), Segment(1, 1, "forward", 1.0, 3.0), Segment(0, 2, "b", 5.0, 6.0)]
    assert undisturbed_seconds(segments, [0, 0]) == pytest.approx([1.0 + 0.5 + 1.0, 0.5 + 1.0])
    assert undisturbed_seconds(segments, [0, 1]) == pytest.approx([3.0, 2.0])
    assert undisturbed_seconds(segments, [0, 0], at_once=2.0) == pytest.approx([3.0, 2.0])
    assert undisturbed_seconds(segments, [0, 0], at_once=1.5) == pytest.approx([2.75, 1.75])


class Said:
    """A schedule whose timeline is told."""

    sums_gradients = False
    labels_device = CPU

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def timeline(self) -> list[Segment]:
        return [
            Segment(stage, 0, "forward", 10 * stage, 10 * stage + seconds) for stage, seconds in enumerate(self.seconds)
        ]

    def run(self, micro_batches: Any, forward: Any, *, backward: Any, key: Any = None) -> list[Any]:
        if self.seconds == [0.0]:
            raise ValueError("this one failed")
        return []


def recorded(steps: list[tuple[list[float], list[int]]]) -> Recorded:
    said = Said()
    record = Recorded(lambda: said, [0, 1], lambda tokens: int(tokens))
    for seconds, tokens in steps:
        said.seconds = seconds
        if seconds == [0.0]:
            with pytest.raises(ValueError, match="this one failed"):
                record.run(tokens, None, backward=None)  # type: ignore[arg-type]
        else:
            record.run(tokens, None, backward=None)  # type: ignore[arg-type]
            record.timeline()
            _settle(record)
    return record


def _settle(record: Recorded) -> None:
    """What the real clock tells later, this one tells now."""
    record._keep()


def test_the_first_steps_and_failed_ones_do_not_count() -> None:
    assert recorded([([9.0, 9.0], [100])] * WARM_UP_STEPS).stage_seconds() is None
    slow = [([9.0, 9.0], [100])] * WARM_UP_STEPS
    record = recorded([*slow, ([1.0, 3.0], [50, 150]), ([0.0], [1]), ([1.0, 3.0], [50, 150])])
    measured = record.stage_seconds()
    assert measured is not None
    # Two micro-batches a step, of 100 tokens on average.
    assert (measured.seconds, measured.micro_batch_tokens, measured.steps) == (pytest.approx((0.5, 1.5)), 100, 2)
    assert recorded([*slow, ([1.0, 3.0], [])]).stage_seconds() is None


def test_the_median_of_the_latest_steps() -> None:
    slow = [([9.0, 9.0], [100])] * 20
    latest = [([float(step), 2.0], [100]) for step in range(1, LATEST_STEPS + 1)]
    measured = recorded([*slow, *latest]).stage_seconds()
    assert measured is not None
    assert measured.steps == LATEST_STEPS
    assert measured.seconds == pytest.approx((5.5, 2.0))


def test_real_lanes_and_turns_are_recorded_alike() -> None:
    model, inputs = tiny(), batches(4)
    stages = split(model, CUTS[2], [CPU] * 2)
    with Lanes(stages, 2) as lanes:
        for schedule in (Turns(stages), lanes):
            record = Recorded(lambda: schedule, [0, 0], lambda batch: int(batch["input_ids"].numel()))  # noqa: B023
            for _ in range(4):
                record.run(inputs, loss_of(model), backward=torch.Tensor.backward)
            measured = record.stage_seconds()
            assert measured is not None
            assert measured.steps == 2
            assert measured.micro_batch_tokens == sum(batch["input_ids"].numel() for batch in inputs) / 4
            assert all(seconds > 0 for seconds in measured.seconds)
