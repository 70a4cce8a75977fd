"""Replication and splitting are refused together, from the environment alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parallel_tune.refusal import check_settings, find_launch
from strategies.errors import ConfigError, StrategiesCombined

# As torchrun 2.13 and accelerate 1.15 were seen to set them.
TORCHRUN = {
    "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
    "MASTER_PORT": "39077", "OMP_NUM_THREADS": "1", "RANK": "1", "ROLE_NAME": "default", "ROLE_RANK": "1",
    "ROLE_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_RUN_ID": "8be38688", "WORLD_SIZE": "2",
}  # fmt: skip
ACCELERATE_ONE = {
    "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True",
    "OMP_NUM_THREADS": "1",
}  # fmt: skip
ACCELERATE_TWO = TORCHRUN | {"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_MIXED_PRECISION": "no"}
SRUN = {
    "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1",
    "SLURM_JOB_ID": "812345", "SLURM_NTASKS": "2",
}  # fmt: skip
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip
SEVERAL = {"torchrun": TORCHRUN, "accelerate launch": ACCELERATE_TWO, "srun": SRUN, "mpirun": MPIRUN}


@pytest.mark.parametrize(("launcher", "environ"), SEVERAL.items())
def test_launchers_of_several_processes(launcher: str, environ: dict[str, str]) -> None:
    launch = find_launch(environ)
    assert launch is not None
    assert (launch.launcher, launch.rank, launch.local_rank, launch.world_size) == (launcher, 1, 1, 2)
    assert set(launch.environment) == {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


@pytest.mark.parametrize(("launcher", "environ"), SEVERAL.items())
def test_a_split_under_several_processes_is_refused(launcher: str, environ: dict[str, str]) -> None:
    with pytest.raises(StrategiesCombined) as refusal:
        check_settings("model_parallel", None, find_launch(environ))
    assert refusal.value.exit_code == 4
    assert f"but {launcher} started 2 processes" in refusal.value.message
    rank = {"srun": "SLURM_PROCID=1", "mpirun": "OMPI_COMM_WORLD_RANK=1"}.get(launcher, "RANK=1")
    assert rank in refusal.value.message
    assert f"without {launcher} to split" in refusal.value.hint
    assert "--strategy ddp to replicate" in refusal.value.hint


@pytest.mark.parametrize("strategy", ["ddp", "auto", "another"])
def test_replication_under_several_processes_is_fine(strategy: str) -> None:
    check_settings(strategy, None, find_launch(TORCHRUN))


def test_auto_with_a_splitting_map_under_several_processes_is_refused() -> None:
    with pytest.raises(StrategiesCombined, match=r"--device_map balanced splits one model .* torchrun started 2"):
        check_settings("auto", "balanced", find_launch(TORCHRUN))


@pytest.mark.parametrize(
    "environ",
    [
        TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
        ACCELERATE_ONE,
    ],
    ids=["torchrun", "accelerate launch"],
)
def test_one_process_goes_on_without_the_variables(environ: dict[str, str]) -> None:
    launch = find_launch(environ)
    assert launch is not None
    assert launch.world_size == 1
    check_settings("model_parallel", None, launch)
    left = {name: value for name, value in environ.items() if name not in launch.variables}
    assert left == {"OMP_NUM_THREADS": "1"}
    assert find_launch(left) is None
    for name in launch.variables:
        assert name in launch.dropping


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
        {"ACCELERATE_LOG_LEVEL": "info"},
        # An sbatch batch step, and an interactive srun of one task.
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    ],
    ids=["nothing", "an address", "a log level", "sbatch", "srun of one"],
)
def test_a_plain_command_has_no_launch(environ: dict[str, str]) -> None:
    assert find_launch(environ) is None


@pytest.mark.parametrize(
    ("environ", "named", "missing"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2", "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0", "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK=0", "MASTER_ADDR, MASTER_PORT"),
        ({k: v for k, v in TORCHRUN.items() if k != "RANK"}, "WORLD_SIZE=2", "missing: RANK."),
        (TORCHRUN | {"MASTER_PORT": ""}, "MASTER_ADDR=localhost", "missing: MASTER_PORT."),
        (SRUN | {"SLURM_STEP_NUM_NODES": "2"}, "SLURM_PROCID=1", "MASTER_ADDR, MASTER_PORT"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_LOCALID"}, "SLURM_STEP_NUM_TASKS=2", "SLURM_LOCALID"),
    ],
)
def test_an_incomplete_set_is_refused_by_name(environ: dict[str, str], named: str, missing: str) -> None:
    with pytest.raises(ConfigError, match="wait for ever") as refusal:
        find_launch(environ)
    assert named in refusal.value.message
    assert missing in refusal.value.message


def test_accelerate_on_a_cpu_that_started_one_of_two() -> None:
    environ = ACCELERATE_ONE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    with pytest.raises(ConfigError, match="ACCELERATE_USE_CPU=True; missing: RANK, LOCAL_RANK, WORLD_SIZE") as refusal:
        find_launch(environ)
    assert "--multi_gpu" in refusal.value.hint


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RANK": "5"}, "contradict each other: RANK=5, LOCAL_RANK=1, WORLD_SIZE=2"),
        ({"RANK": "0"}, "contradict each other"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a number"),
        ({"RANK": "-1"}, "RANK='-1' is not a number"),
    ],
)
def test_a_contradictory_set_is_refused(changed: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_launch(TORCHRUN | changed)


def test_variables_left_from_elsewhere_are_refused_under_srun() -> None:
    with pytest.raises(ConfigError, match="also has WORLD_SIZE=4, left from elsewhere") as refusal:
        find_launch(SRUN | {"WORLD_SIZE": "4"})
    assert refusal.value.hint == "unset WORLD_SIZE"


def test_srun_of_one_node_finds_itself_and_torchrun_inside_srun_wins() -> None:
    launch = find_launch(SRUN)
    assert launch is not None
    assert launch.environment["MASTER_ADDR"] == "127.0.0.1"
    assert 20_000 <= int(launch.environment["MASTER_PORT"]) < 40_000
    inside = find_launch(SRUN | TORCHRUN)
    assert inside is not None
    assert inside.launcher == "torchrun"


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharding_by_accelerate_is_refused(variable: str) -> None:
    with pytest.raises(StrategiesCombined, match=f"{variable}=true"):
        find_launch(ACCELERATE_TWO | {variable: "true"})
    assert find_launch(ACCELERATE_TWO | {variable: "false"}) is not None


@pytest.mark.parametrize("word", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_ddp_with_a_splitting_map_is_refused(word: str) -> None:
    with pytest.raises(StrategiesCombined, match=f"--device_map {word} asks to split") as refusal:
        check_settings("ddp", word)
    assert "Leave out --device_map" in refusal.value.hint
    assert "--strategy model_parallel" in refusal.value.hint
    check_settings("model_parallel", word)
    check_settings("auto", word)


@pytest.mark.parametrize(
    ("device_map", "refused"),
    [
        ({"model.layers.0": 0, "model.layers.1": 1}, True),
        ({"model": "cuda:0", "lm_head": "cpu"}, True),
        ({"": 0}, False),
        ({"model": 0, "lm_head": "cuda:0", "x": "cuda"}, False),
    ],
)
def test_ddp_with_a_map_file(tmp_path: Path, device_map: dict[str, int | str], refused: bool) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps(device_map))
    if refused:
        with pytest.raises(StrategiesCombined):
            check_settings("ddp", str(path))
    else:
        check_settings("ddp", str(path))


def test_a_map_that_is_no_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="no_such_map"):
        check_settings("ddp", "no_such_map.json")
