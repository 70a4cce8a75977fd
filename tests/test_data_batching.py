"""Padding, held-out rows, and the store of encoded rows."""

from pathlib import Path

import pytest
import torch

from parallel_tune.data import IGNORED, EncodedRow, EncodedRows, collate, split_held_out
from parallel_tune.data.rows import describe
from strategies.errors import ConfigError

ROWS: list[EncodedRow] = [
    {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]},
    {"input_ids": [8, 9, 10, 11, 12], "labels": [IGNORED, IGNORED, IGNORED, 11, 12]},
]


def test_rows_are_padded_on_the_right() -> None:
    batch = collate(ROWS, pad_token_id=7)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 7, 7], [8, 9, 10, 11, 12]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, -100], [-100, -100, -100, 11, 12]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}
    assert collate(ROWS, 7, pad_to_multiple_of=8)["labels"].shape == (2, 8)


@pytest.mark.parametrize("multiple", [None, 8])
def test_no_rows_give_the_zero_weight_batch(multiple: int | None) -> None:
    batch = collate([], 3, multiple)
    assert batch["input_ids"].tolist() == [[3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1]]
    assert batch["labels"].tolist() == [[-100, -100]]


def test_held_out_rows_are_the_same_for_the_same_seed() -> None:
    rows = list(range(100))
    train, held_out = split_held_out(rows, 0.1, seed=7)
    assert (train, held_out) == split_held_out(rows, 10, seed=7)
    assert held_out == [6, 9, 12, 19, 41, 46, 50, 68, 74, 83]  # pinned: other versions must choose the same
    assert sorted(train + held_out) == rows
    assert split_held_out(rows, 10, seed=8)[1] != held_out
    assert split_held_out(rows, 0, seed=7) == (rows, [])
    assert len(split_held_out(rows[:3], 0.01, seed=7)[1]) == 1


@pytest.mark.parametrize("amount", [-1, 1.5, 3, 7, 0.99])
def test_impossible_amounts_are_refused(amount: float) -> None:
    with pytest.raises(ConfigError, match=r"hold"):
        split_held_out([1, 2, 3], amount, seed=0)


def test_encoded_rows_behave_like_a_list() -> None:
    rows = EncodedRows(ROWS)
    assert list(rows) == ROWS
    assert rows[-1] == ROWS[1]
    assert rows[:1] == EncodedRows(ROWS[:1])
    assert rows.lengths == [3, 5]
    assert rows.answer_tokens == [2, 2]
    assert list(split_held_out(rows, 1, seed=0)[0]) in ([ROWS[0]], [ROWS[1]])
    assert rows.to_dataset()[1] == ROWS[1]
    with pytest.raises(IndexError):
        rows[2]
    with pytest.raises(ValueError, match="3 tokens and 2 labels"):
        rows.append({"input_ids": [1, 2, 3], "labels": [1, 2]})


def test_encoded_rows_survive_a_file_and_refuse_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.bin"
    rows = EncodedRows(ROWS)
    with path.open("wb") as file:
        rows.write(file)
    assert path.stat().st_size == rows.num_bytes
    with path.open("rb") as file:
        assert EncodedRows.read(file, rows.counts) == rows
    with path.open("rb") as file, pytest.raises(ValueError, match="belong together"):
        EncodedRows.read(file, [3, 8, 7])
    path.write_bytes(path.read_bytes()[:-5])
    with path.open("rb") as file, pytest.raises(EOFError):
        EncodedRows.read(file, rows.counts)


def test_the_report_counts_and_says_it_in_a_line() -> None:
    rows = EncodedRows([{"input_ids": [1] * n, "labels": [IGNORED] + [1] * (n - 1)} for n in range(1, 101)])
    report = describe(rows, "text", empty=1, dropped=2, truncated=3)
    assert report.length_percentiles == {5: 5, 50: 50, 90: 90, 99: 99, 100: 100}
    assert (report.rows, report.tokens, report.answer_tokens) == (100, 5050, 4950)
    assert report.summary() == (
        "100 rows (text), 5,050 tokens, 4,950 of them learned; lengths: half up to 50, longest 100; "
        "3 cut to the maximum length; 2 dropped: nothing left to learn; 1 empty rows skipped"
    )
