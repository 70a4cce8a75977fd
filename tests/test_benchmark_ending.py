"""The benchmark of endings runs in small, and its committed record holds what it promises."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"


def test_the_benchmark_runs_small(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("benchmark_ending", FOLDER / "ending.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    record = json.loads(module.main(["--runs", "1", "--results", str(tmp_path)]).read_text())
    assert {"name", "hardware", "versions", "date", "command", "rows", "figures"} <= record.keys()
    figures = record["figures"]
    assert (figures["ended_with_code_0"], figures["results_on_disk"]) == (1, 1), record["rows"]
    assert figures["left_processes"] == figures["hung"] == 0


def test_fifty_runs_in_a_row_ended_well() -> None:
    figures = json.loads((FOLDER / "results" / "ending.cpu.json").read_text())["figures"]
    assert figures["runs"] >= 50
    assert figures["ended_with_code_0"] == figures["results_on_disk"] == figures["runs"]
    assert figures["left_processes"] == figures["hung"] == 0
