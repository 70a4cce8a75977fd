"""What crosses a boundary, and graphs that cannot be cut: found, named, and run one micro-batch after the other."""

from __future__ import annotations

import pytest
import torch
from lane_steps import CPU, CUTS, Gradients, assert_same, batches, gradients
from torch import Tensor
from toy_model import Toy

from strategies.pipeline import Lanes
from strategies.stages import split


def toy_run(model: Toy, lanes: Lanes | None, count: int = 5) -> tuple[list[Tensor], Gradients]:
    inputs = [batch["input_ids"] for batch in batches(count)]
    model.zero_grad(set_to_none=True)
    if lanes is not None:
        return lanes.run(inputs, lambda _, ids: model(ids)), gradients(model)
    losses = []
    for ids in inputs:
        loss = model(ids)
        loss.backward()
        losses.append(loss.detach())
    return losses, gradients(model)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_several_tensors_cross_with_and_without_gradient_a_weight_among_them(count: int) -> None:
    model = Toy()
    stages = split(model, CUTS[count], [CPU] * count)
    expected = toy_run(model, None)
    assert expected[1]["inner.scale"] is not None and expected[1]["inner.side.weight"] is not None
    for num_lanes in (1, 2, 4):
        with Lanes(stages, num_lanes) as lanes:
            assert_same(expected, toy_run(model, lanes))
            assert lanes.reason is None


def test_a_result_used_past_a_cut_is_found_and_named_and_the_model_runs_naively() -> None:
    model = Toy(leak=True)
    with Lanes(split(model, CUTS[3], [CPU] * 3), 2) as lanes:
        expected = toy_run(model, None)
        assert_same(expected, toy_run(model, lanes))
        assert lanes.reason is not None
        assert "stage 2 sends a gradient to inner.layers.0.gate." in lanes.reason
        assert lanes.timeline() == []


def test_a_second_pass_through_the_layers_is_found() -> None:
    model = Toy(passes=2)
    with Lanes(split(model, CUTS[2], [CPU] * 2), 2) as lanes:
        assert_same(toy_run(model, None), toy_run(model, lanes))
        assert lanes.reason is not None and "run more than once a pass" in lanes.reason


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_several_layers_is_found(reentrant: bool) -> None:
    model = Toy()
    whole = model.run_layers

    def checkpointed(ids: Tensor) -> Tensor:
        anchor = torch.zeros((), requires_grad=True)
        call = torch.utils.checkpoint.checkpoint
        return call(lambda ids, _: whole(ids), ids, anchor, use_reentrant=reentrant)

    model.inner.forward = checkpointed
    with Lanes(split(model, CUTS[2], [CPU] * 2), 2) as lanes:
        assert_same(toy_run(model, None), toy_run(model, lanes))
        assert lanes.reason is not None and "checkpoint that spans several layers" in lanes.reason
