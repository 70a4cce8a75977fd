"""How a run's rows become micro-batches: padded, joined, or joined at few fixed sizes. Runs in workers only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch

from parallel_tune.config import TrainConfig
from parallel_tune.data import EncodedRow, EncodedRows, fill_up, join
from parallel_tune.data.batching import DUMMY_TOKENS
from parallel_tune.data.packing import PackedRows
from parallel_tune.data.sizes import choose_sizes, size_for
from parallel_tune.row_check import settle_capture, settle_padding
from parallel_tune.sampler import GlobalBatches
from strategies.base import Session
from strategies.contracts import Plan

STEPS_LOOKED_AT = 4000
"""Sizes are chosen for so many steps; those of a longer run are alike."""

Gather = Callable[[list[EncodedRow]], dict[str, Any]]


@dataclass(frozen=True)
class Gathering:
    """What was settled.

    Attributes:
        batches: which samples meet where.
        gather: makes a micro-batch of rows; None pads them.
        sizes: tokens that micro-batches are filled up to, ascending; empty where each has its own length.
        padded_reason: why rows are padded; None where they are joined.
        uncaptured_reason: why steps are not captured; None where they are.
    """

    batches: GlobalBatches
    gather: Gather | None
    sizes: tuple[int, ...]
    padded_reason: str | None
    uncaptured_reason: str | None

    def said(self) -> list[str]:
        """Lines for the log."""
        lines = []
        if self.padded_reason is not None:
            lines.append(f"rows of a micro-batch are padded, since {self.padded_reason}")
        if self.uncaptured_reason is not None:
            lines.append(f"steps are not captured: {self.uncaptured_reason}")
        elif self.sizes:
            lines.append(f"steps are captured at {', '.join(map(str, self.sizes))} tokens")
        return lines


def choose_gathering(
    model: Any,
    tokenizer: Any,
    rows: EncodedRows | PackedRows,
    batches: GlobalBatches,
    config: TrainConfig,
    plan: Plan,
    session: Session,
    dtype: torch.dtype,
) -> Gathering:
    """Obey the plan as far as the loaded model and the data allow. Every rank calls it.

    Raises:
        ConfigError: joined rows were asked for, and the model mixes them.
    """
    padded_reason = settle_padding(model, rows, config, plan, session, dtype)
    uncaptured_reason = settle_capture(model, rows, plan, session, dtype, padded_reason)
    if padded_reason is not None:
        return Gathering(batches, None, (), padded_reason, uncaptured_reason)
    batches = replace(batches, joined=True)
    sizes: tuple[int, ...] = ()
    most_rows = 0
    if uncaptured_reason is None:
        steps = config.max_steps if config.max_steps > 0 else ceil(config.num_train_epochs * batches.steps_per_epoch)
        sizes, most_rows = fixed_sizes(batches, [len(lengths) for lengths in rows.row_lengths], plan, steps)
        if not sizes:
            uncaptured_reason = f"{steps} steps are too few for recording to pay"
    return Gathering(batches, joined(tokenizer.pad_token_id, sizes, most_rows), sizes, None, uncaptured_reason)


def fixed_sizes(batches: GlobalBatches, rows_in: Sequence[int], plan: Plan, steps: int) -> tuple[tuple[int, ...], int]:
    """Sizes for the first `steps` steps of a run over all ranks, none where capturing would not pay; and the most rows
    that a micro-batch holds.

    Args:
        rows_in: rows of each sample; several where samples are packed sequences.
    """
    tokens, most_rows = [], 1
    for step in range(min(steps, STEPS_LOOKED_AT)):
        ranks = batches.micro_batches(step, plan.processes, plan.micro_batch, plan.gradient_accumulation_steps)
        for at_once in zip(*ranks, strict=True):
            counts = [sum(batches.lengths[sample] for sample in samples) for samples in at_once]
            tokens.append(max(DUMMY_TOKENS, *counts))
            most_rows = max(most_rows, *(sum(rows_in[sample] for sample in samples) for samples in at_once))
    return choose_sizes(tokens), most_rows


def joined(pad_token_id: int, sizes: Sequence[int], most_rows: int) -> Gather:
    """Rows joined, at a fixed size if one holds them."""

    def gather(rows: list[EncodedRow]) -> dict[str, Any]:
        batch = join(rows, pad_token_id)
        tokens = size_for(batch["input_ids"].shape[1], sizes)
        if tokens is None or len(batch["row_lengths"]) > most_rows:
            return batch
        return dict(fill_up(batch, pad_token_id, tokens, most_rows))

    return gather
