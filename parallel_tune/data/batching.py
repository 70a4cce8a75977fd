"""From encoded rows to training and held-out sets, and to padded batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from parallel_tune.data.rows import IGNORED, EncodedRow, EncodedRows
from strategies.errors import ConfigError

if TYPE_CHECKING:
    import torch

DUMMY_TOKENS = 2


def collate(
    rows: Sequence[EncodedRow], pad_token_id: int, pad_to_multiple_of: int | None = None
) -> dict[str, torch.Tensor]:
    """Pad rows on the right to one length: input_ids, attention_mask and labels, each int64 of shape [rows, tokens].

    No rows at all give the zero-weight batch: one row of two padding tokens that are attended to and not learned. A
    rank without rows in a step forwards it, and joins the step's collectives without changing its gradient.
    """
    import torch

    if not rows:
        ids = torch.full((1, DUMMY_TOKENS), pad_token_id)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, IGNORED)}
    width = max(len(row["input_ids"]) for row in rows)
    if pad_to_multiple_of:
        width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
    batch = {
        "input_ids": torch.full((len(rows), width), pad_token_id),
        "attention_mask": torch.zeros((len(rows), width), dtype=torch.long),
        "labels": torch.full((len(rows), width), IGNORED),
    }
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        batch["input_ids"][number, :length] = torch.tensor(row["input_ids"])
        batch["attention_mask"][number, :length] = 1
        batch["labels"][number, :length] = torch.tensor(row["labels"])
    return batch


def split_held_out(rows: Any, fraction_or_count: float, seed: int) -> tuple[Any, Any]:
    """Set rows aside for evaluation: (training rows, held-out rows), both in their original order.

    The same seed and number of rows always hold out the same ones. A value below 1 is a share of the rows (at least
    one row then), a whole number from 1 on is a count; 0 holds out nothing. Takes EncodedRows, lists and datasets.
    """
    total = len(rows)
    if fraction_or_count < 0 or (fraction_or_count > 1 and fraction_or_count != int(fraction_or_count)):
        raise ConfigError(
            f"cannot hold out {fraction_or_count} rows", "give a share between 0 and 1, or a whole number of rows"
        )
    count = int(fraction_or_count) if fraction_or_count >= 1 else round(fraction_or_count * total)
    if fraction_or_count > 0:
        count = max(1, count)
    if count and count >= total:
        raise ConfigError(
            f"holding out {count} of {total} rows leaves none to train on", "hold out fewer, or give more rows"
        )
    chosen = set(random.Random(seed).sample(range(total), count))
    return (
        _select(rows, [number for number in range(total) if number not in chosen]),
        _select(rows, sorted(chosen)),
    )


def _select(rows: Any, numbers: list[int]) -> Any:
    if isinstance(rows, EncodedRows) or hasattr(rows, "select"):
        return rows.select(numbers)
    return [rows[number] for number in numbers]
