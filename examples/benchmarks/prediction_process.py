"""Commands of the prediction benchmark: each leads a process group that is ended with all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time

from children import bound, end

POLL_SECONDS = 0.1
LAST_WORDS_SECONDS = 10


class Ended(Exception):
    """The benchmark is over; the command was ended before its time."""


def environment(gpu: str, cache: str) -> dict[str, str]:
    """Of a command that sees one card, by its UUID, and keeps what it learns in a cache folder of its own."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "XDG_CACHE_HOME": cache}


def start(command: list[str], variables: dict[str, str]) -> subprocess.Popen[str]:
    """Start a command as the leader of a session; its output is for `outcome`."""
    return subprocess.Popen(
        bound(command),
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def outcome(process: subprocess.Popen[str], limit_seconds: float, over: threading.Event) -> tuple[int, str]:
    """Exit code and output of a command, which is ended, with its group, when it takes too long.

    Raises:
        Ended: `over` was set; the group is ended.
    """
    deadline = time.monotonic() + limit_seconds
    try:
        while True:
            try:
                output, _ = process.communicate(timeout=POLL_SECONDS)
                return process.returncode, output
            except subprocess.TimeoutExpired:
                if over.is_set():
                    raise Ended from None
                if time.monotonic() >= deadline:
                    return -signal.SIGKILL, f"{_kill(process)}\nended after {limit_seconds:g} s"
    except BaseException:
        _kill(process)
        raise


def _kill(process: subprocess.Popen[str]) -> str:
    if process.poll() is None:
        end(process)
    try:
        return process.communicate(timeout=LAST_WORDS_SECONDS)[0]
    except subprocess.TimeoutExpired:  # who else holds the pipe must not hold up the rest
        return ""
