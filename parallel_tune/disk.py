"""Whether a run's disk takes anything more."""

from __future__ import annotations

import shutil
from pathlib import Path

LEAST_FREE_BYTES = 2**20
"""With less room than this on its disk, a process that ended without a word could not write one."""


def full_disk(path: Path) -> str:
    """What to say where the disk of a run is full; empty if it is not, or cannot be asked."""
    try:
        free = shutil.disk_usage(path).free
    except OSError:
        return ""
    return f"the disk of {path} is full: {free / 2**20:.1f} MiB are free" if free < LEAST_FREE_BYTES else ""
