"""Packing: full sequences, rows whole and apart, and training as on the same rows one by one."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel_tune.data import IGNORED, EncodedRow, EncodedRows
from parallel_tune.data.packing import PackedRows, pack
from parallel_tune.data.rows import describe
from parallel_tune.data_part import DataPart, padding_share
from parallel_tune.sampler import GlobalBatches

LENGTH = 64


def row_of(number: int, length: int) -> EncodedRow:
    return {"input_ids": [number] * length, "labels": [IGNORED] + [number] * (length - 1)}


@pytest.fixture(scope="module")
def rows() -> EncodedRows:
    draw = random.Random(0)
    return EncodedRows(row_of(number, draw.choice([2, 3, 5, 9, 17, 33, 64])) for number in range(200))


@pytest.fixture(scope="module")
def packed(rows: EncodedRows) -> PackedRows:
    return pack(rows, LENGTH)


def test_each_row_is_whole_in_just_one_sequence(rows: EncodedRows, packed: PackedRows) -> None:
    found = []
    for sequence in packed:
        assert len(sequence["input_ids"]) == len(sequence["labels"]) == sum(sequence["row_lengths"]) <= LENGTH
        start = 0
        for length in sequence["row_lengths"]:
            part = slice(start, start + length)
            found.append({"input_ids": sequence["input_ids"][part], "labels": sequence["labels"][part]})
            start += length
    assert sorted(found, key=lambda row: row["input_ids"]) == list(rows)
    assert packed.lengths == [len(sequence["input_ids"]) for sequence in packed]
    assert sum(packed.answer_tokens) == sum(rows.answer_tokens)


def test_sequences_are_full_and_always_the_same(rows: EncodedRows, packed: PackedRows) -> None:
    assert len(packed) <= -(-sum(rows.lengths) // LENGTH) + 1
    assert list(pack(rows, LENGTH)) == list(packed)
    assert packed[-1] == packed[len(packed) - 1] and packed[:2] == [packed[0], packed[1]]


def test_the_share_of_padding() -> None:
    plan: Any = type("Plan", (), {"processes": 1, "micro_batch": 2, "gradient_accumulation_steps": 2})
    batches = GlobalBatches(lengths=(4, 4, 2, 1), targets=(3, 3, 1, 0), global_batch=4, seed=0)
    # 4 4 and 2 1: one position of twelve.
    assert padding_share(batches, [[4], [4], [2], [1]], plan) == pytest.approx(1 / 12)
    sequences = GlobalBatches(lengths=(6, 5), targets=(4, 3), global_batch=2, seed=0)
    # Four rows of at most four tokens in one micro-batch: 16 positions for 11 tokens.
    assert padding_share(sequences, [[4, 2], [4, 1]], plan) == pytest.approx(5 / 16)


def test_the_data_part_survives_a_file_and_says_what_is_saved(tmp_path: Path) -> None:
    report = replace(describe(EncodedRows([row_of(5, 8)] * 4), "text"), sequences=2)
    part = DataPart(report.summary(), 10, None, 0.25, None, (3 << 30, 2 << 30), (1 << 30, 2 << 30))
    part.save(tmp_path / "data.json")
    loaded = DataPart.load(tmp_path / "data.json")
    assert loaded.lines() == part.lines()
    assert "padding        none: rows are joined, which saves 25.0% of all positions" in loaded.lines()
    assert loaded.lines()[-1].endswith("2.0 GiB predicted for these rows on the fullest device, 2.0 GiB planned")
    padded = replace(part, padded_reason="it is so").lines()
    assert "padding        25.0% of all positions: rows are padded, since it is so" in padded


def test_strategies_train_alike_on_packed_sequences(packed_run: Any, compared: Callable[[str], Any]) -> None:
    split = compared("packed, lanes")
    assert split.losses == pytest.approx(packed_run.losses, rel=1e-5)
    assert split.report["held_out_loss_after"] == pytest.approx(packed_run.report["held_out_loss_after"], rel=1e-5)


def test_steps_and_batches_count_sequences(packed_run: Any) -> None:
    data = json.loads((packed_run.run / "data.json").read_text())
    sequences = data["packed"]["sequences"]
    assert data["packed"]["rows"] == 53 and data["packed"]["filled"] > 0.9
    assert packed_run.report["steps"] == 2 * -(-sequences // 2) == 2 * data["steps_per_epoch"]
    assert packed_run.report["samples"] == 2 * sequences
    assert packed_run.report["padding_free"]
    assert f"53 rows in {sequences} sequences of at most 256 tokens" in packed_run.out
    assert 0.1 < data["padding_share"] < 1
    assert f"which saves {data['padding_share']:.1%} of all positions" in packed_run.out


def test_the_first_step_is_that_of_its_rows_alone(packed_run: Any, tied_model: Path, rows_file: Path) -> None:
    """The mean loss over the rows of the first two sequences, each row forwarded by itself through the bare model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from parallel_tune.config import make_config
    from parallel_tune.data.prepare import prepare_data

    options = {"dataset": str(rows_file), "answers_only": True, "val_size": 6, "max_seq_length": 256, "packing": True}
    train, _, report = prepare_data(make_config(options), AutoTokenizer.from_pretrained(tied_model))
    assert report.sequences == len(train)
    batches = GlobalBatches(tuple(train.lengths), tuple(train.answer_tokens), 2, 3407)
    model = AutoModelForCausalLM.from_pretrained(tied_model, dtype=torch.float32)
    total, count = 0.0, 0
    with torch.no_grad():
        for number in batches.sample_ids(0):
            sequence, start = train[number], 0
            for length in sequence["row_lengths"]:
                ids = torch.tensor([sequence["input_ids"][start : start + length]])
                labels = torch.tensor(sequence["labels"][start + 1 : start + length])
                logits = model(input_ids=ids).logits[0, :-1]
                total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
                count += int((labels != IGNORED).sum())
                start += length
    assert packed_run.losses[0] == pytest.approx(total / count, rel=1e-5)


def test_packing_what_cannot_be_packed_is_refused_at_once(tied_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    config = json.loads((tied_model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "layer_types": ["linear_attention"] * 4}))
    command = [sys.executable, "-m", "parallel_tune", "plan", "--packing", "--model", str(model), "--hardware", "cpu:2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--packing joins rows" in done.stderr and "linear_attention layers" in done.stderr
