"""Stands for a fused cross-entropy in a trace: its bytes, no meaningful numbers."""

from __future__ import annotations

from typing import Any

import torch

from parallel_tune.memory.fused_loss import FUSED_CHUNK_ROWS
from parallel_tune.memory.operations import FLOAT32_BYTES


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are made in the forward pass, beside one chunk of float32 logits; see `fused_loss`."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows = min(labels.numel(), FUSED_CHUNK_ROWS)
        ctx.hidden_gradient = torch.empty_like(hidden)
        ctx.weight_gradient = torch.empty_like(weight) if weight.requires_grad else None
        chunk = torch.empty(rows * weight.shape[0] * FLOAT32_BYTES, dtype=torch.uint8, device=hidden.device)
        del chunk
        return torch.zeros((), dtype=torch.float32, device=hidden.device)

    @staticmethod
    def backward(ctx: Any, _gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        gradients = (ctx.hidden_gradient, ctx.weight_gradient, None)
        del ctx.hidden_gradient, ctx.weight_gradient  # the node outlives its turn
        return gradients


def chunked_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of hidden states [rows, tokens, hidden] under a head's weight [vocabulary, hidden]."""
    loss: torch.Tensor = _ChunkedLoss.apply(hidden, weight, labels)  # type: ignore[no-untyped-call]
    return loss
