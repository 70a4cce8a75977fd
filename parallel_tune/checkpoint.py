"""Checkpoints that can be trusted: marked when complete, resumed only then, old ones deleted only after."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from pathlib import Path

from parallel_tune.rundir import write_atomically

MARK = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def mark_complete(checkpoint: Path) -> None:
    """Flush every file to disk and write the mark that lists them with their sizes and checksums.

    The file of training arguments is removed first: it would hold a Hub token in clear, and nothing reads it.
    """
    (checkpoint / "training_args.bin").unlink(missing_ok=True)
    sizes: dict[str, int] = {}
    checksums: dict[str, int] = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != MARK:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sizes[str(path.relative_to(checkpoint))] = path.stat().st_size
            checksums[str(path.relative_to(checkpoint))] = checksum(path)
    write_atomically(checkpoint / MARK, json.dumps({"bytes": sizes, "crc32": checksums}, indent=1))


def checksum(path: Path) -> int:
    """CRC-32 of a file: finds every flipped bit, at the speed of the disk."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            found = zlib.crc32(block, found)
    return found


def damaged_file(checkpoint: Path) -> str | None:
    """The first file of a complete checkpoint that is not what was written; None if all are. Reads all of them."""
    mark = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))
    for name, expected in mark.get("crc32", {}).items():
        if checksum(checkpoint / name) != expected:
            return str(name)
    return None


def is_complete(checkpoint: Path) -> bool:
    """Whether the mark is there and every file that it lists has its size."""
    try:
        sizes = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))["bytes"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def complete_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found: list[tuple[int, Path]] = []
    for path in run.glob("checkpoint-*"):
        match = _NAME.fullmatch(path.name)
        if match and is_complete(path):
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def rotate(run: Path, keep: int | None, best: Path | None = None) -> None:
    """Delete the oldest complete checkpoints so that `keep` are left; anything else is not touched.

    The newest and the best one stay, even where only one is to be kept.
    """
    if keep is None:
        return
    complete = complete_checkpoints(run)
    old = [path for path in complete[:-1] if best is None or path.resolve() != best.resolve()]
    for path in old[: max(0, len(complete) - keep)]:
        shutil.rmtree(path)
