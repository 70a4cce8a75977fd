"""Before training: whether the loaded model really keeps to rows that are joined. Runs in workers only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from parallel_tune.config import TrainConfig
from parallel_tune.data import EncodedRow, boundary_arguments, join
from parallel_tune.padding_free import refusal
from parallel_tune.row_attention import flash_serves, use_row_attention
from strategies.base import Session
from strategies.contracts import Plan

ROWS, TOKENS = 3, 16
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""By how much, as a share of their standard deviation, logits of a row may change when it is joined to others. Rounding
stays far below; rows that see each other change by the order of the whole, from their first token on."""


def settle_padding(
    model: Any, rows: Sequence[EncodedRow], config: TrainConfig, plan: Plan, session: Session, dtype: torch.dtype
) -> str | None:
    """Make the model ready for joined rows; the reason why rows are padded instead, None if they are not.

    Every rank calls it, after the model was placed.

    Raises:
        ConfigError: joined rows were asked for, and the model mixes them.
    """
    if not plan.padding_free:
        return plan.padded_reason or f"padding_free is {config.padding_free}"
    asked = config.packing or config.padding_free == "on"
    ours = plan.engine == "transformers" and config.attn_implementation == "sdpa"
    cuda = session.device.type == "cuda"
    if ours and cuda and not asked and not flash_serves(torch.cuda.get_device_capability(session.device)):
        return f"torch {torch.__version__} has no attention kernel for rows of any length on this card"
    if plan.engine == "unsloth" and (kind := _rope_by_length(model)):
        # Unsloth chooses the table by all tokens of a batch, and the few tokens tried below would not show it.
        why = f"Unsloth scales its {kind} rotary tables by the length of the whole batch"
        if asked:
            raise refusal(config, why)
        return why
    few = [_end_of(rows[number % len(rows)]) for number in range(ROWS)]
    with torch.no_grad(), torch.autocast(session.device.type, dtype, enabled=dtype != torch.float32):
        was_training = model.training
        model.eval()
        reason = _difference(model, few, plan, session, TOLERANCE[dtype], ours)
        if session.any(reason is not None):
            reason = reason or "another process found that rows see each other"
            if ours:
                use_library_attention(model)
        model.train(was_training)
    if reason is not None and asked:
        raise refusal(config, reason)
    return reason


def _rope_by_length(model: Any) -> str:
    """The kind of rotary embedding, where it depends on how long the sequence is; empty where it does not."""
    config = model.config.get_text_config()
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for parameters in [found, *(value for value in found.values() if isinstance(value, dict))]:
        kind = parameters.get("rope_type") or parameters.get("type")
        if kind in ("longrope", "dynamic"):
            return str(kind)
    return ""


def use_library_attention(model: Any) -> None:
    """Back to transformers' own."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation("sdpa")


def _end_of(row: EncodedRow) -> EncodedRow:
    # Beginnings are often the same words in every row.
    return {"input_ids": row["input_ids"][-TOKENS:], "labels": row["labels"][-TOKENS:]}


def _difference(
    model: Any, rows: list[EncodedRow], plan: Plan, session: Session, tolerance: float, ours: bool
) -> str | None:
    """Why the logits of joined rows are not those of the rows alone; None if they are.

    Args:
        ours: joined rows go through our own attention, rows alone through the library's.
    """
    try:
        alone = torch.cat([_logits(model, [row], plan, session) for row in rows])
        if ours:
            use_row_attention(model)
        joined = _logits(model, rows, plan, session)
    except (TypeError, ValueError, NotImplementedError) as error:
        return f"its forward takes no row boundaries ({type(error).__name__}: {error})"
    change = float((joined - alone).square().mean().sqrt() / alone.std())
    if change <= tolerance:
        return None
    return f"the outputs of a row change by {change:.1%} of their spread when others stand beside it"


def _logits(model: Any, rows: list[EncodedRow], plan: Plan, session: Session) -> torch.Tensor:
    """float32 [tokens, vocabulary] of joined rows; a single row goes without boundaries, as any model takes it."""
    batch = join(rows, pad_token_id=0)
    lengths = batch.pop("row_lengths")
    batch.pop("labels")
    batch = {name: tensor.to(session.device) for name, tensor in batch.items()}
    several = boundary_arguments(lengths, plan.engine, session.device) if len(rows) > 1 else {"use_cache": False}
    logits: torch.Tensor = model(**batch, **several).logits[0]
    return logits.float()
