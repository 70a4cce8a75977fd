"""Encoded rows in the user's cache folder: a dataset is tokenised once on a machine, not by each process of each run.

Files are named by the key of what they depend on (`identity.py`), appear whole or not at all, and carry a checksum.
Deleting the folder, or any file in it, at any time costs an encoding and nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from parallel_tune.cache import cache_folder
from parallel_tune.data.rows import DataReport, EncodedRows

MOST_BYTES = 8 * 2**30
"""What the folder may hold; beyond it those used longest ago go first."""

PATIENCE_SECONDS = 900.0
"""How long a process waits for another one that encodes the same rows, before it encodes them itself."""

ABANDONED_SECONDS = 86_400.0
"""Age from which an unfinished file is what a killed process left."""

SWITCH = "PARALLEL_TUNE_DATA_CACHE"
"""Environment variable: 0, off, no or false encodes anew in each process."""

Encoded = tuple[EncodedRows, DataReport]


def switched_off() -> bool:
    """Whether the environment says that nothing is kept."""
    return os.environ.get(SWITCH, "").strip().lower() in ("0", "off", "no", "false")


def rows_folder() -> Path:
    """Where encoded rows are kept."""
    return cache_folder() / "rows"


def kept_or_encoded(
    key: str, encode: Callable[[], Encoded], unchanged: Callable[[], bool], patience_seconds: float = PATIENCE_SECONDS
) -> Encoded:
    """The rows under a key. Of several processes that ask at once one encodes, and the others wait for it.

    Args:
        encode: makes them where they are not kept; what it raises is raised.
        unchanged: whether the data are still those of the key, asked after encoding.
    """
    path = rows_folder() / f"{key}.rows"
    if (found := _take(path)) is not None:
        return found
    with _alone(path, patience_seconds):
        if (found := _take(path)) is not None:
            return found
        rows, report = encode()
        if unchanged():
            _keep(path, rows, report)
        else:
            print("the dataset changed while it was read: its encoded rows are not kept")
    return rows, report


def _take(path: Path) -> Encoded | None:
    """What a file holds; None if there is none. A torn one is removed."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline())
            rows = EncodedRows.read(file, header["counts"])
            report = header["report"]
            if file.read(1) or _checksum(rows, report) != header["checksum"]:
                raise ValueError("its checksum is another")
        percentiles = {int(q): length for q, length in report["length_percentiles"].items()}
        unused = tuple(report["unused_columns"])
        said = DataReport(**{**report, "length_percentiles": percentiles, "unused_columns": unused})
    except FileNotFoundError:
        return None
    except OSError as error:
        print(f"encoded rows cannot be read: {error}")
        return None
    except (EOFError, ValueError, TypeError, KeyError, AttributeError, MemoryError, OverflowError) as error:
        print(f"{path} is damaged ({error}): encoding again")
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # the last to go
    print(f"encoded rows were read from {path}")
    return rows, said


def _keep(path: Path, rows: EncodedRows, report: DataReport) -> None:
    if rows.num_bytes > MOST_BYTES:
        print(f"the encoded rows are too large to be kept: {rows.num_bytes / 2**30:.1f} GiB")
        return
    said = json.loads(json.dumps(asdict(report)))  # as it will be read
    header = {"checksum": _checksum(rows, said), "counts": rows.counts, "report": said}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        _make_room(path.parent, rows.num_bytes)
        with part.open("wb") as file:
            file.write(json.dumps(header).encode() + b"\n")
            rows.write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        print(f"encoded rows are kept in {path}")
    except OSError as error:
        # A full disk, a folder that cannot be written: the rows are here all the same.
        print(f"encoded rows are not kept: {error}")
        with contextlib.suppress(OSError):
            part.unlink()


def _make_room(folder: Path, num_bytes: int) -> None:
    """Remove what was used longest ago until so many bytes fit, and what killed processes left."""
    now = time.time()
    for part in folder.glob(".*.part"):
        with contextlib.suppress(OSError):
            if now - part.stat().st_mtime > ABANDONED_SECONDS:
                part.unlink()
    files = []
    for path in folder.glob("*.rows"):
        with contextlib.suppress(OSError):
            files.append((path.stat().st_mtime, path.stat().st_size, path))
    held = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if held + num_bytes <= MOST_BYTES:
            return
        with contextlib.suppress(OSError):
            path.unlink()
        held -= size


@contextlib.contextmanager
def _alone(path: Path, patience_seconds: float) -> Iterator[None]:
    """Hold the lock of a file while the block runs; without it where none can be had in time.

    The lock goes with the process that holds it, however that ends. Files are whole even where two write them.
    """
    lock: int | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # they are the user's data
        # Few locks for all keys: a lock's file can never be removed safely.
        lock = os.open(path.parent / f"lock-{path.name[:2]}", os.O_RDWR | os.O_CREAT, 0o600)
        _wait_for(lock, patience_seconds)
    except OSError as error:
        print(f"encoding without waiting for other processes: {error}")
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _wait_for(lock: int, patience_seconds: float) -> None:
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                print(f"another process has encoded for {patience_seconds:.0f} seconds: encoding as well")
                return
        time.sleep(0.05)


def _checksum(rows: EncodedRows, report: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(report, sort_keys=True).encode())
    for part in rows.parts:
        digest.update(memoryview(part))
    return digest.hexdigest()
