"""The benchmark of faults runs in small, and its committed records hold what they promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).parents[1] / "examples" / "benchmarks" / "results"


def test_a_harmed_run_trains_the_same(load_benchmark: Any, tmp_path: Path) -> None:
    options = ["--small", "--minutes=0", "--ways=ddp", "--steps=12", "--save_steps=4", "--most_faults=1", "--seed=3"]
    written = load_benchmark("soak").main([*options, f"--results={tmp_path}", f"--work={tmp_path / 'work'}"])
    record = json.loads(written.read_text())
    assert {"name", "hardware", "versions", "date", "command", "rows", "figures"} <= record.keys()
    (row,) = record["rows"]
    assert "failed" not in row, row
    assert (row["steps"], len(row["faults"])) == (12, 1)
    figures = record["figures"]
    assert figures["losses_equal"] and figures["weights_apart"] < 1e-4
    assert figures["hung"] == figures["left_processes"] == figures["temporary_files"] == 0


@pytest.mark.parametrize("path", sorted(RESULTS.glob("soak.*.json")), ids=lambda path: path.stem)
def test_committed_records(path: Path) -> None:
    figures = json.loads(path.read_text())["figures"]
    assert figures["faults_survived"] >= 10 and figures["minutes"] > 0
    assert figures["losses_equal"] and figures["failed"] == 0
    assert figures["hung"] == figures["left_processes"] == figures["temporary_files"] == 0
