"""From settings to the rows that a run trains on and those it is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from parallel_tune.config import TrainConfig
from parallel_tune.data import kept
from parallel_tune.data.batching import split_held_out
from parallel_tune.data.encoding import chunk_text, encode_rows
from parallel_tune.data.identity import data_identity, key_of
from parallel_tune.data.loading import Row, load_rows, local_files, read_text
from parallel_tune.data.packing import PackedRows, pack
from parallel_tune.data.rows import DataReport, EncodedRows
from strategies.base import Session
from strategies.errors import ConfigError


def prepare_data(
    config: TrainConfig, tokenizer: Any
) -> tuple[EncodedRows | PackedRows, EncodedRows | None, DataReport]:
    """Training rows or packed sequences, held-out rows (None if none are held out), and what became of the dataset.

    Raises:
        ConfigError: the dataset cannot be read or has nothing to learn.
    """
    encoded, report = encoded_rows(config, tokenizer)
    train, held_out = encoded, None
    if config.val_size:
        train, held_out = split_held_out(encoded, config.val_size, config.seed)
    if not config.packing:
        return train, held_out, report
    packed = pack(train, config.max_seq_length)
    return packed, held_out, replace(report, sequences=len(packed))


def require_same_rows(
    config: TrainConfig, train: EncodedRows | PackedRows, held_out: EncodedRows | None, session: Session
) -> None:
    """Refuse a dataset that changed while the ranks read it. Every rank calls it.

    They would take different rows for a step's, and the one with more steps would wait for the others for ever.

    Raises:
        ConfigError: not all ranks have the same rows.
    """
    if session.world_size == 1:
        return
    digests = session.gather([rows.digest for rows in (train, held_out) if rows is not None])
    if any(digest != digests[0] for digest in digests):
        raise ConfigError(
            f"{config.data_source} changed while it was read: the processes have different rows",
            "Start again when nothing writes to it any more, or with a copy of it.",
        )


def encoded_rows(config: TrainConfig, tokenizer: Any) -> kept.Encoded:
    """All rows of the dataset as token ids and labels: those that are kept from an earlier time, or encoded now.

    Raises:
        ConfigError: the dataset cannot be read or has nothing to learn.
    """
    if not config.data_cache or kept.switched_off():
        return _encode(config, tokenizer, None)
    named = (config.dataset, config.dataset_split, config.dataset_config)
    on_hub = config.raw_text is None and local_files(*named) is None
    rows = load_rows(*named) if on_hub else None
    try:
        data = data_identity(config, rows)
        key = key_of(config, data, tokenizer) if data is not None else None
    except Exception as error:  # a file that cannot be read, a tokenizer that cannot be saved: encoding says more
        print(f"encoded rows are not kept: {type(error).__name__}: {error}")
        key = None
    if key is None:
        return _encode(config, tokenizer, rows)
    return kept.kept_or_encoded(
        key,
        lambda: _encode(config, tokenizer, rows),
        unchanged=lambda: data_identity(config, rows) == data,
    )


def _encode(config: TrainConfig, tokenizer: Any, rows: Sequence[Row] | None) -> kept.Encoded:
    if config.raw_text is not None:
        chunk_size = config.chunk_size or config.max_seq_length
        stride = chunk_size // 4 if config.stride is None else config.stride
        return chunk_text(read_text(config.raw_text), tokenizer, chunk_size, stride, config.max_rows)
    found = load_named_rows(config) if rows is None else first_rows(rows, config.max_rows)
    rows_and_report = encode_rows(found, tokenizer, config.max_seq_length, config.answers_only)
    if config.answers_only and rows_and_report[1].format == "text":
        raise ConfigError(
            f"answers_only: the rows of {config.dataset} are plain 'text', which does not tell where an answer begins",
            "Give conversations as messages, or prompt and completion; or drop --answers_only.",
        )
    return rows_and_report


def load_named_rows(config: TrainConfig) -> Sequence[Row]:
    """The dataset's rows, as many as are wanted.

    Raises:
        ConfigError: the dataset cannot be read.
    """
    return first_rows(load_rows(config.dataset, config.dataset_split, config.dataset_config), config.max_rows)


def first_rows(rows: Sequence[Row], most: int | None) -> Sequence[Row]:
    """The first rows, all of them if `most` is None."""
    return rows if most is None else [rows[number] for number in range(min(most, len(rows)))]
