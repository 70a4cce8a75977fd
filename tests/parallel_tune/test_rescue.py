"""What was trained outlives a disk that takes no more: it lies elsewhere or waits for room, and is told of."""

from __future__ import annotations

import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from started_commands import Command, Ended, Once, clean_environment
from transformers import TrainerState

from parallel_tune import rescue
from parallel_tune.callbacks import MetricsWriter
from parallel_tune.checkpoint import mark_complete, remove_unfinished
from parallel_tune.checkpoint_writer import CheckpointWriter
from parallel_tune.rescue import NotWritten, write_somewhere
from parallel_tune.rundir import RunDir, read_metrics
from strategies.errors import RunFailed

DDP = ("--strategy=ddp", "--hardware=cpu:2")
SPLIT = ("--strategy=model_parallel", "--hardware=cpu:2")
SINGLE = ("--strategy=ddp", "--hardware=cpu:1")


class Alone:
    """The session of a run of one process."""

    is_main = True

    def any(self, flag: bool) -> bool:
        return flag

    def barrier(self) -> None:
        """There is nobody to wait for."""

    def gather(self, value: Any) -> list[Any]:
        return [value]


class Disk:
    """Writes a file, but not below folders that are full."""

    def __init__(self, *full: Path) -> None:
        self.full = list(full)
        self.asked: list[Path] = []

    def write(self, folder: Path) -> RunFailed | None:
        self.asked.append(folder)
        if any(folder.is_relative_to(full) for full in self.full):
            return RunFailed(f"{folder} could not be written: No space left on device")
        (folder / "weights").write_bytes(b"trained")
        return None


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The run's directory, the cache folder's place, the working directory, the temporary folder; nobody waits."""
    run, cache, here, temporary = [tmp_path / name for name in ("run", "cache", "here", "temporary")]
    for folder in (run, here, temporary):
        folder.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.chdir(here)
    monkeypatch.setattr(rescue.tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(rescue, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(rescue, "WAIT_SECONDS", 0.0)
    return [run, cache / "parallel-tune" / "rescued", here, temporary]


def test_a_disk_with_room_is_used(places: list[Path]) -> None:
    run = places[0]
    assert write_somewhere(Disk().write, run, 1, Alone()) == (run, None)  # type: ignore[arg-type]
    assert (run / "weights").exists()
    assert not places[1].exists()


@pytest.mark.parametrize("full", [1, 2, 3])
def test_places_are_tried_in_order_and_nothing_torn_is_left(full: int, places: list[Path]) -> None:
    run = places[0]
    folder, error = write_somewhere(Disk(*places[:full]).write, run, 1, Alone())  # type: ignore[arg-type]
    assert error is not None and "No space left" in error.message
    assert folder.parent == places[full]
    assert folder.name.startswith("parallel-tune-rescued-run-")
    assert (folder / "weights").read_bytes() == b"trained"
    assert folder.stat().st_mode & 0o77 == 0
    assert [list(place.iterdir()) for place in places[:full]] == [[]] * full


def test_a_place_without_the_room_is_not_tried(places: list[Path]) -> None:
    disk = Disk(places[0])
    with pytest.raises(NotWritten):
        write_somewhere(disk.write, places[0], 2**70, Alone())  # type: ignore[arg-type]
    assert set(disk.asked) == {places[0]}


def test_what_nothing_takes_is_said_to_be_lost(places: list[Path]) -> None:
    with pytest.raises(NotWritten, match="No space left on device, and no other place took it") as caught:
        write_somewhere(Disk(places[0].parent).write, places[0], 1, Alone())  # type: ignore[arg-type]
    assert "the cache folder, the working directory and" in caught.value.hint


def test_room_that_is_made_meanwhile_is_used(places: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescue, "WAIT_SECONDS", 60.0)
    disk = Disk(places[0].parent)
    monkeypatch.setattr(rescue.time, "sleep", lambda _: disk.full.clear())
    assert write_somewhere(disk.write, places[0], 1, Alone()) == (places[0], None)  # type: ignore[arg-type]


def test_an_evaluation_whose_checkpoint_is_missing_is_not_the_best(tmp_path: Path) -> None:
    writer = CheckpointWriter(Alone(), None, lambda: False)  # type: ignore[arg-type]
    state = TrainerState(global_step=4, best_metric=2.0, best_global_step=2, best_model_checkpoint="checkpoint-2")
    writer.remember_best(state)
    state.best_metric, state.best_global_step = 1.0, 4

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    writer.save(state, tmp_path, full, [], best_stays=True)
    assert writer.missed == [4]
    assert (state.best_metric, state.best_global_step, state.best_model_checkpoint) == (2.0, 2, "checkpoint-2")


def test_what_a_killed_process_left_of_a_checkpoint_is_removed(tmp_path: Path) -> None:
    """Only that: another's folder of such a name has no mark either."""
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
    mark_complete(tmp_path / "checkpoint-2")

    def write(folder: Path) -> None:
        (folder / "checkpoint-4" / "weights").write_bytes(b"torn")
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        CheckpointWriter(Alone(), None, lambda: False).save(  # type: ignore[arg-type]
            TrainerState(global_step=4), tmp_path, write, [], best_stays=False
        )
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / "checkpoint-4" / "weights").exists()
    assert remove_unfinished(tmp_path) == ["checkpoint-4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_one_just_written_does_not_go_before_a_damaged_one_of_a_later_step(tmp_path: Path) -> None:
    """The run went on from its best checkpoint, since the last one was damaged, and was stopped before that step."""
    run = tmp_path / "run"
    for step in (2, 8):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        mark_complete(run / f"checkpoint-{step}")
    writer = CheckpointWriter(Alone(), 1, lambda: True)  # type: ignore[arg-type]
    state = TrainerState(global_step=5, best_global_step=2, best_model_checkpoint=str(run / "checkpoint-2"))

    def write(folder: Path) -> None:
        (folder / "checkpoint-5" / "weights").write_bytes(b"trained")

    writer.save(state, run, write, [], best_stays=True)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-2", "checkpoint-5", "checkpoint-8"]


def test_rows_that_a_full_disk_did_not_take_come_when_it_has_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path)
    run.metrics.symlink_to("/dev/full")
    writer = MetricsWriter(run, None, Alone())  # type: ignore[arg-type]
    for step in (1, 2):
        writer._write({"step": step, "eval_loss": 1.0})
    assert "training goes on" in capsys.readouterr().out
    run.metrics.unlink()
    writer._write({"step": 3, "eval_loss": 1.0})
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3]
    run.metrics.unlink()
    tmp_path.rename(tmp_path.with_name("moved"))
    with pytest.raises(FileNotFoundError):
        writer._write({"step": 4, "eval_loss": 1.0})


def blocked(tune: Any, name: str, *taken: str) -> Path:
    """A run directory in which folders of these names cannot be made."""
    run: Path = tune.folder / name / "run"
    run.mkdir(parents=True)
    for name in taken:
        (run / name).symlink_to("/dev/full")
    return run


def start(tune: Any, run: Path, *options: str, env: dict[str, str] | None = None, **how: Any) -> Command:
    environment = {**(env or {}), "XDG_CACHE_HOME": str(run.parent)}
    command: Command = tune.start(*tune.base, f"--output_dir={run}", *options, base=False, env=environment, **how)
    command.run = run
    return command


def follow_the_hint(ended: Ended, env: dict[str, str] | None = None) -> None:
    """Run the commands that the error names."""
    hint = re.search(r"Make room, then (.*)", ended.err)
    assert hint is not None
    for words in re.findall(r"`(.+?)`", hint[1]):
        command = shlex.split(words)
        if command[0] == "parallel-tune":
            command = [sys.executable, "-m", *command]
            command[2] = "parallel_tune"
        subprocess.run(command, check=True, timeout=240, env=clean_environment() | (env or {}))


@pytest.mark.parametrize("options", [DDP, SPLIT], ids=["ddp", "split"])
def test_a_result_that_its_run_cannot_take_lies_elsewhere(options: tuple[str, ...], tune: Any, request: Any) -> None:
    run = blocked(tune, request.node.callspec.id, ".adapter.part")
    ended = start(tune, run, *options, "--max_steps=2").wait()
    assert ended.code == 1
    assert "training is done, but" in ended.err
    where = re.search(r"the result lies in (\S+)", ended.err)
    assert where is not None
    assert Path(where[1]).is_relative_to(run.parent / "parallel-tune" / "rescued")
    assert load_file(Path(where[1]) / "adapter_model.safetensors")
    (run / ".adapter.part").unlink()
    follow_the_hint(ended)
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert (run / "adapter" / "tokenizer.json").exists()
    command = [sys.executable, "-m", "parallel_tune", "export", str(run), "--save_path", str(run / "exported")]
    subprocess.run(command, check=True, timeout=240, env=clean_environment())
    assert (run / "exported" / "adapter_model.safetensors").exists()


def test_a_rank_under_torchrun_says_where_the_result_lies(tune: Any) -> None:
    run = blocked(tune, "torchrun", ".adapter.part")
    rendezvous = ("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0")
    before = (sys.executable, "-m", "torch.distributed.run", *rendezvous, "--nproc-per-node=2")
    ended = start(tune, run, "--max_steps=2", before=before).wait()
    assert ended.code == 1
    where = re.search(r"the result lies in (\S+)", ended.err)
    assert where is not None
    assert load_file(Path(where[1]) / "adapter_model.safetensors")


@pytest.mark.parametrize(("strategy", "whole"), [("noted_ddp", "ddp_run"), ("noted_split", "split_run")])
def test_a_last_checkpoint_that_its_run_cannot_take_lies_elsewhere(
    strategy: str, whole: str, tune: Any, noting: dict[str, str], tmp_path: Path, request: Any
) -> None:
    run = blocked(tune, f"stopped-{strategy}", *(f"checkpoint-{step}" for step in range(1, 11)))
    command = start(tune, run, f"--strategy={strategy}", "--hardware=cpu:2", env=noting | {"FAULT": "hold:0:8"})
    command.wait_for(tmp_path / "held")
    command.send(signal.SIGTERM)
    command.wait_for_word("stopping after this step")
    (tmp_path / "go").touch()
    ended = command.wait()
    assert ended.code == 1
    assert re.search(r"stopped by a signal after step .* so checkpoint-\d+ lies in ", ended.err)
    for link in run.glob("checkpoint-*"):
        link.unlink()
    follow_the_hint(ended, noting)
    assert ended.losses == pytest.approx(request.getfixturevalue(whole).losses, abs=1e-5)
    assert ended.report["steps"] == 10


@pytest.fixture(scope="module")
def limited_ddp(tune: Any, single_run: Ended, third_party: Path, once: Once) -> Ended:
    """A run of ddp in which no file may be much larger than the adapter's, then, after its checkpoint, not even so
    large, wherever it lies, until somebody lifts that limit."""

    def run() -> Ended:
        size = (single_run.run / "adapter" / "adapter_model.safetensors").stat().st_size
        notes = tune.folder / "limited"
        notes.mkdir()
        env = {"PYTHONPATH": str(third_party), "NOTES": str(notes), "FAULT": "hold:0:7"}  # in its third step
        limited = ("prlimit", f"--fsize={size * 3 // 2}:unlimited", sys.executable)
        options = ("--strategy=noted_ddp", "--hardware=cpu:2", "--max_steps=3", "--save_steps=2")
        command = tune.start(*options, before=limited, env=env)
        command.wait_for(notes / "held")
        limit_files(command.run, size // 2)
        (notes / "go").touch()
        log = command.run / "logs" / "rank-0.log"
        command.wait_until(lambda: "waiting for some" in log.read_text(), "waiting for some")
        limit_files(command.run, resource.RLIM_INFINITY)
        ended: Ended = command.wait()
        return ended

    return once("limited_ddp", run)


def limit_files(run: Path, size: int) -> None:
    """From now on the two ranks write no larger files."""
    for rank in range(2):
        pid = int((run / "logs" / f"rank-{rank}.pid").read_text())
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.fixture
def limited_split(tune: Any, single_run: Ended) -> Ended:
    """A run of model_parallel in which no file may be much larger than the adapter's."""
    room = (single_run.run / "adapter" / "adapter_model.safetensors").stat().st_size * 3 // 2
    ended: Ended = tune(
        *SPLIT, "--max_steps=3", "--save_steps=2", before=("prlimit", f"--fsize={room}", sys.executable)
    )
    return ended


@pytest.mark.parametrize("limited", ["limited_ddp", "limited_split"])
def test_a_run_goes_on_without_a_checkpoint_that_cannot_be_written(limited: str, request: Any) -> None:
    """The adapter's file has room, the optimizer's has not."""
    ended = request.getfixturevalue(limited)
    assert ended.code == 0, ended.err
    assert "checkpoints that could not be written: of step 2" in ended.out
    assert "checkpoint-2 could not be written" in (ended.run / "logs" / "rank-0.log").read_text()
    assert "training goes on without it" in (ended.run / "logs" / "rank-0.log").read_text()
    assert not (ended.run / "checkpoint-2").exists()
    assert len(ended.losses) == 3


def test_a_result_waits_for_room(limited_ddp: Ended) -> None:
    assert limited_ddp.code == 0
    assert load_file(limited_ddp.run / "adapter" / "adapter_model.safetensors")
    assert len(limited_ddp.losses) == 3


DISK_BYTES = 2 << 20


def small_disk(folder: Path) -> tuple[str, ...]:
    """What runs a command with a small disk mounted at a folder, for it alone."""
    mount = f'mount -t tmpfs -o size={DISK_BYTES} none "$0" && exec "$@"'
    before = ("unshare", "--map-root-user", "--mount", "sh", "-c", mount, str(folder))
    try:
        subprocess.run([*before, "true"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a disk")
    return (*before, sys.executable)


@pytest.mark.parametrize("options", [DDP, SPLIT], ids=["ddp", "split"])
def test_a_run_whose_disk_fills_up_goes_on_and_its_result_lies_elsewhere(
    options: tuple[str, ...], tune: Any, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = start(tune, disk / "run", *options, "--num_train_epochs=4", before=small_disk(disk))
    inside = Path(f"/proc/{command.process.pid}/root{disk}")
    command.wait_for(inside / "run" / "metrics.jsonl")
    with (inside / "filling").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        file.write(bytes(DISK_BYTES))  # in one go, so that nobody sees the disk filling
        while True:
            file.write(bytes(512))
    ended = command.wait()
    assert ended.code == 1
    assert f"the disk of {disk / 'run'} is full: 0.0 MiB are free; training goes on" in ended.out
    where = re.search(r"the result lies in (\S+)", ended.err)
    assert where is not None and "No space left on device" in ended.err
    assert load_file(Path(where[1]) / "adapter_model.safetensors")
