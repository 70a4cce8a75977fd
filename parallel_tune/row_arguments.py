"""From a micro-batch to what an engine's model takes to keep attention within rows."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from parallel_tune.data import boundary_arguments
from parallel_tune.row_attention import KeepToRows


class _ReturnedLogits:
    """An environment variable that holds for the whole process, while any thread has entered this."""

    def __init__(self, variable: str) -> None:
        self._variable = variable
        self._lock = threading.Lock()
        self._entered = 0
        self._before: str | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._entered == 0:
                self._before = os.environ.get(self._variable)
                os.environ[self._variable] = "1"
            self._entered += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._entered -= 1
            if self._entered == 0 and self._before is None:
                del os.environ[self._variable]
            elif self._entered == 0:
                os.environ[self._variable] = str(self._before)


_returned_logits = _ReturnedLogits("UNSLOTH_RETURN_LOGITS")
BOUNDARIES = "cu_seq_lens"


@contextmanager
def _unsloth_at_a_fixed_size(bounds: Sequence[torch.Tensor], tokens: int) -> Iterator[None]:
    """Unsloth's attention within rows, and its loss from logits: the fused one gathers the learned tokens first, whose
    number it has to read from the GPU."""
    with _returned_logits, KeepToRows(bounds, tokens):
        yield


def with_boundaries_on(batch: Mapping[str, Any], devices: Sequence[torch.device]) -> dict[str, Any]:
    """A micro-batch at a fixed size with its row boundaries on each of the devices: a captured stage must not copy."""
    if BOUNDARIES not in batch:
        return dict(batch)
    more = {f"{BOUNDARIES}.{device}": batch[BOUNDARIES].to(device, non_blocking=True) for device in devices[1:]}
    return {**batch, **more}


def model_arguments(batch: Mapping[str, Any], engine: str) -> tuple[dict[str, Any], AbstractContextManager[Any]]:
    """Arguments of the model's forward, and what to enter around it.

    A batch is padded (passed as it is), joined (`row_lengths` on the host), or joined at a fixed size (`cu_seq_lens` as
    a tensor: nothing then depends on where rows end but that tensor, so the step can be captured).
    """
    arguments = dict(batch)
    if "row_lengths" in arguments:
        lengths = arguments.pop("row_lengths")
        return arguments | boundary_arguments(lengths, engine, arguments["input_ids"].device), nullcontext()
    if BOUNDARIES not in arguments:
        return arguments, nullcontext()
    bounds = arguments.pop(BOUNDARIES)
    elsewhere = [arguments.pop(name) for name in list(arguments) if name.startswith(f"{BOUNDARIES}.")]
    tokens = int(arguments["input_ids"].shape[1])
    arguments["use_cache"] = False
    if engine == "unsloth":
        # It looks for rows in the positions, from the host, unless it sees a mask; which it drops while training.
        arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
        # Present, and so not cut to the longest row's length; None, and so not looked at.
        arguments["packed_seq_lengths"] = None
        return arguments, _unsloth_at_a_fixed_size([bounds, *elsewhere], tokens)
    arguments |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": tokens, "max_length_k": tokens}
    return arguments, nullcontext()
