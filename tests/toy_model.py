"""A model of a few lines, whose layers take several tensors, for the tests of cuts."""

from __future__ import annotations

import types

import torch
from lane_steps import VOCAB
from torch import Tensor, nn


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
    """A causal model in the shape that `split` looks for; its outer loop hands every layer tensors that train.

    Args:
        leak: the last layer reads what the first left behind.
        passes: how often the layers run.
        late: only the last layer gets the side that trains.
    """

    def __init__(self, leak: bool = False, passes: int = 1, late: bool = False) -> None:
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
        self.passes, self.late = passes, late

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def run_layers(self, ids: Tensor) -> Tensor:
        hidden = self.inner.embed(ids)
        side = (self.inner.side(hidden), {"fixed": torch.arange(6.0)})
        plain = (torch.ones(6), side[1])
        for layer in self.inner.layers:
            hidden = layer(hidden, plain if self.late and layer.index < 3 else side, scale=self.inner.scale)
        return self.inner.norm(hidden)

    def forward(self, ids: Tensor) -> Tensor:
        for _ in range(self.passes):
            hidden = self.inner(ids)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), ids.flatten())
