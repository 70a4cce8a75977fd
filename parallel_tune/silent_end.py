"""Why a rank may have ended without a word of its own, by what it left in its log."""

from __future__ import annotations

from pathlib import Path

NCCL_GAVE_UP = b"Watchdog caught collective operation timeout"
"""What torch's watchdog of NCCL writes before it aborts the process."""


def log_size(log: Path) -> int:
    """Bytes of a log that earlier processes have left."""
    return log.stat().st_size if log.exists() else 0


def why_silent(log: Path, begin: int) -> str:
    """The likely reason, for a message.

    Args:
        begin: where in the log this process began.
    """
    try:
        with log.open("rb") as file:
            file.seek(begin)
            gave_up = any(NCCL_GAVE_UP in line for line in file)
    except OSError:
        gave_up = False
    if gave_up:
        return "NCCL ended it, since another rank did not come to a collective within --ddp_timeout"
    return "killed from outside, or out of host memory"
