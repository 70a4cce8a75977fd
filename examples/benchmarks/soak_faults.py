"""What examples/benchmarks/soak.py does to a run: each fault is a function of the command and its run directory.

It returns whether there was anything to harm: ranks come later than the command.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from parallel_tune.checkpoint import complete_checkpoints

STOPPED_SECONDS = 2.0

Fault = Callable[[subprocess.Popen[Any], Path, random.Random], bool]


def kill_rank(command: subprocess.Popen[Any], run: Path, draw: random.Random) -> bool:
    """A training process is gone, as by the kernel's out-of-memory killer."""
    return _send(_ranks(run), signal.SIGKILL, draw)


def kill_launcher(command: subprocess.Popen[Any], run: Path, draw: random.Random) -> bool:
    """What started the training processes is gone; under a split it is the training process."""
    try:
        children = [child.pid for child in psutil.Process(command.pid).children()]
    except psutil.Error:
        return False
    return _send(children, signal.SIGKILL, draw)


def kill_command(command: subprocess.Popen[Any], run: Path, draw: random.Random) -> bool:
    """The user's command is gone."""
    command.kill()
    return True


def kill_all(command: subprocess.Popen[Any], run: Path, draw: random.Random) -> bool:
    """All at once, as when a machine goes down; and the newest checkpoint lost the second half of its largest file."""
    with contextlib.suppress(psutil.Error):
        for process in [*psutil.Process(command.pid).children(recursive=True), psutil.Process(command.pid)]:
            with contextlib.suppress(psutil.Error):
                process.kill()
    command.wait()
    if newest := complete_checkpoints(run)[1:]:  # the run must keep one to go on from
        largest = max((path for path in newest[-1].iterdir() if path.is_file()), key=lambda path: path.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
    return True


def stop_rank(command: subprocess.Popen[Any], run: Path, draw: random.Random) -> bool:
    """A training process stands still for a while; all wait for it and go on."""
    ranks = _ranks(run)
    rank = draw.choice(ranks) if ranks else None
    if rank is None or not _send([rank], signal.SIGSTOP, draw):
        return False
    time.sleep(STOPPED_SECONDS)
    return _send([rank], signal.SIGCONT, draw)


def ask_to_stop(command: subprocess.Popen[Any], run: Path, draw: random.Random) -> bool:
    """A scheduler's word."""
    command.send_signal(signal.SIGTERM)
    return True


def hang_up(command: subprocess.Popen[Any], run: Path, draw: random.Random) -> bool:
    """The terminal is closed."""
    command.send_signal(signal.SIGHUP)
    return True


FAULTS: dict[str, Fault] = {
    "a rank is killed": kill_rank,
    "the launcher is killed": kill_launcher,
    "the command is killed": kill_command,
    "all are killed and a checkpoint is torn": kill_all,
    "a rank is stopped for a while": stop_rank,
    "SIGTERM": ask_to_stop,
    "SIGHUP": hang_up,
}


def _ranks(run: Path) -> list[int]:
    found = []
    for path in (run / "logs").glob("rank-*.pid"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(path.read_text()))
    return found


def _send(pids: list[int], number: signal.Signals, draw: random.Random) -> bool:
    """Signal one of them; False if there is none, or it is gone."""
    try:
        os.kill(draw.choice(pids), number)
    except (IndexError, ProcessLookupError):
        return False
    return True
