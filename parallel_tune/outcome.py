"""What a process leaves on disk of itself: its id, its log, and how it ended.

Light on purpose, and free of `strategies`: the process that runs a user's script imports this, and the script may have
a `strategies` of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

LAST_WORDS = "PARALLEL_TUNE_LAST_WORDS"
"""Environment variable: a folder on another disk, for what a process says where its own takes no more."""


@dataclass(frozen=True)
class Outcome:
    """What one process said when it ended.

    Attributes:
        code: its exit code.
        message: one line; empty if all went well.
        hint: what to do about it.
        trace: the traceback, for `--debug`.
        is_final: it is what there is to say of the run, also where a signal had asked for its end.
    """

    code: int
    message: str = ""
    hint: str = ""
    trace: str = ""
    is_final: bool = False


def log_file(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank}.log"


def outcome_file(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank}.json"


def process_id_file(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank}.pid"


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or none, also after a power cut."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def save(path: Path, outcome: Outcome) -> None:
    """Say how this process ended; where a disk does not take it, in the folder for last words."""
    text = json.dumps(asdict(outcome))
    try:
        write_atomically(path, text)
    except OSError:
        folder = os.environ.get(LAST_WORDS)
        if not folder:
            raise
        write_atomically(Path(folder) / path.name, text)


@contextlib.contextmanager
def folder_for_last_words() -> Iterator[Path | None]:
    """A folder for LAST_WORDS while the block runs, in memory where that can be; None if none can be made."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with contextlib.ExitStack() as stack:
        folder = None
        with contextlib.suppress(OSError):
            made = tempfile.TemporaryDirectory(prefix="parallel-tune-", dir=memory, ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(made))
        yield folder


def load(path: Path) -> Outcome | None:
    """What a process said, or None if it ended without a word."""
    try:
        return Outcome(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
