"""Loss on held-out rows: one number that no batch size, world size or strategy changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from strategies.base import Session


def passes(order: Sequence[int], lengths: Sequence[int], most_rows: int, most_tokens: int) -> Iterator[list[int]]:
    """Rows in groups that one forward pass takes: at most `most_rows`, padded to at most `most_tokens`; one at least.

    Args:
        order: the rows, shortest first.
        lengths: tokens of each row.
    """
    group: list[int] = []
    for row in order:
        if len(group) == most_rows or (group and (len(group) + 1) * lengths[row] > most_tokens):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


@torch.no_grad()
def held_out_loss(
    model: Any,
    rows: Any,
    collate: Callable[[list[Any]], dict[str, Any]],
    batch_size: int,
    most_tokens: int,
    session: Session,
) -> float:
    """Mean cross-entropy per predicted token over all rows; each rank takes every world_size-th row.

    Args:
        model: the bare model, not a DistributedDataParallel wrapper, so that ranks may pass different counts of rows.
        rows: encoded rows, `input_ids` and `labels`.
        batch_size: rows of one forward pass, at most.
        most_tokens: tokens of one forward pass, padding included. With no more than a micro-batch of training has, a
            pass that keeps nothing for a backward pass cannot be the run's peak of memory.
    """
    was_training = model.training
    model.eval()
    lengths = [len(row["input_ids"]) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (lengths[i], i))
    share = order[session.rank :: session.world_size]
    loss_sum, num_targets = 0.0, 0
    for group in passes(share, lengths, batch_size, most_tokens):
        batch = collate([rows[i] for i in group])
        batch = {name: tensor.to(session.device) for name, tensor in batch.items()}
        # Divided by one item, the loss of the batch is its sum.
        outputs = model(**batch, num_items_in_batch=torch.ones((), device=session.device), use_cache=False)
        loss_sum += float(outputs.loss)
        num_targets += int((batch["labels"][:, 1:] != -100).sum())
    model.train(was_training)
    total_loss, total_targets = session.sum([loss_sum, float(num_targets)])
    return total_loss / total_targets
