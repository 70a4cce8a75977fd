"""Training data: from files or the Hub to rows of token ids with labels, and from rows to batches."""

from parallel_tune.data.batching import boundary_arguments, collate, fill_up, join, split_held_out
from parallel_tune.data.encoding import chunk_text, encode_rows
from parallel_tune.data.formats import RowFormat, alpaca_prompt, detect_format
from parallel_tune.data.loading import load_rows
from parallel_tune.data.rows import IGNORED, DataReport, EncodedRow, EncodedRows

__all__ = [
    "IGNORED",
    "DataReport",
    "EncodedRow",
    "EncodedRows",
    "RowFormat",
    "alpaca_prompt",
    "boundary_arguments",
    "chunk_text",
    "collate",
    "detect_format",
    "encode_rows",
    "fill_up",
    "join",
    "load_rows",
    "split_held_out",
]
