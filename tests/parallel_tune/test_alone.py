"""One command at a time trains in a run directory, and what another one is told."""

from __future__ import annotations

import errno
import fcntl
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest

from parallel_tune import alone as alone_module
from parallel_tune.alone import alone
from parallel_tune.checkpoint import mark_complete
from parallel_tune.rundir import RunDir
from strategies.errors import ConfigError


@pytest.fixture
def unfinished(single_run: Any, tmp_path: Path) -> Path:
    """A run without its result and without a checkpoint."""
    run = Path(shutil.copytree(single_run.run, tmp_path / "run"))
    shutil.rmtree(run / "adapter")
    return run


def test_a_second_one_is_told_that_the_run_is_trained_before_its_first_checkpoint(tune: Any, unfinished: Path) -> None:
    with (unfinished / "logs" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = tune.ended("resume", str(unfinished), base=False)
    assert ended.code == 2
    assert f"another command is training in {unfinished}" in ended.err
    assert tune.ended("resume", str(unfinished), base=False).err.startswith(
        f"parallel-tune: {unfinished} has no complete checkpoint to go on from"
    )


def test_a_run_directory_that_cannot_be_written_is_named(tune: Any, unfinished: Path) -> None:
    (unfinished / "checkpoint-2").mkdir()
    mark_complete(unfinished / "checkpoint-2")
    shutil.rmtree(unfinished / "logs")
    (unfinished / "logs").write_text("in the way")
    ended = tune.ended("resume", str(unfinished), base=False)
    assert ended.code == 2
    assert f"cannot write into {unfinished}: File exists" in ended.err
    assert "Traceback" not in ended.err


def test_logs_that_are_gone_are_made_anew(tmp_path: Path) -> None:
    with alone(RunDir(tmp_path)), pytest.raises(ConfigError, match="another command"), alone(RunDir(tmp_path)):
        pass
    assert (tmp_path / "logs").is_dir()


def test_a_file_system_without_locks_is_no_reason_not_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lustre, say, as it is mounted without them."""

    def no_locks(*_: object) -> NoReturn:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(alone_module.fcntl, "flock", no_locks)
    with alone(RunDir(tmp_path)):
        pass
    assert f"{tmp_path} cannot be locked (Function not implemented)" in capsys.readouterr().err
