"""The benchmark of captured stages runs in small, without the ways that need a GPU."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = Path(__file__).parents[1] / "examples" / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module("captured_lanes")


def test_the_benchmark_runs_small_and_writes_a_row_for_each_way_and_size(benchmark: Any, tmp_path: Path) -> None:
    options = "--micro_batches 2 --tokens 8,16 --repeat 1 --ways naive,lanes,captured --results"
    written = benchmark.main([*options.split(), str(tmp_path)])
    record = json.loads(written.read_text())
    assert {"name", "hardware", "versions", "date", "command", "rows", "figures"} <= record.keys()
    ways = [(row["way"], row["tokens"]) for row in record["rows"]]
    assert ways == [("naive", 8), ("naive", 16), ("lanes", 8), ("lanes", 16)]
    assert all(row["gradient_error"] == 0 for row in record["rows"])
    assert set(record["figures"]["16"]["speedup_over_naive"]) == {"naive", "lanes"}


def test_it_goes_on_with_what_is_missing(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--ways=naive,lanes", "--repeat=1", f"--results={tmp_path}"]
    written = benchmark.main([*options, "--tokens=8", "--micro_batches=2"])
    kept = json.loads(written.read_text())["rows"][1]
    asked: list[str] = []

    def noting(stages: Any, way: Any, *others: Any) -> Any:
        asked.append(way.name)
        raise RuntimeError("not asked for here")

    monkeypatch.setattr(benchmark, "measure", noting)
    again = benchmark.main([*options, "--tokens=8,16", "--micro_batches=2", "--go_on"])
    assert asked == ["naive", "naive", "lanes"]
    assert kept in json.loads(again.read_text())["rows"]
    asked.clear()
    benchmark.main([*options, "--tokens=8", "--micro_batches=3", "--go_on"])
    assert asked == ["naive", "lanes"]


def test_a_way_that_fails_is_written_down_and_the_rest_goes_on(benchmark: Any) -> None:
    def failing() -> None:
        raise RuntimeError("out of memory\nmore of it")

    assert benchmark.attempt(failing) == ({"error": "RuntimeError: out of memory"}, [])
