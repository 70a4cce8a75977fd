"""The benchmark of a step's work runs in small, and keeps what failed beside what did not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def test_a_step_of_a_real_run_is_counted(load_benchmark: Any, small_model: Path, tmp_path: Path) -> None:
    benchmark = load_benchmark("step_profile")
    options = ("--small", f"--model={small_model}", f"--traces={tmp_path}")
    written = benchmark.main([*options, f"--results={tmp_path}"])
    assert written == tmp_path / "step_profile.cpu.json"
    record = json.loads(written.read_text())
    assert {"name", "hardware", "versions", "date", "command", "rows", "figures"} <= record.keys()
    (row,) = record["rows"]
    assert row["what"] == "transformers-eager" and row["steps"] == benchmark.PROFILED
    assert row["operations"] > 100 and row["step_milliseconds"] >= row["issued_milliseconds"] > 0
    assert any("aten::mm" in line for line in row["table"])
    assert record["figures"]["operations_transformers-eager"] == row["operations"]
    assert (tmp_path / "transformers-eager" / "rank-0.trace.json.gz").exists()


def test_a_run_that_fails_does_not_take_the_others_with_it(
    load_benchmark: Any, small_model: Path, monkeypatch: Any, tmp_path: Path
) -> None:
    benchmark = load_benchmark("step_profile")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(benchmark, "train", fail)
    record = json.loads(benchmark.main(["--small", f"--results={tmp_path}", f"--model={small_model}"]).read_text())
    assert record["rows"] == [{"what": "transformers-eager", "failed": "no room"}]
