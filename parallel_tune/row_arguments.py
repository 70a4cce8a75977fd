"""From a micro-batch to what an engine's model takes to keep attention within rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from parallel_tune.data import boundary_arguments
from parallel_tune.row_attention import KeepToRows


@contextmanager
def _unsloth_at_a_fixed_size(bounds: torch.Tensor, tokens: int) -> Iterator[None]:
    """Unsloth's attention within rows, and its loss from logits: the fused one gathers the learned tokens first, whose
    number it has to read from the GPU."""
    variable = "UNSLOTH_RETURN_LOGITS"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with KeepToRows(bounds, tokens):
            yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def model_arguments(batch: Mapping[str, Any], engine: str) -> tuple[dict[str, Any], AbstractContextManager[Any]]:
    """Arguments of the model's forward, and what to enter around it.

    A batch is padded (passed as it is), joined (`row_lengths` on the host), or joined at a fixed size (`cu_seq_lens` as
    a tensor: nothing then depends on where rows end but that tensor, so the step can be captured).
    """
    arguments = dict(batch)
    if "row_lengths" in arguments:
        lengths = arguments.pop("row_lengths")
        return arguments | boundary_arguments(lengths, engine, arguments["input_ids"].device), nullcontext()
    if "cu_seq_lens" not in arguments:
        return arguments, nullcontext()
    bounds = arguments.pop("cu_seq_lens")
    tokens = int(arguments["input_ids"].shape[1])
    arguments["use_cache"] = False
    if engine == "unsloth":
        # It looks for rows in the positions, from the host, unless it sees a mask; which it drops while training.
        arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
        # Present, and so not cut to the longest row's length; None, and so not looked at.
        arguments["packed_seq_lengths"] = None
        return arguments, _unsloth_at_a_fixed_size(bounds, tokens)
    arguments |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": tokens, "max_length_k": tokens}
    return arguments, nullcontext()
