"""What crosses a boundary, and graphs that cannot be cut: found, named, and run one micro-batch after the other."""

from __future__ import annotations

import types

import pytest
import torch
from lane_steps import CPU, CUTS, VOCAB, Gradients, assert_same, batches, gradients
from torch import Tensor, nn

from strategies.pipeline import Lanes
from strategies.stages import split


class ToyLayer(nn.Module):
    """Takes and changes several tensors; `leak` makes it read what an earlier layer left behind."""

    def __init__(self, leak: dict[str, Tensor] | None, index: int) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.gate = nn.Linear(6, 6)
        self.leak, self.index = leak, index

    def forward(self, hidden: Tensor, side: tuple[Tensor, dict[str, Tensor]], *, scale: Tensor) -> Tensor:
        extra = side[0] * side[1]["fixed"]
        if self.leak is not None:
            if self.index == 0:
                self.leak["gate"] = self.gate(hidden)
            elif self.index == 3:
                extra = extra + self.leak["gate"]
        return torch.tanh(self.linear(hidden) * scale + self.gate(extra))


class Toy(nn.Module):
    """A causal model in the shape that `split` looks for; its outer loop hands every layer tensors that train."""

    def __init__(self, leak: bool = False, passes: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = types.SimpleNamespace(num_hidden_layers=4)
        store: dict[str, Tensor] | None = {} if leak else None
        self.inner = nn.Module()
        self.inner.embed = nn.Embedding(VOCAB, 6)
        self.inner.side = nn.Linear(6, 6)
        self.inner.scale = nn.Parameter(torch.ones(6))
        self.inner.layers = nn.ModuleList(ToyLayer(store, index) for index in range(4))
        self.inner.norm = nn.LayerNorm(6)
        self.inner.forward = self.run_layers
        self.head = nn.Linear(6, VOCAB)
        self.passes = passes

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def run_layers(self, ids: Tensor) -> Tensor:
        hidden = self.inner.embed(ids)
        side = (self.inner.side(hidden), {"fixed": torch.arange(6.0)})
        for layer in self.inner.layers:
            hidden = layer(hidden, side, scale=self.inner.scale)
        return self.inner.norm(hidden)

    def forward(self, ids: Tensor) -> Tensor:
        for _ in range(self.passes):
            hidden = self.inner(ids)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), ids.flatten())


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
