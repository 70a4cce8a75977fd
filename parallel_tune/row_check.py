"""Before training: whether the loaded model really keeps to rows that are joined. Runs in workers only."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from parallel_tune.config import TrainConfig
from parallel_tune.data import EncodedRow, fill_up, join
from parallel_tune.padding_free import refusal
from parallel_tune.row_arguments import model_arguments
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
        if reason is None and ours:
            reason = _lost_window(model, rows, plan, session, TOLERANCE[dtype])
        if session.any(reason is not None):
            reason = reason or "another process found that rows see each other"
            if ours:
                use_library_attention(model)
        model.train(was_training)
    if reason is not None and asked:
        raise refusal(config, reason)
    return reason


def settle_capture(
    model: Any,
    rows: Sequence[EncodedRow],
    plan: Plan,
    session: Session,
    dtype: torch.dtype,
    padded_reason: str | None,
) -> str | None:
    """The reason why steps are not captured, None if they may be: joined rows at a fixed size must stay apart too.

    Every rank calls it, after `settle_padding`.
    """
    if not plan.captured:
        return plan.uncaptured_reason
    if padded_reason is not None:
        return f"rows are padded, since {padded_reason}"
    few = [_end_of(rows[number % len(rows)]) for number in range(ROWS)]
    with torch.no_grad(), torch.autocast(session.device.type, dtype, enabled=dtype != torch.float32):
        was_training = model.training
        reason = _difference(model.eval(), few, plan, session, TOLERANCE[dtype], fixed=True)
        model.train(was_training)
    if session.any(reason is not None):
        return reason or "another process found that rows see each other"
    return None


def _lost_window(model: Any, rows: Sequence[EncodedRow], plan: Plan, session: Session, tolerance: float) -> str | None:
    """Why our attention, which makes no masks, is not the library's over a row longer than the model's window; None if
    it is. Some models tell their window to the mask alone.
    """
    config = model.config.get_text_config()
    named = ((name, getattr(config, name, None)) for name in ("sliding_window", "attention_chunk_size"))
    windows = [(size, name) for name, size in named if isinstance(size, int) and size > 0]
    row = _longest(rows)
    if not windows or len(row["input_ids"]) <= min(windows)[0]:
        return None
    joined = _logits(model, [row], plan, session, last=TOKENS)
    use_library_attention(model)
    alone = _logits(model, [row], plan, session, last=TOKENS)
    use_row_attention(model)
    change = _change(joined, alone)
    if change <= tolerance:
        return None
    size, name = min(windows)
    return f"without a mask its attention does not keep to {name} = {size} (outputs change by {change:.1%})"


def _longest(rows: Sequence[EncodedRow]) -> EncodedRow:
    """The longest row, by itself where it is packed with others."""
    within = getattr(rows, "row_lengths", None) or [[len(row["input_ids"])] for row in rows]
    sample = max(range(len(within)), key=lambda number: max(within[number]))
    lengths, found = within[sample], rows[sample]
    length = max(lengths)
    start = sum(lengths[: lengths.index(length)])
    return {"input_ids": found["input_ids"][start : start + length], "labels": found["labels"][start : start + length]}


def _change(joined: torch.Tensor, alone: torch.Tensor) -> float:
    return float((joined - alone).square().mean().sqrt() / alone.std())


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
    model: Any,
    rows: list[EncodedRow],
    plan: Plan,
    session: Session,
    tolerance: float,
    ours: bool = False,
    fixed: bool = False,
) -> str | None:
    """Why the logits of joined rows are not those of the rows alone; None if they are.

    Args:
        ours: joined rows go through our own attention, rows alone through the library's.
        fixed: joined rows come at a fixed size, as a captured step takes them.
    """
    try:
        alone = torch.cat([_logits(model, [row], plan, session) for row in rows])
        if ours:
            use_row_attention(model)
        joined = _logits(model.train() if fixed else model, rows, plan, session, fixed)
    except (TypeError, ValueError, NotImplementedError) as error:
        return f"its forward takes no row boundaries ({type(error).__name__}: {error})"
    change = _change(joined, alone)
    if change <= tolerance:
        return None
    return f"the outputs of a row change by {change:.1%} of their spread when others stand beside it"


def _logits(
    model: Any, rows: list[EncodedRow], plan: Plan, session: Session, fixed: bool = False, last: int = 0
) -> torch.Tensor:
    """float32 [tokens, vocabulary] of joined rows, or of the `last` tokens; a single row goes without boundaries, as
    any model takes it."""
    batch = join(rows, pad_token_id=0)
    tokens = sum(batch["row_lengths"])
    if fixed:
        batch = fill_up(batch, 0, tokens + TOKENS, len(rows) + 1)
    elif len(rows) == 1:
        batch.pop("row_lengths")
    batch.pop("labels")
    on_device = {name: value.to(session.device) if torch.is_tensor(value) else value for name, value in batch.items()}
    arguments, keep_to_rows = model_arguments(on_device, plan.engine)
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if last and "logits_to_keep" in inspect.signature(causal.forward).parameters:
        arguments["logits_to_keep"] = last
    with keep_to_rows:
        logits: torch.Tensor = model(**(arguments | {"use_cache": False})).logits[0]
    return logits[-last:].float() if last else logits[:tokens].float()
