"""Rows in the order in which parallel-tune trains them, so that a bare script can train the same ones step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_in_order(
    model: Path, rows: Path, ordered: Path, steps: int, micro_batch: int, accumulation: int, max_seq_length: int
) -> list[list[int]]:
    """Write a file's rows as one process takes them, padded, a micro-batch after the other.

    Args:
        rows: JSONL of which every row trains.
        steps: optimizer steps of `micro_batch` x `accumulation` rows.

    Returns:
        Tokens of each row of each step.
    """
    from parallel_tune.config import make_config
    from parallel_tune.data.prepare import prepare_data
    from parallel_tune.engines.transformers import load_tokenizer
    from parallel_tune.sampler import GlobalBatches

    settings: dict[str, Any] = {"model": str(model), "dataset": str(rows), "max_seq_length": max_seq_length}
    config = make_config(settings)
    encoded, _, _ = prepare_data(config, load_tokenizer(config))
    lines = rows.read_text().splitlines()
    if len(lines) != len(encoded):
        raise ValueError(f"{rows} has {len(lines)} rows, of which {len(encoded)} train")
    batches = GlobalBatches(tuple(encoded.lengths), (), micro_batch * accumulation, config.seed)
    taken: list[list[int]] = []
    for step in range(steps):
        (rank,) = batches.micro_batches(step, 1, micro_batch, accumulation)
        taken.append([sample for samples in rank for sample in samples])
    ordered.write_text("".join(f"{lines[sample]}\n" for step in taken for sample in step))
    return [[encoded.lengths[sample] for sample in step] for step in taken]
