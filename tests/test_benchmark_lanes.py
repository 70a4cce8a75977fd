"""The benchmark of lanes runs in small and writes what others read."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path


def test_the_benchmark_runs_small_and_writes_its_figures(tmp_path: Path) -> None:
    path = Path(__file__).parents[1] / "examples" / "benchmarks" / "lanes.py"
    spec = importlib.util.spec_from_file_location("benchmark_lanes", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = "--micro_batches 3 --rows 1 --length 8 --repeat 2 --checkpointing --results"
    written = module.main([*options.split(), str(tmp_path)])
    assert written == tmp_path / "lanes.cpu.json"
    record = json.loads(written.read_text())
    assert {"name", "hardware", "versions", "date", "command", "rows", "figures"} <= record.keys()
    assert record["figures"]["gradient_error"] == record["figures"]["naive_noise"] == 0
    assert record["figures"]["bound"] == 1.5
    assert [row["schedule"] for row in record["rows"]] == ["naive", "lanes"] * 2
    assert len(record["rows"][-1]["timeline"]) == 9
