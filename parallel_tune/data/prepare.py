"""From settings to the rows that a run trains on and those it is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from parallel_tune.config import TrainConfig
from parallel_tune.data.batching import split_held_out
from parallel_tune.data.encoding import chunk_text, encode_rows
from parallel_tune.data.loading import Row, load_rows, read_text
from parallel_tune.data.packing import PackedRows, pack
from parallel_tune.data.rows import DataReport, EncodedRows


def prepare_data(
    config: TrainConfig, tokenizer: Any
) -> tuple[EncodedRows | PackedRows, EncodedRows | None, DataReport]:
    """Training rows or packed sequences, held-out rows (None if none are held out), and what became of the dataset.

    Raises:
        ConfigError: the dataset cannot be read or has nothing to learn.
    """
    if config.raw_text is not None:
        chunk_size = config.chunk_size or config.max_seq_length
        stride = chunk_size // 4 if config.stride is None else config.stride
        encoded, report = chunk_text(read_text(config.raw_text), tokenizer, chunk_size, stride, config.max_rows)
    else:
        encoded, report = encode_rows(load_named_rows(config), tokenizer, config.max_seq_length, config.answers_only)
    train, held_out = encoded, None
    if config.val_size:
        train, held_out = split_held_out(encoded, config.val_size, config.seed)
    if not config.packing:
        return train, held_out, report
    packed = pack(train, config.max_seq_length)
    return packed, held_out, replace(report, sequences=len(packed))


def load_named_rows(config: TrainConfig) -> Sequence[Row]:
    """The dataset's rows, as many as are wanted.

    Raises:
        ConfigError: the dataset cannot be read.
    """
    rows = load_rows(config.dataset, config.dataset_split, config.dataset_config)
    if config.max_rows is None:
        return rows
    return [rows[number] for number in range(min(config.max_rows, len(rows)))]
