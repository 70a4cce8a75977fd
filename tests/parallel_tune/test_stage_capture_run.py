"""Whole runs of a split model whose stages are recorded and replayed in lanes: the losses of eager ones.

A CPU has no CUDA graphs, and attention to joined rows reads their boundaries on the host there: an installed strategy
brings what takes the place of both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

STRATEGY = '''
from dataclasses import replace

import torch.nn.functional

from parallel_tune import row_attention
from parallel_tune.unneeded import QUANTIZERS, leave_out
from strategies.model_parallel import ModelParallel
from strategies.sessions import SplitSession

READ_ON_THE_HOST = row_attention.attend


def attend(module, query, key, value, mask, dropout=0.0, scaling=None, cu_seq_lens_q=None, row_lengths=None, **others):
    """Attention within rows by a mask that is made where the boundaries lie."""
    if row_lengths is not None or cu_seq_lens_q is None:
        return READ_ON_THE_HOST(module, query, key, value, mask, dropout, scaling, row_lengths=row_lengths, **others)
    places = torch.arange(query.shape[2])
    rows = torch.bucketize(places, cu_seq_lens_q[1:], right=True)
    near = (rows[:, None] == rows[None, :]) & (places[:, None] >= places[None, :])
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    joined = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=near, scale=scaling)
    return joined.transpose(1, 2).contiguous(), None


class RecordedSplit(SplitSession):
    def stage_recorder(self, stages):
        return OperationTape()


class RecordedModelParallel(ModelParallel):
    name = "recorded_split"
    auto_order = 130

    def plan(self, workload, hardware, estimate):
        # Captured, in the one process: its session records on a tape instead.
        return replace(super().plan(workload, hardware, estimate), captured=True)

    def open(self, plan, timeout_seconds):
        leave_out(QUANTIZERS)
        if MASKS:
            row_attention.attend = attend
        return RecordedSplit(plan)
'''
TAPE = Path(__file__).parents[1] / "op_tape.py"


def installed(package: Any, folder: Path, masks: bool) -> dict[str, str]:
    """The environment in which the strategy is installed."""
    body = f"{TAPE.read_text()}\n\nMASKS = {masks}\n{STRATEGY}"
    found: dict[str, str] = package(folder, "recorded_split = other:RecordedModelParallel", body)
    return found


OPTIONS = ("--hardware=cpu:2", "--pipeline=on")


def test_a_split_models_replayed_steps_train_as_eager_ones(
    tune: Any, package: Any, split_run: Any, tmp_path: Path
) -> None:
    run = tune("--strategy=recorded_split", *OPTIONS, env=installed(package, tmp_path, masks=True))
    assert run.losses == pytest.approx(split_run.losses, rel=1e-5)
    assert run.report["held_out_loss_after"] == pytest.approx(split_run.report["held_out_loss_after"], rel=1e-5)
    assert (run.report["lanes"], run.report["lanes_reason"]) == (2, None)
    found = run.report["captured"]
    assert found["reason"] is None
    assert found["recordings"] == len(found["sizes"]) >= 1
    assert found["replayed_elements"] > found["elements"] / 2
    assert found["gradient_error"] < 1e-4
    log = (run.run / "logs" / "rank-0.log").read_text()
    assert f"steps are captured at {', '.join(map(str, found['sizes']))}" in log
    assert f"replayed {found['replayed_elements'] / found['elements']:.1%} of all tokens" in log


def test_a_stage_that_reads_on_the_host_trains_eagerly_and_the_report_says_why(
    tune: Any, package: Any, split_run: Any, tmp_path: Path
) -> None:
    run = tune("--strategy=recorded_split", *OPTIONS, env=installed(package, tmp_path, masks=False))
    assert run.losses == pytest.approx(split_run.losses, rel=1e-5)
    found = run.report["captured"]
    # Lists are made past torch's operations, so that the check of the recording has to find it out.
    assert "off those of the same step run eagerly" in found["reason"]
    assert found["replayed_elements"] == 0
    log = (run.run / "logs" / "rank-0.log").read_text()
    # When it was so, and at the end.
    assert log.count("steps are no longer captured, since a captured step's gradients") == 2
    assert "replayed 0.0% of all tokens" in log
