"""One command at a time trains in a run directory."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator

import click

from parallel_tune.rundir import RunDir
from strategies.errors import ConfigError


@contextlib.contextmanager
def alone(run: RunDir) -> Iterator[None]:
    """Hold the run's lock while the block runs; it goes with the process, however that ends.

    Raises:
        ConfigError: another command holds it, or the run directory cannot be written.
    """
    try:
        run.logs.mkdir(exist_ok=True)
        lock = run.logs.joinpath("lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"cannot write into {run.path}: {error.strerror} ({error.filename})",
            "Make it writable, or copy the run to where you may write.",
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another command is training in {run.path}", "Wait for its end, or stop it first."
            ) from error
        except OSError as error:
            # Some network file systems know no locks; they are no reason not to train.
            click.echo(f"{run.path} cannot be locked ({error.strerror}): let no other command train in it", err=True)
        yield
