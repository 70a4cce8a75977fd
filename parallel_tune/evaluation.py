"""Loss on held-out rows: one number that no batch size, world size or strategy changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from strategies.base import Session


@torch.no_grad()
def held_out_loss(
    model: Any, rows: Any, collate: Callable[[list[Any]], dict[str, Any]], batch_size: int, session: Session
) -> float:
    """Mean cross-entropy per predicted token over all rows; each rank takes every world_size-th row.

    Args:
        model: the bare model, not a DistributedDataParallel wrapper, so that ranks may pass different counts of rows.
        rows: encoded rows, `input_ids` and `labels`.
        batch_size: rows of one forward pass.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]["input_ids"]), i))
    share = order[session.rank :: session.world_size]
    loss_sum, num_targets = 0.0, 0
    for start in range(0, len(share), batch_size):
        batch = collate([rows[i] for i in share[start : start + batch_size]])
        batch = {name: tensor.to(session.device) for name, tensor in batch.items()}
        # Divided by one item, the loss of the batch is its sum.
        outputs = model(**batch, num_items_in_batch=torch.ones((), device=session.device), use_cache=False)
        loss_sum += float(outputs.loss)
        num_targets += int((batch["labels"][:, 1:] != -100).sum())
    model.train(was_training)
    total_loss, total_targets = session.sum([loss_sum, float(num_targets)])
    return total_loss / total_targets
