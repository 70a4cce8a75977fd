"""What a process leaves on disk of itself: its id, its log, and how it ended.

Light on purpose, and free of `strategies`: the process that runs a user's script imports this, and the script may have
a `strategies` of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """What one process said when it ended.

    Attributes:
        code: its exit code.
        message: one line; empty if all went well.
        hint: what to do about it.
        trace: the traceback, for `--debug`.
    """

    code: int
    message: str = ""
    hint: str = ""
    trace: str = ""


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
    """Say how this process ended."""
    write_atomically(path, json.dumps(asdict(outcome)))


def load(path: Path) -> Outcome | None:
    """What a process said, or None if it ended without a word."""
    try:
        return Outcome(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
