"""Cross-entropy of hidden states under a head, chunk by chunk: all logits at once never exist. Runs in workers only.

Shapes: N tokens, H the hidden size, V the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from parallel_tune.data import IGNORED
from parallel_tune.memory.fused_loss import FUSED_CHUNK_ROWS


@dataclass(frozen=True)
class Form:
    """What a model makes of its head's products before they are logits: `softcap * tanh(scale * x / softcap)`.

    Attributes:
        scale: as Granite and Cohere have it.
        softcap: as Gemma 2 has it; None caps nothing.
    """

    scale: float = 1.0
    softcap: float | None = None


def form_of(config: Any) -> Form:
    """What a model's config says of the way from its head's products to logits.

    Args:
        config: of the text model.
    """
    scale = getattr(config, "logit_scale", None)
    if scale is None:
        scale = 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return Form(float(scale), getattr(config, "final_logit_softcapping", None))


@dataclass(frozen=True)
class _Head:
    """A head and what its gradients are made of.

    Attributes:
        weight: [V, H].
        bias: [V], or none.
        dtype: of products and their gradients; the loss is computed in float32.
    """

    weight: Tensor
    bias: Tensor | None
    form: Form
    dtype: torch.dtype


@dataclass(frozen=True)
class _Gradients:
    """Buffers to be filled, None where no gradient is needed: those of the hidden states, the weight and the bias."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @property
    def all(self) -> tuple[Tensor | None, ...]:
        return self.hidden, self.weight, self.bias


class _ChunkedLoss(torch.autograd.Function):
    """The losses' sum over a divisor. Gradients are made beside the loss, chunk by chunk, but in float16: its range
    needs the loss scale, which is known in the backward pass only, so that products are made twice."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: _Head, targets: Tensor, divisor: Tensor
    ) -> Tensor:
        ctx.head, ctx.made = head, None
        if head.dtype == torch.float16 or not any(ctx.needs_input_grad):
            ctx.save_for_backward(hidden, targets, divisor)
            return _walk(head, hidden, targets) / divisor
        ctx.made = _buffers(ctx, head, hidden)
        return _walk(head, hidden, targets, ctx.made, divisor.float().reciprocal()) / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        made, head = ctx.made, ctx.head
        ctx.made = ctx.head = None  # the node outlives its turn
        if made is not None:
            for each in made.all:
                if each is not None:
                    each.mul_(gradient)
            return *made.all, None, None, None
        hidden, targets, divisor = ctx.saved_tensors
        made = _buffers(ctx, head, hidden)
        _walk(head, hidden, targets, made, gradient / divisor)
        return *made.all, None, None, None


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    num_items: Tensor | int | None = None,
    form: Form | None = None,
    shifted_labels: Tensor | None = None,
) -> Tensor:
    """The loss of a causal language model as transformers' ForCausalLMLoss computes it, float32 [].

    Products are in autocast's dtype, else in the head's. A trained head's gradient is added up chunk by chunk in its
    own dtype, as those of micro-batches are.

    Args:
        hidden: [..., H], what the head would be called with.
        weight: the head's, [V, H].
        bias: the head's, [V], or none.
        labels: [..., tokens], each predicted by the position before it; IGNORED is not learned.
        num_items: what the sum of all tokens' losses is divided by; their number if left out.
        form: from products to logits.
        shifted_labels: labels that lie where they are predicted already; `labels` is then not looked at.
    """
    if shifted_labels is None:
        shifted_labels = functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    targets = shifted_labels.reshape(-1).to(hidden.device)
    items = (targets >= 0).sum() if num_items is None else num_items
    divisor = torch.as_tensor(items, device=hidden.device)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    if not torch.is_grad_enabled():
        hidden, weight, bias = hidden.detach(), weight.detach(), bias.detach() if bias is not None else None
    head = _Head(weight, bias, form or Form(), dtype)
    loss: Tensor = _ChunkedLoss.apply(hidden.reshape(-1, hidden.shape[-1]), weight, bias, head, targets, divisor)  # type: ignore[no-untyped-call]
    return loss


def _buffers(ctx: Any, head: _Head, hidden: Tensor) -> _Gradients:
    of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
    return _Gradients(
        torch.empty_like(hidden) if of_hidden else None,
        torch.zeros_like(head.weight) if of_weight else None,
        torch.zeros_like(head.bias) if of_bias and head.bias is not None else None,
    )


def _walk(
    head: _Head, hidden: Tensor, targets: Tensor, made: _Gradients | None = None, factor: Tensor | None = None
) -> Tensor:
    """The sum of the losses, float32 [].

    Args:
        hidden: [N, H].
        targets: [N]; those below 0 count for nothing.
        made: filled with the gradients of `factor` times the sum.
        factor: float32 [].
    """
    vocabulary = head.weight.shape[0]
    rows = min(len(hidden), FUSED_CHUNK_ROWS)
    weight = head.weight.to(head.dtype)
    bias = head.bias.to(head.dtype) if head.bias is not None else None
    products = hidden.new_empty((rows, vocabulary), dtype=head.dtype)
    logits = products if head.dtype == torch.float32 else torch.empty_like(products, dtype=torch.float32)
    slopes = torch.empty_like(logits) if made is not None and head.form.softcap is not None else None
    total = hidden.new_zeros((), dtype=torch.float32)
    # What is cast here is cast once; autocast would do it again for each product.
    with torch.autocast(hidden.device.type, enabled=False):
        for first in range(0, len(hidden), rows):
            some = hidden[first : first + rows].to(head.dtype)
            target = targets[first : first + rows, None]
            at, counts = target.clamp(min=0), target >= 0
            product = products[: len(some)]
            logit = product if logits is products else logits[: len(some)]
            if bias is None:
                torch.mm(some, weight.t(), out=product)
            else:
                torch.addmm(bias, some, weight.t(), out=product)
            slope = slopes[: len(some)] if slopes is not None else None
            _shape(head.form, product, logit, slope)
            aimed, top = logit.gather(1, at), logit.amax(1, keepdim=True)
            shares = logit.sub_(top).exp_()
            mass = shares.sum(1, keepdim=True)
            total += ((mass.log() + top - aimed) * counts).sum()
            if made is None or factor is None:
                continue
            shares.div_(mass)
            shares.scatter_(1, at, shares.gather(1, at) - 1).mul_(counts * (factor * head.form.scale))
            if slope is not None:
                shares.mul_(slope)
            gradient = product if product is shares else product.copy_(shares)
            _gather(made, gradient, weight, some, slice(first, first + rows))
    return total


def _shape(form: Form, product: Tensor, logit: Tensor, slope: Tensor | None) -> None:
    """Logits of a chunk's products, in float32, and where asked for the slope of their cap."""
    if logit is not product:
        logit.copy_(product)
    if form.scale != 1.0:
        logit.mul_(form.scale)
    if form.softcap is not None:
        logit.div_(form.softcap).tanh_()
        if slope is not None:
            torch.mul(logit, logit, out=slope).neg_().add_(1)
        logit.mul_(form.softcap)


def _gather(made: _Gradients, gradient: Tensor, weight: Tensor, hidden: Tensor, rows: slice) -> None:
    """What a chunk's products with `gradient` [rows, V] add to the gradients of the head and of its hidden states."""
    if made.hidden is not None:
        made.hidden[rows].copy_(gradient @ weight)
    if made.weight is not None and made.weight.dtype == gradient.dtype:
        made.weight.addmm_(gradient.t(), hidden)
    elif made.weight is not None:
        made.weight.add_(gradient.t() @ hidden)
    if made.bias is not None:
        made.bias.add_(gradient.sum(0))
