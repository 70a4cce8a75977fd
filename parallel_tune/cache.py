"""The user's cache folder, and small JSON files in it that several processes may read and write at once."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel_tune.outcome import write_atomically
from strategies.errors import ConfigError


def cache_folder() -> Path:
    """Where parallel-tune keeps what it need not find out twice.

    Raises:
        ConfigError: there is no home folder, as for a container's user that no list of users names.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser() / "parallel-tune"
    except RuntimeError as error:
        raise ConfigError(
            f"there is no home folder in which the cache {base} could lie",
            "Set HOME or XDG_CACHE_HOME to a folder that can be written.",
        ) from error


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no file, or nothing in it that can be read as one."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return loaded if isinstance(loaded, dict) else None


def write_object(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object so that a reader sees all of it or none.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def append_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add JSON objects to a file, a line each; several processes may do so at once.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        # A writer that was killed may have left half a line: it ends here.
        file.write(b"\n" + text.encode() if _ends_amid_a_line(path) else text.encode())
        file.flush()
        os.fsync(file.fileno())


def _ends_amid_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
