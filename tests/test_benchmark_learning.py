"""The benchmark of learning runs in small and writes what others read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def test_the_benchmark_runs_small_and_writes_its_figures(load_benchmark: Any, tmp_path: Path, tiny_model: Path) -> None:
    options = ["--hardware=cpu:1", "--max_steps=2", f"--results={tmp_path}"]
    load_benchmark("learning").main([f"--model={tiny_model}", *options])
    record = json.loads((tmp_path / "learning.cpu-1.json").read_text())
    assert {"name", "hardware", "versions", "date", "command", "rows", "figures", "answer_before"} <= record.keys()
    assert [row["way"] for row in record["rows"]] == ["ddp, eager", "ddp", "model_parallel"]
    assert record["figures"]["failed"] == 0
    assert record["figures"]["apart"] < 1e-5
    assert record["figures"]["held_out_loss_after"] != pytest.approx(record["figures"]["held_out_loss_before"])
