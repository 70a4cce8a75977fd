"""The command and environment of a run: decided from the plan and the environment alone."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from parallel_tune.allocator import VARIABLES, segments_grow
from parallel_tune.config import make_config
from parallel_tune.hardware import parse_hardware
from parallel_tune.launch import launch_spec
from parallel_tune.memory.lookup import load_model_facts
from parallel_tune.planning import make_plan
from parallel_tune.process import die_with_parent
from parallel_tune.progress import MetricsFollower
from parallel_tune.rundir import Outcome, RunDir, create, read_metrics, read_outcome, write_outcome
from parallel_tune.silent_end import log_size, why_silent
from parallel_tune.watcher import Watcher, has_ended
from strategies.contracts import Plan
from strategies.errors import ConfigError
from strategies.registry import load_registry

RUN = RunDir(Path("/runs/one"))


def plan(hardware: str, strategy: str = "ddp", **options: Any) -> Plan:
    config = make_config({"strategy": strategy, "model": "unsloth/Llama-3.2-1B-Instruct", **options})
    facts = load_model_facts(config.model)
    return make_plan(config, facts, "transformers", parse_hardware(hardware), load_registry())


def test_one_process_is_the_worker_itself() -> None:
    for made in (plan("1xH100-80GB"), plan("2xH100-80GB", "model_parallel")):
        spec = launch_spec(made, RUN, {}, 8)
        assert spec.argv == (sys.executable, "-m", "parallel_tune.worker", "/runs/one")


def test_several_run_on_the_loopback_and_never_restart() -> None:
    spec = launch_spec(plan("2xH100-80GB"), RUN, {}, 8, Path("/runs/one/checkpoint-4"))
    assert spec.argv[:3] == (sys.executable, "-m", "torch.distributed.run")
    assert {"--nproc-per-node=2", "--rdzv-endpoint=127.0.0.1", "--max-restarts=0"} <= set(spec.argv)
    assert spec.argv[-4:] == ("-m", "parallel_tune.worker", "/runs/one", "/runs/one/checkpoint-4")
    assert (spec.env["GLOO_SOCKET_IFNAME"], spec.env["NCCL_SOCKET_IFNAME"]) == ("lo", "lo")


def test_nothing_outside_the_arguments_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan("2xH100-80GB")
    before = launch_spec(made, RUN, {"A": "1"}, 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    environ = dict(os.environ)
    assert launch_spec(made, RUN, {"A": "1"}, 8) == before
    assert dict(os.environ) == environ
    assert not RUN.path.exists()


def test_an_outer_launchers_variables_are_dropped() -> None:
    environ = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "1", "HOME": "/root"}
    env = launch_spec(plan("1xH100-80GB"), RUN, environ, 8).env
    assert env["HOME"] == "/root"
    assert not set(env) & (set(environ) - {"HOME"})
    assert env["PYTHONSAFEPATH"] == "1"


def test_only_the_plans_devices_are_visible() -> None:
    made = plan("4xH100-80GB")
    fewer = dataclasses.replace(made, devices=(made.devices[1], made.devices[3]), processes=2)
    assert launch_spec(fewer, RUN, {}, 8).env["CUDA_VISIBLE_DEVICES"] == "1,3"
    # Where some are hidden already, the plan's numbers count the visible ones.
    assert launch_spec(fewer, RUN, {"CUDA_VISIBLE_DEVICES": "4,5,6,GPU-7"}, 8).env["CUDA_VISIBLE_DEVICES"] == "5,GPU-7"


def test_cpu_processes_share_the_cores() -> None:
    env = launch_spec(plan("cpu:2"), RUN, {}, 9).env
    assert (env["CUDA_VISIBLE_DEVICES"], env["OMP_NUM_THREADS"]) == ("", "4")
    assert launch_spec(plan("cpu:2"), RUN, {"OMP_NUM_THREADS": "1"}, 9).env["OMP_NUM_THREADS"] == "1"


def test_threads_of_a_cpu_run_sleep_while_they_wait() -> None:
    assert launch_spec(plan("cpu:1"), RUN, {}, 2).env["OMP_WAIT_POLICY"] == "PASSIVE"
    assert launch_spec(plan("cpu:1"), RUN, {"OMP_WAIT_POLICY": "ACTIVE"}, 2).env["OMP_WAIT_POLICY"] == "ACTIVE"
    assert "OMP_WAIT_POLICY" not in launch_spec(plan("1xH100-80GB"), RUN, {}, 2).env


def test_an_outcome_is_read_back_and_a_torn_one_is_none(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.logs.mkdir()
    said = Outcome(3, "what", "do", "trace")
    write_outcome(run, 1, said)
    assert read_outcome(run, 1) == said
    assert read_outcome(run, 0) is None
    run.outcome(1).write_text(run.outcome(1).read_text()[:-5])
    assert read_outcome(run, 1) is None


def test_the_last_row_of_a_step_counts_and_torn_rows_do_not(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert read_metrics(run) == []
    follower = MetricsFollower(run.metrics)
    run.metrics.write_text(
        '{"step": 2, "eval_loss": 3}\n{"step": 1, "eval_loss": 4}\n{"st\n{"step": 2, "eval_loss": 5}\n{"s'
    )
    assert read_metrics(run) == [{"step": 1, "eval_loss": 4}, {"step": 2, "eval_loss": 5}]
    assert [row["eval_loss"] for row in follower.poll()] == [3, 4, 5]


def test_a_recorded_run_finds_its_files_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}")
    config = make_config({"dataset": "rows.jsonl", "model": "unsloth/Llama-3.2-1B-Instruct"})
    made = plan("cpu:2")
    read, read_plan = create(config, made).read()
    assert read.dataset == str(tmp_path / "rows.jsonl")
    assert read.model == "unsloth/Llama-3.2-1B-Instruct"
    assert read_plan == made


def test_one_command_at_a_time_trains_in_a_run_directory(tmp_path: Path) -> None:
    import fcntl

    config = make_config({"output_dir": str(tmp_path / "run")})
    made = plan("cpu:2")
    run = create(config, made)
    with (run.logs / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        watcher = Watcher(made.processes, run, launch_spec(made, run, os.environ, 2), lambda: None)
        with pytest.raises(ConfigError, match="another command is training"):
            watcher.run()


def test_leaving_works_without_anybody_to_read(environment: dict[str, str]) -> None:
    code = "from parallel_tune.process import leave; print('x' * 9); leave(75)"
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(60) == 75


def test_a_worker_whose_watcher_is_gone_ends() -> None:
    pid = os.fork()
    if pid == 0:
        die_with_parent(os.getppid())
        die_with_parent(2**22 + 1)  # no process has this number
        os._exit(9)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 1


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": ""}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}, "max_split_size_mb:128"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, None),
        # torch looks no further than an older name, be it empty.
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, None),
        ({"PYTORCH_HIP_ALLOC_CONF": ""}, None),
        ({"WSL_DISTRO_NAME": "Ubuntu"}, None),
    ],
)
def test_the_allocators_segments_grow_unless_the_user_set_it_up(environ: dict[str, str], expected: str | None) -> None:
    env = launch_spec(plan("1xH100-80GB"), RUN, environ, 8).env
    assert env.get("PYTORCH_ALLOC_CONF") == expected
    assert segments_grow(environ) == segments_grow(env) == (expected == "expandable_segments:True")
    assert "PYTORCH_ALLOC_CONF" not in launch_spec(plan("cpu:2"), RUN, {}, 8).env


@pytest.mark.parametrize(
    ("older", "newer", "grow"),
    [
        ("max_split_size_mb:128", "expandable_segments:True", False),
        ("expandable_segments:True", "expandable_segments:False", True),
        ("", "expandable_segments:True", False),
    ],
)
def test_of_two_set_ups_torchs_own_choice_counts(older: str, newer: str, grow: bool) -> None:
    environ = {"PYTORCH_ALLOC_CONF": newer, "PYTORCH_CUDA_ALLOC_CONF": older}
    assert segments_grow(environ) is grow
    # The one that torch reads is the one that it finds wrong.
    wrong = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:1", "PYTORCH_CUDA_ALLOC_CONF": older}
    code = "import torch; torch._C._accelerator_setAllocatorSettings('max_split_size_mb:64')"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **wrong}, check=True)


def test_a_plan_counts_more_reserve_where_segments_do_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    options = {"per_device_train_batch_size": 1, "use_gradient_checkpointing": "full"}
    growing = plan("1xH100-80GB", **options).devices[0].memory.reserve_bytes
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:False")
    assert plan("1xH100-80GB", **options).devices[0].memory.reserve_bytes > 2 * growing > 0


def test_a_process_that_is_being_torn_down_counts_as_ended() -> None:
    """The driver of a GPU may take seconds for it, in which the process is no zombie yet."""
    running = Path("/proc/self/stat").read_text()
    assert not has_ended(running)
    before, _, fields = running.rpartition(")")
    state, *rest = fields.split()
    exiting = [*rest[:5], str(int(rest[5]) | 0x4), *rest[6:]]
    assert has_ended(f"{before}) {' '.join([state, *exiting])}")
    assert has_ended(f"{before}) Z {' '.join(rest)}")
    assert has_ended(f"1 (a) R (b) Z {' '.join(rest)}")


def test_a_rank_that_nccl_ended_is_not_called_killed(tmp_path: Path) -> None:
    """Logs of a resumed run go on where the earlier processes left them."""
    log = tmp_path / "rank-0.log"
    assert (log_size(log), why_silent(log, 0)) == (0, "killed from outside, or out of host memory")
    gave_up = (
        "[rank0]:[E1 ProcessGroupNCCL.cpp:690] [Rank 0] Watchdog caught collective operation timeout: WorkNCCL(...)"
    )
    log.write_text(f"loading\n{gave_up}\nterminate called\n")
    assert "another rank did not come to a collective within --ddp_timeout" in why_silent(log, 0)
    assert "killed from outside" in why_silent(log, log_size(log))
