"""Rows gathered into sequences that are as full as can be, each row whole and apart from the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

from parallel_tune.data.rows import IGNORED, EncodedRow, EncodedRows

ROWS_AT_ONCE = 100_000
"""Rows among which the best fit is sought: beyond some thousands nothing is gained."""


class PackedRows(Sequence[EncodedRow]):
    """Sequences of rows, one behind the other; `row_lengths` of a sequence says where they part."""

    def __init__(self, dataset: Any, digest: str) -> None:
        """Takes a `datasets.Dataset` of `input_ids`, `labels` and `row_lengths`, and the digest of the rows in it."""
        self._dataset = dataset
        self.digest = digest
        self._row_lengths: list[list[int]] = list(dataset["row_lengths"])

    def __len__(self) -> int:
        return len(self._row_lengths)

    @overload
    def __getitem__(self, index: int) -> EncodedRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[EncodedRow]: ...
    def __getitem__(self, index: int | slice) -> EncodedRow | list[EncodedRow]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        row: EncodedRow = self._dataset[index]
        return row

    def __iter__(self) -> Iterator[EncodedRow]:
        return (self[number] for number in range(len(self)))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [sum(lengths) for lengths in self._row_lengths]

    @property
    def row_lengths(self) -> list[list[int]]:
        """Tokens of each row of each sequence."""
        return self._row_lengths

    @property
    def answer_tokens(self) -> list[int]:
        """Predicted tokens of each sequence."""
        return [len(row["labels"]) - row["labels"].count(IGNORED) for row in self]

    def to_dataset(self) -> Any:
        """The sequences as a `datasets.Dataset`."""
        return self._dataset


def pack(rows: EncodedRows, sequence_length: int) -> PackedRows:
    """Rows in sequences of at most `sequence_length` tokens, best fit, longest first; the same rows give the same ones.

    No row is longer: those that were have been cut when they were encoded. None is split, and the first label of each
    is ignored already, so no row is predicted from the one before it.
    """
    from trl import pack_dataset

    how = {"batch_size": ROWS_AT_ONCE, "keep_in_memory": True, "load_from_cache_file": False}
    packed = pack_dataset(rows.to_dataset(), sequence_length, strategy="bfd", map_kwargs=how)
    return PackedRows(packed.rename_column("seq_lengths", "row_lengths"), rows.digest)
