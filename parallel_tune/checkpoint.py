"""Checkpoints that can be trusted: marked when complete, resumed only then, old ones deleted only after."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from parallel_tune.reporting.axes import size
from parallel_tune.rundir import write_atomically
from strategies.errors import ConfigError, RunFailed

MARK = "complete.json"
UNFINISHED = "unfinished"
"""A file in a checkpoint that is being written, or deleted: unless it is complete, it is ours to remove."""

_NAME = re.compile(r"checkpoint-(\d+)")


def begin(checkpoint: Path) -> None:
    """Make the folder of a checkpoint that is about to be written."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / UNFINISHED).touch()


def mark_complete(checkpoint: Path) -> None:
    """Flush every file to disk and write the mark that lists them with their sizes and checksums.

    The file of training arguments is removed first: it would hold a Hub token in clear, and nothing reads it.
    """
    (checkpoint / "training_args.bin").unlink(missing_ok=True)
    sizes: dict[str, int] = {}
    checksums: dict[str, int] = {}
    flush_to_disk(checkpoint)
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name not in (MARK, UNFINISHED):
            sizes[str(path.relative_to(checkpoint))] = path.stat().st_size
            checksums[str(path.relative_to(checkpoint))] = checksum(path)
    write_atomically(checkpoint / MARK, json.dumps({"bytes": sizes, "crc32": checksums}, indent=1))
    with contextlib.suppress(OSError):
        (checkpoint / UNFINISHED).unlink()


@contextlib.contextmanager
def whole_or_none(folder: Path) -> Iterator[None]:
    """Remove a folder whose writing failed: what is torn is of no use, and on a full disk its room is needed.

    Raises:
        RunFailed: it could not be written, and why.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        free = ""
        with contextlib.suppress(OSError):
            free = f"{size(shutil.disk_usage(folder.parent).free)} were free on its disk. "
        shutil.rmtree(folder, ignore_errors=True)
        raise RunFailed(
            f"{folder} could not be written: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            f"{free}Make room, or choose another place; "
            f"`parallel-tune resume {shlex.quote(str(folder.parent))}` goes on from the last complete checkpoint, "
            "if there is one.",
        ) from error


def written(folder: Path, write: Callable[[], None]) -> RunFailed | None:
    """Write a folder whole; returns why it could not be."""
    try:
        with whole_or_none(folder):
            write()
    except RunFailed as error:
        return error
    return None


def weight_bytes(parameters: Iterable[Any]) -> int:
    """Of the parameters that are trained."""
    return sum(weight.nbytes for weight in parameters if weight.requires_grad)


def require_room(run: Path, num_bytes: int) -> None:
    """Refuse a run whose result could not be written.

    Args:
        num_bytes: of the weights that are trained.

    Raises:
        ConfigError: so many bytes are not free.
    """
    free = shutil.disk_usage(run).free
    if free < num_bytes:
        raise ConfigError(
            f"the trained weights take {size(num_bytes)}, and the disk of {run} has {size(free)} free",
            "Make room, or choose another --output_dir.",
        )


def flush_to_disk(folder: Path) -> None:
    """Return when all files of a folder would outlive a power cut."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def checksum(path: Path) -> int:
    """CRC-32 of a file: finds every flipped bit, at the speed of the disk."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            found = zlib.crc32(block, found)
    return found


def damaged_file(checkpoint: Path) -> str | None:
    """The first file of a complete checkpoint that is not what was written; None if all are. Reads all of them.

    One that cannot be read counts: on a broken disk, or of a name that is a flipped bit in the mark.
    """
    try:
        checksums = json.loads((checkpoint / MARK).read_text(encoding="utf-8")).get("crc32", {}).items()
    except (OSError, ValueError, AttributeError):
        return MARK
    for name, expected in checksums:
        try:
            found = checksum(checkpoint / name)
        except OSError:
            found = None
        if found != expected:
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
    found = [path for path in run.glob("checkpoint-*") if _NAME.fullmatch(path.name) and is_complete(path)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """After how many optimizer steps a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def remove_unfinished(run: Path) -> list[str]:
    """Remove what processes left that were killed while they wrote or deleted a checkpoint; returns the names.

    What does not say that it is unfinished is not touched, nor is what is complete all the same.
    """
    removed = []
    for path in sorted(run.glob("checkpoint-*")):
        if _NAME.fullmatch(path.name) and (path / UNFINISHED).exists() and not is_complete(path):
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path.name)
    return removed


def rotate(run: Path, keep: int | None, best: Path | None = None, newest: Path | None = None) -> None:
    """Delete the oldest complete checkpoints so that `keep` are left; anything else is not touched.

    The newest and the best one stay, even where only one is to be kept.

    Args:
        newest: the one just written; those of later steps, from before a resume that passed them over as damaged,
            neither count nor go. The last complete one, if left out.
    """
    if keep is None:
        return
    complete = complete_checkpoints(run)
    if newest in complete:
        complete = complete[: complete.index(newest) + 1]
    old = [path for path in complete[:-1] if best is None or path.resolve() != best.resolve()]
    for path in old[: max(0, len(complete) - keep)]:
        try:
            with contextlib.suppress(OSError):  # a full disk is a reason to go on
                begin(path)
            shutil.rmtree(path)
        except OSError as error:
            # Without its mark it is no checkpoint any more; training is worth more than the space.
            print(f"{path.name} could not be deleted: {error}")
