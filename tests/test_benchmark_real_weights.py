"""The comparison of captured with eager learning runs in small, and holds both against eager noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def test_curves_of_real_runs_are_held_against_each_other(
    load_benchmark: Any, small_model: Path, tmp_path: Path
) -> None:
    benchmark = load_benchmark("real_weights")
    written = benchmark.main(["--small", f"--results={tmp_path}", str(small_model)])
    assert written == tmp_path / "real_weights.cpu.json"
    record = json.loads(written.read_text())
    assert [row["what"] for row in record["rows"]] == [f"transformers-{kind}" for kind in benchmark.KINDS]
    assert all(len(row["losses"]) == 4 for row in record["rows"])
    figures = record["figures"]
    # On a CPU all three run the same steps.
    assert figures["losses_apart_transformers"] == pytest.approx(0, abs=1e-6)
    assert figures["eager_noise_transformers"] == pytest.approx(0, abs=1e-6)
    assert figures["held_out_loss_after_transformers_captured"] < figures["held_out_loss_before_transformers"]


def test_a_failed_run_leaves_the_others_figures(load_benchmark: Any) -> None:
    benchmark = load_benchmark("real_weights")
    run = {"losses": [2.0, 1.0], "held_out_loss_before": 2.0, "held_out_loss_after": 1.0, "step_seconds": 0.1}
    rows = [
        {**run, "what": "unsloth-eager"},
        {"what": "unsloth-captured", "failed": "no room"},
        {**run, "what": "unsloth-again", "losses": [2.0, 1.01]},
        {"what": "transformers-eager", "failed": "no room"},
    ]
    found = benchmark.figures(rows, ["unsloth", "transformers"])
    assert found["eager_noise_unsloth"] == pytest.approx(0.01)
    assert "losses_apart_unsloth" not in found and "held_out_loss_before_transformers" not in found
