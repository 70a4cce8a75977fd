"""Attention that keeps to rows by their boundaries and needs no mask: the padding-free path of transformers' models.

transformers itself makes a square mask of all tokens of a micro-batch, which every layer turns into a bias and keeps,
and looks at the positions from the host to find the rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

NAME = "parallel_tune_rows"
"""What `_attn_implementation` of a model's config calls it."""

OF_THE_MODULE = -1
"""Of a window that a model does not pass on: its attention's own, if it has one."""

VARLEN_HEAD_DIM = 256
"""The widest head that flash attention takes."""


def use_row_attention(model: Any) -> None:
    """Let a transformers model attend by `attend`, until another implementation is set."""
    from transformers import AttentionInterface

    # No mask function goes with it, and then transformers makes no masks.
    AttentionInterface.register(NAME, attend)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation(NAME)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = OF_THE_MODULE,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    row_lengths: Sequence[int] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within rows, by the interface of transformers' attention functions.

    On a GPU it is one flash kernel over `cu_seq_lens_q`, which reads nothing on the host; where that kernel cannot be
    used (a CPU, float32, attention dropout, old cards) it is one call a row, by `row_lengths`. Without boundaries
    every row of the batch is as long as the batch is wide: padding on the right then comes after all that it could
    change.

    Args:
        query: [batch, heads, tokens, width]; key and value alike, with fewer heads where they are grouped.
        sliding_window: tokens that one sees, itself included; None for all, which is not the same as not passed on.
        cu_seq_lens_q: int32 [rows + 1], where rows begin and end; the batch is then 1.
        max_length_q: no row is longer.

    Returns:
        [batch, tokens, heads, width], and None for the weights.
    """
    causal = others.get("is_causal")
    if attention_mask is not None or not (getattr(module, "is_causal", True) if causal is None else causal):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        joined, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, causal)
        return joined, None
    if sliding_window == OF_THE_MODULE:
        sliding_window = getattr(module, "sliding_window", None)
    if query.is_cuda and torch.is_autocast_enabled("cuda"):
        query, key, value = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in (query, key, value))
    if cu_seq_lens_q is not None and max_length_q is not None and not dropout and _flash_takes(query):
        return _varlen(query, key, value, scaling, sliding_window, cu_seq_lens_q, max_length_q), None
    if row_lengths is None:
        row_lengths = [query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
    return _by_row(query, key, value, scaling, sliding_window, dropout, row_lengths), None


class KeepToRows(TorchFunctionMode):
    """While it is entered, causal attention over all tokens keeps to rows: for models that call torch's own.

    Args:
        bounds: int32 [rows + 1], where rows begin and end; nothing of it is read on the host. One for each device that
            attends; what is missing is copied there.
        longest: no row is longer.
    """

    def __init__(self, bounds: Sequence[Tensor], longest: int) -> None:
        super().__init__()
        self._bounds = {each.device: each for each in bounds}
        self._longest = longest

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        if call.get("attn_mask") is not None or not call.get("is_causal") or call.get("dropout_p"):
            raise NotImplementedError("attention with a mask of its own, or with dropout, cannot be kept to rows")
        query, key, value = (call[name] for name in names[:3])
        if query.device not in self._bounds:
            self._bounds[query.device] = next(iter(self._bounds.values())).to(query.device)
        joined = _varlen(query, key, value, call.get("scale"), None, self._bounds[query.device], self._longest)
        return joined.transpose(1, 2)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    window: int | None,
    bounds: Tensor,
    longest: int,
) -> Tensor:
    """One flash kernel for all rows."""
    kernel, takes_groups = _flash_kernel()
    assert kernel is not None
    options: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if takes_groups:
            options["enable_gqa"] = True
        else:
            key, value = _repeated(query, key, value)
    # [1, heads, tokens, width] to [tokens, heads, width]
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    back = -1 if window is None else window - 1
    joined: Tensor = kernel(
        query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=(back, 0), **options
    )
    return joined.unsqueeze(0)


def _by_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    window: int | None,
    dropout: float,
    lengths: Sequence[int],
) -> Tensor:
    """One call a row."""
    if query.shape[1] != key.shape[1]:
        key, value = _repeated(query, key, value)
    rows = []
    for start, end in pairwise([0, *accumulate(length for length in lengths if length)]):
        near = None
        if window is not None and end - start > window:
            ones = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device)
            near = ones.tril() & ones.triu(1 - window)
        rows.append(
            functional.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                attn_mask=near,
                dropout_p=dropout,
                is_causal=near is None,
                scale=scale,
            )
        )
    return torch.cat(rows, dim=2).transpose(1, 2).contiguous()


def _repeated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with as many heads as the queries have."""
    groups = query.shape[1] // key.shape[1]
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def _flash_takes(query: Tensor) -> bool:
    """Whether the flash kernel takes such queries."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= VARLEN_HEAD_DIM
        and query.shape[-1] % 8 == 0
        and flash_serves(torch.cuda.get_device_capability(query.device))
    )


def flash_serves(capability: tuple[int, int]) -> bool:
    """Whether torch's flash kernel for rows of any length is there for cards of this compute capability."""
    return capability >= (8, 0) and torch.version.hip is None and _flash_kernel()[0] is not None


@lru_cache(maxsize=1)
def _flash_kernel() -> tuple[Callable[..., Any] | None, bool]:
    """torch's kernel, and whether it takes grouped heads; None before torch 2.11, whose form had no windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None, False
    known = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= known.keys():
        return None, False
    return varlen_attn, "enable_gqa" in known
