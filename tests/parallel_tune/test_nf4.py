"""4-bit weights on the CPU: both strategies hold them, and train alike."""

from __future__ import annotations

from typing import Any

import pytest


def test_nf4_trains_alike_under_both_strategies(tune: Any, single_run: Any) -> None:
    nf4 = ("--load_in_4bit", "--hardware=cpu:2", "--max_steps=8", "--learning_rate=1e-2")
    ddp = tune(*nf4, "--strategy=ddp")
    split = tune(*nf4, "--strategy=model_parallel")
    assert len(ddp.losses) == len(split.losses) == 8
    assert split.losses == pytest.approx(ddp.losses, rel=1e-4)
    assert ddp.losses[-1] < ddp.losses[0] - 0.1
    before = [run.report["held_out_loss_before"] for run in (ddp, split)]
    assert before[0] == pytest.approx(before[1], rel=1e-5)
    # Quantised indeed: the untouched model's held-out loss is another one.
    assert abs(single_run.report["held_out_loss_before"] - before[0]) > 1e-4
