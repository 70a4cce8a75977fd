"""From encoded rows to training and held-out sets, and to padded or joined batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate, chain
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


def join(rows: Sequence[EncodedRow], pad_token_id: int) -> dict[str, Any]:
    """One row of all rows' tokens, without padding: the padding-free batch.

    - `input_ids`, `position_ids`, `labels`: int64 of shape [1, T], T the tokens of all rows; positions start again at
      0 in each row. The first label of each row is ignored, so that no row's end predicts the next one's beginning.
    - `row_lengths`: tokens of each row, a list of Python integers that sum to T. It is for the host: take it out
      (`boundary_arguments`) before the model is called.

    There is no `attention_mask`: attention has to keep to the rows by their boundaries, and no cache may be used. No
    rows at all give the zero-weight batch, as `collate` does.
    """
    import torch

    if not rows:
        rows = [{"input_ids": [pad_token_id] * DUMMY_TOKENS, "labels": [IGNORED] * DUMMY_TOKENS}]
    lengths = [length for row in rows for length in row.get("row_lengths") or [len(row["input_ids"])]]
    labels = torch.tensor(list(chain.from_iterable(row["labels"] for row in rows)))
    labels[[end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]] = IGNORED
    return {
        "input_ids": torch.tensor([list(chain.from_iterable(row["input_ids"] for row in rows))]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "labels": labels[None],
        "row_lengths": lengths,
    }


def fill_up(batch: dict[str, Any], pad_token_id: int, tokens: int, most_rows: int) -> dict[str, torch.Tensor]:
    """A joined batch at a fixed size, all of it tensors: what can be captured once and replayed.

    - `input_ids`, `position_ids`, `labels`: int64 of shape [1, tokens]; one more row, not learned, fills them up.
    - `cu_seq_lens`: int32 of shape [most_rows + 2], where rows begin and end; rows that are not there end where all do.
    """
    import torch

    missing = tokens - batch["input_ids"].shape[1]
    lengths = batch["row_lengths"]
    if missing < 0 or len(lengths) > most_rows:
        raise AssertionError(f"{len(lengths)} rows of {tokens - missing} tokens do not fit {most_rows} of {tokens}")
    bounds = torch.full((most_rows + 2,), tokens, dtype=torch.int32)
    bounds[: len(lengths) + 1] = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    rest = torch.full((1, missing), pad_token_id)
    return {
        "input_ids": torch.cat([batch["input_ids"], rest], dim=1),
        "position_ids": torch.cat([batch["position_ids"], torch.arange(missing)[None]], dim=1),
        "labels": torch.cat([batch["labels"], torch.full_like(rest, IGNORED)], dim=1),
        "cu_seq_lens": bounds,
    }


def boundary_arguments(row_lengths: Sequence[int], engine: str, device: torch.device) -> dict[str, Any]:
    """What a model's attention needs in order to keep to the rows of a joined batch, as arguments of its forward.

    transformers' names are those of its flash attention: `cu_seq_lens_q` and `_k`, int32 [rows + 1], where rows begin
    and end; `max_length_q` and `_k`, integers; `row_lengths` is for our own attention on a CPU. Unsloth takes
    `packed_seq_lengths`, int32 [rows] in host memory, and copies it to the device itself. With a cache transformers
    would let attention cross rows.
    """
    import torch

    if engine == "unsloth":
        return {"packed_seq_lengths": torch.tensor(row_lengths, dtype=torch.int32), "use_cache": False}
    bounds = torch.tensor([0, *accumulate(row_lengths)], dtype=torch.int32).to(device, non_blocking=True)
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(row_lengths),
        "max_length_k": max(row_lengths),
        "row_lengths": tuple(row_lengths),
        "use_cache": False,
    }


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
