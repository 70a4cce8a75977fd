"""Commands that a benchmark starts: each ends with the benchmark, whatever ends that, and with all that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil

BOUND = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"
"""Asks Linux to kill this process when its parent ends (PR_SET_PDEATHSIG), and becomes the command."""


def bound(command: Sequence[str]) -> list[str]:
    """The command, which will not outlive whoever starts it: a run that went on would disturb what is measured next."""
    return [sys.executable, "-I", "-S", "-c", BOUND, *command] if sys.platform == "linux" else list(command)


def end(process: subprocess.Popen[Any]) -> None:
    """Kill a command that leads a session, and all that descends from it: torchrun's ranks lead their own sessions."""
    descendants: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        descendants = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for descendant in descendants:
        with contextlib.suppress(psutil.Error):
            descendant.kill()


def naming(run: Path) -> list[int]:
    """Processes that still name the run in their command line."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])  # a zombie has none
        if any(str(run) in word for word in process.info["cmdline"] or [])
    ]


def end_orderly() -> None:
    """Let SIGTERM, as `timeout` sends it, be an interrupt: commands under way are ended, and folders removed."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(_number: int, _frame: Any) -> NoReturn:
    raise KeyboardInterrupt
