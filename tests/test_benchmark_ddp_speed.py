"""The benchmark of ddp runs in small and writes what others read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def benchmark(load_benchmark: Any) -> Any:
    return load_benchmark("ddp_speed")


def test_the_benchmark_runs_small_and_writes_its_figures(benchmark: Any, small_model: Path, tmp_path: Path) -> None:
    written = benchmark.main(["--small", "--steps=4", f"--results={tmp_path}", f"--model={small_model}"])
    assert written == tmp_path / "ddp_speed.cpu.json"
    record = json.loads(written.read_text())
    assert {"name", "hardware", "versions", "date", "command", "rows", "figures"} <= record.keys()
    both, single, strong = record["rows"]
    assert (both["what"], both["processes"]) == ("transformers-short-0", 2)
    assert (single["what"], single["processes"]) == ("single-transformers-short-0", 1)
    assert (strong["what"], strong["processes"]) == ("strong-transformers-short-0", 1)
    expected = both["tokens_per_second"] / single["tokens_per_second"] / 2
    assert record["figures"]["weak_scaling"] == pytest.approx(expected)
    expected = both["tokens_per_second"] / strong["tokens_per_second"] / 2
    assert record["figures"]["strong_scaling_transformers_short"] == pytest.approx(expected)
    # The same steps through two processes and through one, those of one process aside.
    assert strong["step_tokens"] == both["step_tokens"] > single["step_tokens"]
    assert strong["losses"] == pytest.approx(both["losses"], rel=1e-4)


def test_figures_are_ratios_of_medians(benchmark: Any) -> None:
    options = benchmark.parse(["--gpus=1"])
    rows = [
        {"what": "reference-short-0", "tokens_per_second": 100.0, "host_seconds": 0.9, "losses": [4.0, 2.0]},
        {"what": "unsloth-short-0", "tokens_per_second": 900.0, "losses": [4.0, 2.1, 1.0]},
        {"what": "unsloth-short-1", "tokens_per_second": 1100.0},
        {"what": "transformers-short-0", "tokens_per_second": 500.0},
        {"what": "unsloth-full-0", "tokens_per_second": 90.0},
        {"what": "limit-unsloth-full-0", "tokens_per_second": 100.0},
        {"what": "limit-transformers-full-0", "failed": "no room"},
    ]
    found = benchmark.figures(rows, options)
    assert found["engine"] == "unsloth"
    assert found["ratio_to_reference"] == 10.0
    assert found["share_of_captured_limit_full_rows"] == 0.9
    assert found["spread_unsloth_short"] == 0.2
    assert found["spread_transformers_short"] is None
    assert found["losses_apart_unsloth_short"] == pytest.approx(0.05)
    assert found["losses_apart_unsloth_full"] is None
    assert found["host_seconds_reference_short"] == 0.9
    assert found["weak_scaling"] is None
