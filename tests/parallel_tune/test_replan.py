"""The rest of a run on other devices or by the other strategy: the same training; gone devices are told at once."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from started_commands import unfinished_copy

import parallel_tune
from parallel_tune import replan
from parallel_tune.decision import decide, find_hardware
from parallel_tune.rundir import RunDir
from strategies.contracts import Hardware
from strategies.errors import ConfigError


def cut_at_8(run: Path, to: Path) -> Path:
    """The run as it would be, had it been killed before its second last step."""
    shutil.rmtree(unfinished_copy(run, to) / "checkpoint-10")
    metrics = to / "metrics.jsonl"
    rows = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(row for row in rows if json.loads(row)["step"] <= 8))
    return to


def assert_the_same(resumed: Any, whole: Any) -> None:
    """Losses, samples and weights."""
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("learning_rate", 1e-9), ("samples", 0)):
        found, expected = ([row[name] for row in run.metrics if "loss" in row] for run in (resumed, whole))
        assert found == pytest.approx(expected, rel=tolerance), name
    weights, others = (load_file(run.run / "adapter" / "adapter_model.safetensors") for run in (resumed, whole))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert weight.flatten().tolist() == pytest.approx(others[name].flatten().tolist(), rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize(
    ("options", "strategy", "processes"),
    [
        (("--strategy=model_parallel",), "model_parallel", 1),
        (("--max_devices=1",), "ddp", 1),
        (("--hardware=cpu:3",), "ddp", 3),
    ],
    ids=["split", "one-device", "three-devices"],
)
def test_replicas_go_on_otherwise(
    options: tuple[str, ...], strategy: str, processes: int, tune: Any, ddp_run: Any, tmp_path: Path
) -> None:
    run = cut_at_8(ddp_run.run, tmp_path / "copy")
    resumed = tune("resume", str(run), *options, base=False)
    assert "resuming from checkpoint-8" in resumed.out and "global batch   12 = " in resumed.out
    assert_the_same(resumed, ddp_run)
    assert (resumed.report["strategy"], resumed.report["world_size"]) == (strategy, processes)
    assert json.loads((run / "plan-to-step-8.json").read_text())["processes"] == 2
    config, plan = RunDir(run).read()
    assert (plan.strategy, plan.processes, config.global_batch_size) == (strategy, processes, 12)
    assert "until step 8: ddp with transformers: 2 processes" in (run / "report.html").read_text()


def test_a_split_goes_on_as_replicas(tune: Any, split_run: Any, tmp_path: Path) -> None:
    run = cut_at_8(split_run.run, tmp_path / "copy")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("stages: null", "stages: 2").replace("lanes: null", "lanes: 2"))
    resumed = tune("resume", str(run), "--strategy=ddp", base=False)
    assert_the_same(resumed, split_run)
    assert resumed.report["world_size"] == 2


def test_python_goes_on_with_a_run(single_run: Any, ddp_run: Any, tmp_path: Path) -> None:
    run = cut_at_8(ddp_run.run, tmp_path / "copy")
    with pytest.raises(ConfigError, match="no strategy 'dpp'"):
        parallel_tune.resume(run, strategy="dpp")
    resumed = parallel_tune.resume(run, max_devices=1)
    assert (resumed.path, resumed.plan.processes) == (run, 1)
    losses = [row["loss"] for row in resumed.metrics if "loss" in row]
    assert losses == pytest.approx([row["loss"] for row in single_run.metrics if "loss" in row], rel=1e-5)
    with pytest.raises(ConfigError, match="is finished"):
        parallel_tune.resume(resumed)


def test_the_product_of_the_first_plan_stays_the_global_batch(tune: Any, ddp_run: Any, tmp_path: Path) -> None:
    run = cut_at_8(ddp_run.run, tmp_path / "copy")
    begun = RunDir(run).read()
    config = begun[0].replace(global_batch_size=None, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    changed, plan, _ = replan.replan(config, begun[1], replan.Changes(hardware="cpu:1"))
    assert (plan.processes, plan.global_batch, changed.global_batch_size) == (1, 12, 12)
    assert (plan.engine, plan.dtype) == (begun[1].engine, begun[1].dtype) == (changed.engine, changed.dtype)


@pytest.mark.parametrize("asked", [{"stages": 2}, {"device_map": "balanced"}])
def test_a_split_that_was_asked_for_stays_one(asked: dict[str, Any], split_run: Any) -> None:
    config, plan = RunDir(split_run.run).read()
    config = config.replace(strategy="auto", **asked)
    assert replan.replan(config, plan, replan.Changes())[1].strategy == "model_parallel"
    assert replan.replan(config, plan, replan.Changes(strategy="ddp"))[1].strategy == "ddp"


def test_a_run_that_is_being_trained_keeps_its_plan(tune: Any, ddp_run: Any, tmp_path: Path) -> None:
    run = cut_at_8(ddp_run.run, tmp_path / "copy")
    before = [(run / name).read_text() for name in ("plan.json", "config.yaml")]
    with (run / "logs" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = tune.ended("resume", str(run), "--replan", base=False)
    assert refused.code == 2
    assert "another command is training" in refused.err
    assert before == [(run / name).read_text() for name in ("plan.json", "config.yaml")]
    assert not list(run.glob("plan-to-step-*"))


def test_what_does_not_fit_changes_nothing(tune: Any, ddp_run: Any, tmp_path: Path) -> None:
    run = cut_at_8(ddp_run.run, tmp_path / "copy")
    refused = tune.ended("resume", str(run), "--hardware=2xT4-16GB", base=False)
    assert refused.code == 2
    assert "the plan needs 2 GPUs and this machine has 0" in refused.err
    assert json.loads((run / "plan.json").read_text())["devices"][0]["kind"] == "cpu"


@pytest.fixture
def planned_for_two(tied_model: Path, rows_file: Path) -> Any:
    """A run's plan for two cards."""
    from parallel_tune.config import make_config

    settings = {"model": str(tied_model), "dataset": str(rows_file), "strategy": "ddp", "hardware": "2xA100-40GB"}
    config = make_config(settings)
    return decide(config, find_hardware(config))[0]


def test_a_run_whose_gpus_are_gone_says_so_at_once(
    tune: Any, ddp_run: Any, planned_for_two: Any, tmp_path: Path
) -> None:
    run = cut_at_8(ddp_run.run, tmp_path / "copy")
    (run / "plan.json").write_text(planned_for_two.to_json())
    refused = tune.ended("resume", str(run), base=False)
    assert refused.code == 2
    assert "planned for 2 GPUs (device 0 is A100-40GB), and this command sees none" in refused.err
    assert "resume" in refused.err and "--replan" in refused.err


def test_a_smaller_card_in_a_planned_ones_place_is_told(planned_for_two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from parallel_tune.hardware import parse_hardware

    def here(text: str) -> None:
        devices = parse_hardware(text).devices
        monkeypatch.setattr(replan, "probe", lambda _: Hardware(devices))

    here("2xA100-40GB")
    replan.check_still_here(planned_for_two, Path("run"))
    here("3xA100-80GB")
    replan.check_still_here(planned_for_two, Path("run"))
    here("1xA100-40GB")
    with pytest.raises(ConfigError, match=r"device 1 is A100-40GB.*this command sees 1"):
        replan.check_still_here(planned_for_two, Path("run"))
    here("1xA100-40GB+1xT4-16GB")
    with pytest.raises(ConfigError, match=r"as device 1, which is T4-16GB with 15,360 MiB here") as refused:
        replan.check_still_here(planned_for_two, Path("a run"))
    assert "resume 'a run' --replan" in refused.value.hint
