"""Where trained work goes when the disk of its run takes no more: other places in a fixed order, then a wait for room.

All ranks go through this together and learn alike what was written: none waits longer in a collective than for one
attempt to write, and none ends while another still looks for a place.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from parallel_tune.cache import cache_folder
from strategies.base import Session
from strategies.errors import ConfigError, RunFailed

WAIT_SECONDS = 60.0
"""How long somebody has to make room, where no place takes what was trained."""

PAUSE_SECONDS = 5.0

PLACES: tuple[Callable[[], Path], ...] = (
    lambda: cache_folder() / "rescued",
    Path.cwd,
    lambda: Path(tempfile.gettempdir()),
)
"""Asked in this order; the system's temporary folder comes last, since the next start of the machine may empty it."""


class NotWritten(RunFailed):
    """The disk of a run did not take what was trained; it says where that lies instead, if anywhere."""


def agreed(error: RunFailed | None, session: Session) -> RunFailed | None:
    """A failure of any rank, on every rank. Every rank calls it."""
    if not session.any(error is not None):
        return None
    return error or RunFailed("another rank could not write its part", "The other ranks' logs say why.")


def write_somewhere(
    write: Callable[[Path], RunFailed | None], run: Path, num_bytes: int, session: Session
) -> tuple[Path, RunFailed | None]:
    """Write into the run's directory, else into a new folder elsewhere. Every rank calls it.

    Args:
        write: writes into the folder that it is given, and returns on all ranks alike why it could not.
        num_bytes: a place with less room is not tried.

    Returns:
        The folder that took it, and why the run's directory did not, if it is another one.

    Raises:
        NotWritten: nothing took it.
    """
    waits_until = time.monotonic() + WAIT_SECONDS
    while error := write(run):
        print(f"{error.message}; looking for another place")
        for place in PLACES:
            folder: Path | None = session.gather(_new_folder(place, run, num_bytes) if session.is_main else None)[0]
            if folder is None:
                continue
            if write(folder) is None:
                print(f"written to {folder} instead")
                return folder, error
            if session.is_main:
                shutil.rmtree(folder, ignore_errors=True)
        if session.any(time.monotonic() > waits_until):
            raise NotWritten(
                f"{error.message}, and no other place took it; what was trained since the last checkpoint is lost",
                f"{error.hint}\nTried for {WAIT_SECONDS:.0f} s: the run directory, the cache folder, the working "
                "directory and the system's temporary folder.",
            )
        print("no place has room: waiting for some")
        time.sleep(PAUSE_SECONDS)
    return run, None


def _new_folder(place: Callable[[], Path], run: Path, num_bytes: int) -> Path | None:
    """A new folder in a place, readable by its owner alone; None if it cannot be made, or has not the room."""
    try:
        parent = place()
        parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(parent).free < num_bytes:
            return None
        return Path(tempfile.mkdtemp(prefix=f"parallel-tune-rescued-{run.name}-", dir=parent)).absolute()
    except (OSError, ConfigError):  # ConfigError: there is no home folder
        return None
