"""Small facts of life of a process: dying with its parent, writing to a log, leaving at once."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int | None = None) -> None:
    """Ask Linux to kill this process when its parent ends, so that nothing is orphaned, whatever killed the parent.

    Args:
        parent_pid: the expected parent; if it is gone already, this process ends now.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent_pid is not None and os.getppid() != parent_pid:
            leave(1)


def leave(code: int) -> NoReturn:
    """End at once with this code; what was written is flushed.

    A process group's threads can abort the interpreter's ordinary exit after all work is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def redirect_output(log: Path) -> None:
    """Send all that this process and its libraries print to its log file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
