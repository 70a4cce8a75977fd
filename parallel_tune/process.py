"""Small facts of life of a process: imports, dying with its parent, writing to a log, leaving at once."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import io
import os
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

WATCHER = "PARALLEL_TUNE_WATCHER"
"""Environment variable: process id of the command that watches over a worker."""

_PR_SET_PDEATHSIG = 1


def die_with_parent(watcher_pid: int | None = None) -> None:
    """Ask Linux to kill this process when its parent ends, so that nothing is orphaned, whatever killed the parent.

    Args:
        watcher_pid: the expected parent or grandparent; if it or what stands between is gone already, this process
            ends now.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if watcher_pid is not None and watcher_pid not in (os.getppid(), _parent_of(os.getppid())):
            leave(1)


def begin_watched() -> None:
    """The first thing that a process does which `watcher.Watcher` starts, before it becomes the worker or torchrun.

    SIGTERM waits until a worker takes it. torchrun never does: where all processes are sent one, as by `systemctl stop`
    or `scancel`, it would kill a worker half a minute later, in the step or checkpoint that the run is to end with.
    """
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def take_sigterm() -> None:
    """From now on SIGTERM reaches this process; one that has waited comes at once."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import libraries without garbage collections, and let later ones pass over what the libraries made.

    torch, transformers, trl and peft make more than a million objects that live as long as the process. Going through
    them again and again was a fifth of the time of their import (examples/benchmarks/imports.py). transformers and trl
    each read the metadata of all installed packages; here the second one is given what the first one read.
    """
    import importlib.metadata as metadata  # not for commands that import nothing

    gc.disable()
    read = metadata.packages_distributions
    metadata.packages_distributions = functools.cache(read)
    try:
        yield
    finally:
        metadata.packages_distributions = read
        gc.freeze()
        gc.enable()
        # The interpreter's end goes through all once more: triton's bindings complain of what is left.
        atexit.register(gc.unfreeze)


def _parent_of(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # The name in parentheses may hold anything.
    return int(stat.rpartition(")")[2].split()[1])


def leave(code: int) -> NoReturn:
    """End at once with this code; what was written is flushed.

    A process group's threads can abort the interpreter's ordinary exit after all work is done.
    """
    for stream in (sys.stdout, sys.stderr):
        # Where nobody reads any more, the code still counts.
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class _GoingOn(io.FileIO):
    """An output that drops what it cannot take: a full disk under a log must not end the work that it tells of."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def print_or_drop() -> None:
    """From now on no print of this process fails."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        raw = _GoingOn(number, "w", closefd=False)
        # Unbuffered: what another writer, a library in C say, adds comes in its order.
        own = io.TextIOWrapper(
            raw,
            encoding=stream.encoding, errors=stream.errors, line_buffering=True, write_through=True,
        )  # fmt: skip
        setattr(sys, name, own)


def drop_what_nobody_reads() -> None:
    """From now on nothing is printed on an output that is full and not read, a pager's that was left alone, say.

    In a signal's handler it lets go a print that waits for the reader: the system tries it anew where nothing waits.
    """
    for number in (1, 2):
        with contextlib.suppress(OSError):
            watched = select.poll()
            watched.register(number, select.POLLOUT)
            if not watched.poll(0):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)


def redirect_output(log: Path) -> None:
    """Send all that this process and its libraries print to its log file, as long as its disk takes it."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    print_or_drop()
