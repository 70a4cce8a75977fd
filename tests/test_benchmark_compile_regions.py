"""The comparison of compiled regions runs in small; a variant that fails is a row of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def test_variants_compute_the_same_and_failures_are_kept(
    load_benchmark: Any, small_model: Path, tmp_path: Path
) -> None:
    benchmark = load_benchmark("compile_regions")
    record = json.loads(benchmark.main(["--small", f"--results={tmp_path}", f"--model={small_model}"]).read_text())
    assert {"name", "hardware", "versions", "date", "command", "rows", "figures"} <= record.keys()
    assert [row["what"] for row in record["rows"]] == ["eager", "compiled"]
    assert record["figures"]["losses_apart_compiled"] < 1e-5
    assert record["figures"]["speedup_eager"] == 1.0

    options = benchmark.parse(["--small", "--model=/nowhere", "--variants=eager"])
    (failed,) = benchmark.measure(tmp_path, options)
    assert failed["what"] == "eager" and "nowhere" in failed["failed"]
    assert benchmark.figures([failed]) == {}
