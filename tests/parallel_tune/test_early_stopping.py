"""Early stopping, the best weights, and which checkpoints stay: the same under every strategy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from compared_runs import STOPPING_ALONE

from parallel_tune.checkpoint import mark_complete, rotate
from parallel_tune.stopping import evaluations_without_progress


def held_out(run: Path) -> dict[int, float]:
    """Held-out losses by step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}


@pytest.mark.parametrize("layout", ["one", "ddp", "split"])
def test_training_stops_when_the_held_out_loss_rises_and_the_best_weights_are_kept(
    layout: str, compared: Callable[[str], Any]
) -> None:
    run = compared(f"stopped, {layout}")
    losses, end = held_out(run.run), run.report["stopped_early_at_step"]
    during = {step: loss for step, loss in losses.items() if step > 0}
    best = min(during, key=lambda step: during[step])
    assert during[end] > during[best]
    assert run.report["steps"] == end == best + 4 < 40
    assert run.report["best_step"] == best
    assert run.report["held_out_loss_after"] == pytest.approx(during[best], rel=1e-5)
    assert sorted(path.name for path in run.run.glob("checkpoint-*")) == [f"checkpoint-{best}"]
    assert f"stopped early after step {end}" in run.out
    saved = (run.run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert saved == (run.run / f"checkpoint-{best}" / "adapter_model.safetensors").read_bytes()


def test_progress_below_the_threshold_is_none(compared: Callable[[str], Any]) -> None:
    run = compared("stopped, threshold")
    # The first evaluation is progress from nothing; the second is not enough.
    assert run.report["stopped_early_at_step"] == 4
    assert "best_step" not in run.report
    assert [path.name for path in run.run.glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.fixture(scope="module")
def cut(tune: Any, compared: Callable[[str], Any]) -> Path:
    """A run that ended between the best evaluation and the last one, without its result, and no longer where it was."""
    best = compared("stopped, one").report["best_step"]
    (run,) = tune.in_turn((*STOPPING_ALONE, "--save_steps=2", f"--max_steps={best + 2}"))
    shutil.rmtree(run.run / "adapter")
    return Path(run.run.rename(run.run.with_name("cut")))


def test_a_resumed_run_goes_on_counting(tune: Any, compared: Callable[[str], Any], cut: Path, tmp_path: Path) -> None:
    """Cut off between the best evaluation and the last one, moved, and to save no more than better ones from then."""
    alone = compared("stopped, one")
    best, stopped = alone.report["best_step"], alone.report["stopped_early_at_step"]
    run = Path(shutil.copytree(cut, tmp_path / "moved"))
    settings = (run / "config.yaml").read_text()
    for name, before, after in (("max_steps", best + 2, -1), ("save_steps", 2, 0)):
        settings = settings.replace(f"{name}: {before}\n", f"{name}: {after}\n")
    (run / "config.yaml").write_text(settings)
    resumed = tune("resume", str(run), base=False)
    assert f"resuming from checkpoint-{best + 2}" in resumed.out
    assert f"stopped early after step {stopped}" in resumed.out
    assert (resumed.report["best_step"], resumed.report["stopped_early_at_step"]) == (best, stopped)
    assert resumed.report["held_out_loss_after"] == pytest.approx(alone.report["held_out_loss_after"], rel=1e-6)


def test_a_run_that_had_stopped_early_is_not_trained_further(
    tune: Any, compared: Callable[[str], Any], cut: Path, tmp_path: Path
) -> None:
    """It ended after the checkpoint of the evaluation that stopped it, and before its result was on disk."""
    best = compared("stopped, one").report["best_step"]
    run = Path(shutil.copytree(cut, tmp_path / "stopped"))
    settings = (run / "config.yaml").read_text()
    for name, before, after in (("max_steps", best + 2, -1), ("early_stopping_patience", 2, 1)):
        assert f"{name}: {before}\n" in settings
        settings = settings.replace(f"{name}: {before}\n", f"{name}: {after}\n")
    (run / "config.yaml").write_text(settings)
    resumed = tune("resume", str(run), base=False)
    assert f"resuming from checkpoint-{best + 2}" in resumed.out
    assert resumed.report["steps"] == resumed.report["stopped_early_at_step"] == best + 2
    assert max(row["step"] for row in resumed.metrics) == best + 2
    assert resumed.report["best_step"] == best
    assert resumed.report["held_out_loss_after"] == pytest.approx(held_out(run)[best], rel=1e-5)


def test_a_run_that_was_moved_keeps_its_best_weights_and_damaged_ones_are_not_taken(
    tune: Any, compared: Callable[[str], Any], cut: Path, tmp_path: Path
) -> None:
    """A checkpoint's state names the best one by the path that it was written to."""
    best = compared("stopped, one").report["best_step"]
    moved = Path(shutil.copytree(cut, tmp_path / "moved"))
    damaged = Path(shutil.copytree(moved, tmp_path / "damaged"))
    content = bytearray((damaged / f"checkpoint-{best}" / "adapter_model.safetensors").read_bytes())
    content[-5] ^= 4
    (damaged / f"checkpoint-{best}" / "adapter_model.safetensors").write_bytes(content)
    for run, kept in ((moved, best), (damaged, best + 2)):
        resumed = tune("resume", str(run), base=False)
        assert resumed.report.get("best_step", best + 2) == kept
        assert resumed.report["held_out_loss_after"] == pytest.approx(held_out(run)[kept], rel=1e-5)
        saved = (run / "adapter" / "adapter_model.safetensors").read_bytes()
        assert saved == (run / f"checkpoint-{kept}" / "adapter_model.safetensors").read_bytes()


def test_a_run_without_an_evaluation_is_refused(tune: Any) -> None:
    ended = tune.ended("--hardware=cpu:1", "--eval_steps=6", "--early_stopping_patience=2", "--max_steps=5")
    assert ended.code == 2
    assert "eval_steps = 6, and the run has 5 steps" in ended.err


def test_the_last_weights_are_kept_where_they_are_the_best_and_have_no_checkpoint(tune: Any, tmp_path: Path) -> None:
    """Its disk had filled up: of the best evaluation before that there is one, of far fewer steps."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint-4").write_text("in the way of the last one")
    saving = ("--hardware=cpu:1", "--max_steps=4", "--eval_steps=2", "--load_best_model_at_end")
    ended = tune(*saving, f"--output_dir={run}", shared_output=False)
    losses, report = held_out(run), json.loads((run / "report.json").read_text())
    assert losses[4] < losses[2]
    assert report["missed_checkpoints"] == [4]
    assert report["best_step"] == 4
    assert report["held_out_loss_after"] == losses[4]
    assert "the result has the weights of step 4, the best evaluation" in ended.out
    saved = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert saved != (run / "checkpoint-2" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("losses", "threshold", "count"),
    [
        ([], 0.0, 0), ([3.0], 0.0, 0), ([3.0, 2.0], 0.0, 0), ([3.0, 3.0], 0.0, 1), ([3.0, 4.0, 3.5], 0.0, 2),
        ([3.0, 4.0, 2.0], 0.0, 0), ([3.0, 2.9, 2.8], 0.15, 2), ([3.0, 2.9, 2.7], 0.15, 0),
    ],
)  # fmt: skip
def test_what_counts_as_progress(losses: list[float], threshold: float, count: int) -> None:
    assert evaluations_without_progress(losses, threshold) == count


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (None, 2, [2, 4, 6, 8]), (4, 2, [2, 4, 6, 8]), (2, None, [6, 8]), (2, 2, [2, 8]), (1, 2, [2, 8]),
        (1, 8, [8]), (3, 4, [4, 6, 8]),
    ],
)  # fmt: skip
def test_only_old_complete_checkpoints_go(keep: int | None, best: int | None, left: list[int], tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
        mark_complete(tmp_path / f"checkpoint-{step}")
    for other in ("checkpoint-1", "checkpoint-mine"):
        (tmp_path / other).mkdir()  # not marked: not ours to delete
    rotate(tmp_path, keep, None if best is None else tmp_path / f"checkpoint-{best}")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(["checkpoint-1", "checkpoint-mine", *(f"checkpoint-{step}" for step in left)])


def test_the_best_of_all_weights_are_kept_too(compared: Callable[[str], Any]) -> None:
    """Head and embedding are one weight here, on two devices."""
    run = compared("stopped, all weights")
    best = run.report["best_step"]
    assert best < run.report["steps"]
    assert run.report["held_out_loss_after"] == pytest.approx(held_out(run.run)[best], rel=1e-5)
    saved = (run.run / "model" / "model.safetensors").read_bytes()
    assert saved == (run.run / f"checkpoint-{best}" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("layout", "every"),
    [
        (("--strategy=ddp", "--hardware=cpu:2"), ("--eval_steps=2", "--save_steps=2")),
        (("--hardware=cpu:1",), ("--eval_strategy=epoch", "--save_strategy=epoch")),
        (("--strategy=model_parallel", "--hardware=cpu:2", "--pipeline=on"), ("--eval_steps=2", "--save_steps=1")),
    ],
)
def test_a_run_that_was_killed_after_it_had_stopped_trains_no_further(
    layout: tuple[str, ...], every: tuple[str, ...], tune: Any
) -> None:
    """Its last checkpoint is that of the evaluation that stopped it, and its result was not written."""
    longer = replace(tune, base=tuple(option for option in tune.base if "num_train_epochs" not in option))
    run = longer(
        *layout, *every, "--val_size=6", "--global_batch_size=12", "--early_stopping_patience=1",
        "--early_stopping_threshold=100", "--num_train_epochs=8",
    )  # fmt: skip
    stopped, losses = run.report["stopped_early_at_step"], held_out(run.run)
    result = (run.run / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run.run / "adapter")
    (run.run / "report.json").unlink()
    resumed = tune("resume", str(run.run), base=False)
    assert f"resuming from checkpoint-{stopped}" in resumed.out
    assert f"stopped early after step {stopped}" in resumed.out
    assert (resumed.report["steps"], resumed.report["stopped_early_at_step"]) == (stopped, stopped)
    assert (run.run / "adapter" / "adapter_model.safetensors").read_bytes() == result
    assert held_out(run.run) == losses
