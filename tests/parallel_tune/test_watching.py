"""How the processes of a run are watched, by small ones that do not train."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from started_commands import finding_processes

from parallel_tune import watcher
from parallel_tune.launch import LaunchSpec
from parallel_tune.rundir import RunDir
from parallel_tune.watcher import Watcher
from strategies.errors import RunFailed, Stopped

WORKER = """
import json, os, pathlib, signal, sys, time
logs = pathlib.Path(sys.argv[1]) / "logs"

def stop(*_):
    (logs / "part").write_text(json.dumps({"code": 75, "message": "its checkpoint is written"}))
    (logs / "part").rename(logs / "rank-0.json")
    os._exit(75)

signal.signal(signal.SIGTERM, stop)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
(logs / "part").write_text(str(os.getpid()))
(logs / "part").rename(logs / "rank-0.pid")
time.sleep(600)
"""


@pytest.fixture
def spec(tmp_path: Path) -> LaunchSpec:
    """A process that says that it wrote a checkpoint when it is asked to stop."""
    (tmp_path / "logs").mkdir()
    return LaunchSpec((sys.executable, "-c", WORKER, str(tmp_path)), {})


def test_an_interruption_amid_the_start_leaves_nothing_running(
    spec: LaunchSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a notebook the process that would take all along with it goes on."""

    def interrupt() -> None:
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(0.5)

    monkeypatch.setattr(watcher, "begin_watched", interrupt)
    with finding_processes() as alive:
        with pytest.raises(BaseException) as caught:  # a KeyboardInterrupt would end all tests
            Watcher(1, RunDir(tmp_path), spec, lambda: None).run()
        assert isinstance(caught.value, RunFailed)
        assert not alive(tmp_path)


def test_a_process_whose_id_s_file_is_gone_is_asked_to_stop(spec: LaunchSpec, tmp_path: Path) -> None:
    """Somebody cleared up the logs of a run that was still trained: at a signal it was killed, checkpoint or not."""
    pid_file = tmp_path / "logs" / "rank-0.pid"
    seen = 0

    def clear_up() -> None:
        nonlocal seen
        seen += pid_file.exists()
        if seen == 3:
            seen += 1
            pid_file.unlink()
            os.kill(os.getpid(), signal.SIGTERM)

    with finding_processes() as alive:
        with pytest.raises(Stopped, match="its checkpoint is written"):
            Watcher(1, RunDir(tmp_path), spec, clear_up).run()
        assert not alive(tmp_path)
