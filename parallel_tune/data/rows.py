"""Encoded rows and what is told about them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NotRequired, TypedDict, overload

IGNORED = -100
"""The label of a token that no loss is computed for."""

PERCENTILES = (5, 50, 90, 99, 100)

MOST_COLUMNS_NAMED = 5
"""Of those that are not used."""


class EncodedRow(TypedDict):
    """One row as the model sees it; both lists have one entry a token, and `labels[0]` is always IGNORED.

    `row_lengths` is there in a packed sequence alone: the tokens of each of its rows, in order.
    """

    input_ids: list[int]
    labels: list[int]
    row_lengths: NotRequired[list[int]]


class EncodedRows(Sequence[EncodedRow]):
    """Rows of token ids and labels, kept flat: 8 bytes a token, where lists of Python integers take 40 or more."""

    def __init__(self, rows: Iterable[EncodedRow] = ()) -> None:
        self._input_ids = array("i")
        self._labels = array("i")
        self._ends = array("q", [0])
        for row in rows:
            self.append(row)

    def append(self, row: EncodedRow) -> None:
        """Add a row at the end."""
        if len(row["input_ids"]) != len(row["labels"]):
            raise ValueError(f"a row has {len(row['input_ids'])} tokens and {len(row['labels'])} labels")
        self._input_ids.extend(row["input_ids"])
        self._labels.extend(row["labels"])
        self._ends.append(len(self._input_ids))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> EncodedRow: ...
    @overload
    def __getitem__(self, index: slice) -> EncodedRows: ...
    def __getitem__(self, index: int | slice) -> EncodedRow | EncodedRows:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        number = range(len(self))[index]  # raises IndexError, and takes negative numbers
        start, end = self._ends[number], self._ends[number + 1]
        return {"input_ids": self._input_ids[start:end].tolist(), "labels": self._labels[start:end].tolist()}

    def __iter__(self) -> Iterator[EncodedRow]:
        return (self[number] for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EncodedRows):
            return NotImplemented
        return (self._ends, self._input_ids, self._labels) == (other._ends, other._input_ids, other._labels)

    __hash__ = None  # type: ignore[assignment]

    def select(self, numbers: Iterable[int]) -> EncodedRows:
        """The rows with these numbers, in this order."""
        return EncodedRows(self[number] for number in numbers)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [end - start for start, end in zip(self._ends, self._ends[1:], strict=False)]

    @property
    def row_lengths(self) -> list[list[int]]:
        """The same, as packed sequences have it: the rows that each row consists of."""
        return [[length] for length in self.lengths]

    @property
    def answer_tokens(self) -> list[int]:
        """Predicted tokens of each row: those whose label is not IGNORED."""
        bounds = zip(self._ends, self._ends[1:], strict=False)
        return [end - start - self._labels[start:end].count(IGNORED) for start, end in bounds]

    def to_dataset(self) -> Any:
        """The same rows as a `datasets.Dataset`, which is what TRL's trainers take."""
        from datasets import Dataset

        return Dataset.from_dict({"input_ids": [r["input_ids"] for r in self], "labels": [r["labels"] for r in self]})

    @property
    def parts(self) -> tuple[array[int], ...]:
        """All that they consist of: where rows end, token ids, labels."""
        return self._ends, self._input_ids, self._labels

    @property
    def digest(self) -> str:
        """What tells these rows from any others."""
        found = hashlib.sha256()
        for part in self.parts:
            found.update(memoryview(part))
        return found.hexdigest()

    @property
    def counts(self) -> list[int]:
        """Entries of each part."""
        return [len(part) for part in self.parts]

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(len(part) * part.itemsize for part in self.parts)

    def write(self, file: BinaryIO) -> None:
        """Write all rows, in this machine's byte order."""
        for part in self.parts:
            part.tofile(file)

    @classmethod
    def read(cls, file: BinaryIO, counts: Sequence[int]) -> EncodedRows:
        """Read what `write` wrote; `counts` are those of the rows that were written.

        Raises:
            EOFError: the file holds less.
            ValueError: the counts are not those of rows.
        """
        rows = cls()
        rows._ends = array("q")
        for part, count in zip(rows.parts, counts, strict=True):
            try:
                part.fromfile(file, count)
            except ValueError as error:  # torn within an item
                raise EOFError(f"the file ends within an item: {error}") from error
        tokens = len(rows._input_ids)
        if len(rows._labels) != tokens or rows._ends[:1].tolist() != [0] or rows._ends[-1] != tokens:
            raise ValueError("rows, tokens and labels do not belong together")
        return rows


@dataclass(frozen=True)
class DataReport:
    """What became of a dataset on its way to token ids.

    Attributes:
        format: the form the rows were found in, e.g. "alpaca".
        rows: rows that training will see.
        empty_rows: rows left out because they hold no text, or no answer where one belongs.
        dropped_rows: rows left out because no learned token was left (after the cut to the maximum length, or no
            assistant turn).
        truncated_rows: rows cut to the maximum length; those then dropped count too.
        tokens: tokens of all rows kept.
        answer_tokens: those of them that the loss is computed on.
        length_percentiles: percentile -> tokens of a row, over the rows kept.
        sequences: packed sequences that the training rows make; 0 without packing.
        unused_columns: columns of the first row that the form has no use for.
    """

    format: str
    rows: int
    empty_rows: int = 0
    dropped_rows: int = 0
    truncated_rows: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    length_percentiles: dict[int, int] = field(default_factory=dict)
    sequences: int = 0
    unused_columns: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line for people."""
        parts = [f"{self.rows:,} rows ({self.format}), {self.tokens:,} tokens, {self.answer_tokens:,} of them learned"]
        if self.length_percentiles:
            median, longest = self.length_percentiles[50], self.length_percentiles[100]
            parts.append(f"lengths: half up to {median:,}, longest {longest:,}")
        if self.sequences:
            parts.append(f"training rows packed in {self.sequences:,} sequences")
        if self.truncated_rows:
            parts.append(f"{self.truncated_rows:,} cut to the maximum length")
        if self.dropped_rows:
            parts.append(f"{self.dropped_rows:,} dropped: nothing left to learn")
        if self.empty_rows:
            parts.append(f"{self.empty_rows:,} empty rows skipped")
        if self.unused_columns:
            more = len(self.unused_columns) - MOST_COLUMNS_NAMED
            names = ", ".join(self.unused_columns[:MOST_COLUMNS_NAMED]) + (f" and {more} more" if more > 0 else "")
            parts.append(f"columns not used: {names}")
        return "; ".join(parts)


def describe(
    rows: EncodedRows,
    row_format: str,
    *,
    empty: int = 0,
    dropped: int = 0,
    truncated: int = 0,
    unused_columns: tuple[str, ...] = (),
) -> DataReport:
    """The report on rows that were encoded with these losses."""
    lengths = sorted(rows.lengths)
    # nearest rank: the smallest length that at least q percent of the rows do not exceed
    percentiles = {q: lengths[max(0, -(-len(lengths) * q // 100) - 1)] for q in PERCENTILES} if lengths else {}
    return DataReport(
        format=row_format,
        rows=len(rows),
        empty_rows=empty,
        dropped_rows=dropped,
        truncated_rows=truncated,
        tokens=sum(lengths),
        answer_tokens=sum(rows.answer_tokens),
        length_percentiles=percentiles,
        unused_columns=unused_columns,
    )
