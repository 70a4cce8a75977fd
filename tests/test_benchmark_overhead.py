"""The benchmark of overhead runs in small: the bare script and ours train the same rows in the same steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def benchmark(load_benchmark: Any) -> Any:
    return load_benchmark("overhead")


def test_the_bare_script_and_ours_train_the_same_steps(benchmark: Any, small_model: Path, tmp_path: Path) -> None:
    written = benchmark.main([
        "--small", "--steps=4", "--warm_up=1", "--repeat=1", "--batch=2", "--accumulation=2",
        "--engines=transformers", f"--results={tmp_path}", f"--model={small_model}",
    ])  # fmt: skip
    assert written == tmp_path / "overhead.cpu.json"
    record = json.loads(written.read_text())
    assert {"name", "hardware", "versions", "date", "command", "rows", "figures"} <= record.keys()
    bare, ours = record["rows"]
    assert (bare["what"], ours["what"]) == ("bare-transformers-0", "ours-transformers-0")
    assert len(bare["seconds"]) == len(ours["seconds"]) == 4
    assert ours["losses"] == pytest.approx(bare["losses"], rel=1e-5)
    assert record["figures"]["losses_apart_transformers"] < 1e-5
    expected = ours["first_step_seconds"] / bare["first_step_seconds"] - 1
    assert record["figures"]["first_step_cold"] == pytest.approx(expected)


def test_the_overhead_is_that_of_equal_steps(benchmark: Any) -> None:
    options = benchmark.parse(["--engines=unsloth", "--steps=4", "--warm_up=1"])
    bare = {"engine": "unsloth", "losses": [2.0, 1.0, 1.0, 1.0]}
    rows = [
        {**bare, "what": "bare-unsloth-0", "turn": 0, "seconds": [9.0, 1.0, 2.0, 4.0], "first_step_seconds": 10.0},
        {**bare, "what": "ours-unsloth-0", "turn": 0, "seconds": [9.0, 1.1, 2.2, 4.4], "first_step_seconds": 12.0},
        {**bare, "what": "bare-unsloth-1", "turn": 1, "seconds": [9.0, 1.0, 2.0, 4.0], "first_step_seconds": 10.0},
        {**bare, "what": "ours-unsloth-1", "turn": 1, "seconds": [9.0, 1.1, 2.2, 4.4], "first_step_seconds": 10.5},
    ]
    found = benchmark.figures(rows, options)
    assert found["overhead"] == pytest.approx(0.1)
    assert found["first_step_cold"] == pytest.approx(0.2)
    assert found["first_step_warm"] == pytest.approx(0.05)
    assert found["losses_apart_unsloth"] == 0.0
    assert benchmark.figures(rows[:1], options)["overhead"] is None

    options.cold_turns = 2
    found = benchmark.figures(rows, options)
    assert found["first_step_cold"] == pytest.approx(0.125)
    assert found["first_step_cold_spread_unsloth"] == pytest.approx([0.05, 0.2])
    assert found["first_step_warm"] is None
