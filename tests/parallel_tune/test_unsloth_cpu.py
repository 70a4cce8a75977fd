"""The real Unsloth package on its CPU backend, under every strategy, against the transformers engine."""

from __future__ import annotations

from typing import Any

import pytest

LAYOUTS = [("ddp", "cpu:1"), ("ddp", "cpu:2"), ("model_parallel", "cpu:2")]


@pytest.mark.parametrize(("strategy", "hardware"), LAYOUTS)
def test_unsloth_trains_as_transformers_does(strategy: str, hardware: str, tune: Any, single_run: Any) -> None:
    run = tune("--engine=unsloth", f"--strategy={strategy}", f"--hardware={hardware}")
    assert run.report["engine"] == "unsloth"
    assert "unsloth" in run.report["versions"]
    assert run.losses == pytest.approx(single_run.losses, rel=1e-4)
    assert run.report["held_out_loss_after"] == pytest.approx(single_run.report["held_out_loss_after"], rel=1e-4)
    assert (run.run / "adapter" / "adapter_model.safetensors").exists()
