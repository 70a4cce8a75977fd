"""Training inside processes that real launchers started: one rank plans, all obey, and the losses are our own ddp's."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parallel_tune import decision, joined
from parallel_tune.config import TrainConfig, make_config
from parallel_tune.hardware import parse_hardware
from parallel_tune.refusal import find_launch
from strategies.errors import ConfigError

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0")
ACCELERATE = (
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
    "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0",
)  # fmt: skip
LAUNCHERS = {"torchrun": (*TORCHRUN, "--nproc-per-node=2"), "accelerate launch": ACCELERATE}

TWO_RANKS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launchers_two_processes_train_as_our_own(launcher: str, tune: Any, ddp_run: Any) -> None:
    run = tune(before=LAUNCHERS[launcher])
    assert run.plan["strategy"] == "ddp"
    assert run.plan["processes"] == 2
    assert run.losses == pytest.approx(ddp_run.losses, rel=1e-6)
    assert run.report["samples"] == ddp_run.report["samples"]
    # One rank speaks: the plan once, the summary once.
    assert run.out.count("run directory:") == 1
    assert run.out.count("result: ") == 1


def test_a_run_under_a_launcher_is_not_resumed_while_it_is_trained(
    tune: Any, noting: dict[str, str], tmp_path: Path
) -> None:
    command = tune.start("--strategy=noted_ddp", before=LAUNCHERS["torchrun"], env=noting | {"FAULT": "hold:0:1"})
    command.wait_for(tmp_path / "held")
    again = tune.ended("resume", str(command.run), base=False, env=noting)
    (tmp_path / "go").touch()
    assert command.wait().code == 0
    assert again.code == 2
    assert f"another command is training in {command.run}" in again.err


def test_srun_s_two_tasks_train_as_our_own(tune: Any, ddp_run: Any, tmp_path: Path) -> None:
    """What srun does: it starts each task with variables of its own."""
    port = 20_000 + os.getpid() % 10_000
    step = {"SLURM_JOB_ID": str(port - 20_000), "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
    tasks = [
        tune.start(f"--output_dir={tmp_path / 'run'}", shared_output=False, env=step | slurm_rank(rank))
        for rank in range(2)
    ]
    first, second = [task.wait() for task in tasks]
    assert (first.code, second.code) == (0, 0), f"{first.err}\n{second.err}"
    rows = type(first)(0, "", "", tmp_path / "run")
    assert rows.losses == pytest.approx(ddp_run.losses, rel=1e-6)
    assert "result: " in first.out
    assert "result: " not in second.out


def slurm_rank(rank: int) -> dict[str, str]:
    return {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}


def test_model_parallel_goes_on_alone_under_a_launcher_of_one(tune: Any, split_run: Any) -> None:
    options = ("--strategy=model_parallel", "--hardware=cpu:2")
    run = tune(*options, before=(*TORCHRUN, "--nproc-per-node=1"))
    assert "One process under torchrun: going on without it. Dropped" in run.out
    assert "LOCAL_RANK" in run.out
    assert run.losses == pytest.approx(split_run.losses, rel=1e-6)


# Each child leaves its code and message in a file: torchrun replaces exit codes and mixes outputs.
CHILD = """
import os, subprocess, sys
ended = subprocess.run([sys.executable, "-m", "parallel_tune", *sys.argv[2:]], stderr=subprocess.PIPE, text=True)
open(os.path.join(sys.argv[1], os.environ["RANK"]), "w").write(f"{ended.returncode}\\n{ended.stderr}")
"""


def under_torchrun(tmp_path: Path, env: dict[str, str], *options: str) -> list[tuple[int, str]]:
    """Exit code and stderr of each child."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    command = [*LAUNCHERS["torchrun"], str(script), str(tmp_path), *options]
    subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, timeout=240, check=False)
    said = [(tmp_path / str(rank)).read_text().partition("\n") for rank in range(2)]
    return [(int(code), text) for code, _, text in said]


def test_where_no_replica_fits_each_child_says_what_would(tmp_path: Path, environment: dict[str, str]) -> None:
    options = ("--model=unsloth/Llama-3.3-70B-Instruct", "--hardware=2xH100-80GB", "--engine=transformers")
    (code, text), (other, _) = under_torchrun(tmp_path, environment, *options)
    assert (code, other) == (3, 3)
    assert "ddp does not fit: device 0 (H100-80GB) needs" in text
    assert "model_parallel would fit" in text
    assert "without torchrun" in text
    assert not (tmp_path / "outputs").exists()


def test_more_processes_than_devices_is_refused(tmp_path: Path, environment: dict[str, str]) -> None:
    options = ("--model=unsloth/Llama-3.2-1B-Instruct", "--hardware=cpu:1")
    (code, text), (other, _) = under_torchrun(tmp_path, environment, *options)
    assert (code, other) == (2, 2)
    assert "the launcher started 2 processes and there are 1 devices" in text


def test_a_resume_by_several_processes_is_refused(tune: Any, split_run: Any) -> None:
    ended = tune.ended("resume", str(split_run.run), base=False, env=TWO_RANKS)
    assert ended.code == 2
    assert "`resume` starts the run's own" in ended.err


def test_an_error_of_the_rank_that_plans_reaches_the_others(
    rows_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They wait for its word, and it for its group's threads when it ends in the ordinary way."""

    def fails(*_: Any) -> None:
        raise ArithmeticError("a third party's fault")

    monkeypatch.setattr(joined, "plan_for", fails)
    launch = find_launch(TWO_RANKS)
    assert launch is not None
    config = make_config({"dataset": str(rows_file)})
    assert joined._decide(config, launch, contextlib.ExitStack()) == {"code": 1}
    assert "ArithmeticError: a third party's fault" in capsys.readouterr().err


class Joining(Exception):
    """A rank would join the others now."""


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[bool, dict[str, str]]]:
    """What rank 1 of two would join with: whether by NCCL, and in which environment."""
    from strategies import sessions

    def join(config: TrainConfig, gpus: str | None = None) -> tuple[bool, dict[str, str]]:
        found: list[bool] = []

        def note(cuda: bool, *_: Any) -> None:
            found.append(cuda)
            raise Joining

        environment = {name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_ORDER"}
        monkeypatch.setattr(os, "environ", environment)
        monkeypatch.setattr(sessions, "join_processes", note)
        if gpus is not None:
            monkeypatch.setattr("torch.cuda.is_available", lambda: True)
            monkeypatch.setattr(decision, "probe", lambda _: replace(parse_hardware(gpus), declared=False))
        launch = find_launch(TWO_RANKS | {"RANK": "1", "LOCAL_RANK": "1"})
        assert launch is not None
        with pytest.raises(Joining):
            joined.train_as_rank(config, launch)
        return found[0], environment

    return join


def test_a_rank_numbers_gpus_as_its_plan_does(joins: Callable[..., tuple[bool, dict[str, str]]]) -> None:
    """Where there are GPUs of several kinds, CUDA by itself would give a rank another card than it was planned for."""
    by_nccl, environment = joins(make_config({"dataset": "rows.jsonl"}), "2xH100-80GB")
    assert by_nccl
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_ranks_that_train_on_the_cpu_leave_gpus_alone(joins: Callable[..., tuple[bool, dict[str, str]]]) -> None:
    by_nccl, _ = joins(make_config({"dataset": "rows.jsonl", "hardware": "cpu:2"}), "2xH100-80GB")
    assert not by_nccl


def test_a_rank_without_a_gpu_of_its_own_says_so_before_it_joins(
    joins: Callable[..., tuple[bool, dict[str, str]]],
) -> None:
    """By itself CUDA calls the ordinal invalid, in a traceback."""
    with pytest.raises(ConfigError, match="the launcher started 2 processes and there are 1 devices"):
        joins(make_config({"dataset": "rows.jsonl"}), "1xH100-80GB")
