"""Machine constants: measured once on each GPU model and software stack, kept in the user's cache."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from parallel_tune.allocator import allocator_variables
from parallel_tune.cache import cache_folder, read_object, write_object
from parallel_tune.memory.machine_key import MachineKey
from parallel_tune.memory.settings import CUDA_DEFAULTS, MachineConstants
from parallel_tune.process import die_with_parent

FORMAT = 1
"""Of the cached files; those of another are measured anew."""
MEASURING_SECONDS = 240
"""How long the measuring process may take; it takes about 15 s, and two minutes where NCCL fails to connect."""
LARGEST_BYTES = 16 << 30
"""No constant is as large: a figure above it, or a context of nothing, is a measurement gone wrong."""

IN_4BIT = "--in_4bit"
MEASURE = (sys.executable, "-P", "-m", "parallel_tune.memory.measure")


class NotMeasured(Exception):
    """A measurement that came to nothing, with the reason in one line."""


@dataclass(frozen=True)
class Measured:
    """What was measured; None for what this machine could not show.

    Attributes:
        nf4_scratch_bytes: measured only where 4-bit weights were asked for.
        gpus: how many GPUs took part: NCCL needs two.
        notes: what went wrong with a part of it.
    """

    context_bytes: int
    workspace_bytes: int
    segment_bytes: int
    nf4_scratch_bytes: int | None
    nccl_bytes: int | None
    gpus: int
    notes: tuple[str, ...] = ()
    measured_at: str = ""

    @property
    def constants(self) -> MachineConstants:
        """For the estimate. The shares of the allocator's reserve depend on the model, and stay the built-in ones."""
        return replace(
            CUDA_DEFAULTS,
            context_bytes=self.context_bytes,
            workspace_bytes=self.workspace_bytes,
            segment_bytes=self.segment_bytes,
            nf4_scratch_bytes=self.nf4_scratch_bytes or CUDA_DEFAULTS.nf4_scratch_bytes,
            nccl_bytes=CUDA_DEFAULTS.nccl_bytes if self.nccl_bytes is None else self.nccl_bytes,
        )


def parse(raw: Mapping[str, Any]) -> Measured:
    """Check what a measuring process, or a cached file, says.

    Raises:
        ValueError: something is missing, of a wrong type, or no figure that a machine can have.
    """
    values: dict[str, Any] = {}
    for item in fields(Measured):
        value = raw.get(item.name)
        if item.name.endswith("_bytes"):
            missing = value is None and item.name in ("nf4_scratch_bytes", "nccl_bytes")
            if not missing and (type(value) is not int or not 0 <= value < LARGEST_BYTES):
                raise ValueError(f"{item.name} is {value!r}")
        values[item.name] = value
    if not values["context_bytes"]:
        raise ValueError("the CUDA context takes nothing")
    if type(values["gpus"]) is not int or values["gpus"] < 1:
        raise ValueError(f"gpus is {values['gpus']!r}")
    values["notes"] = tuple(str(note) for note in raw.get("notes") or ())
    values["measured_at"] = str(raw.get("measured_at") or "")
    return Measured(**values)


def path_of(key: MachineKey) -> Path:
    """The file of a machine's constants."""
    return cache_folder() / "constants" / f"{key.file_name}.json"


def read(key: MachineKey) -> Measured | None:
    """What was measured for this key; None if nothing was, or if what is there cannot be read."""
    raw = read_object(path_of(key))
    if raw is None or raw.get("format") != FORMAT or raw.get("key") != asdict(key):
        return None
    try:
        return parse(raw)
    except (ValueError, TypeError):
        return None


def write(key: MachineKey, measured: Measured) -> None:
    """Keep a measurement.

    Raises:
        OSError: the cache cannot be written.
    """
    write_object(path_of(key), {"format": FORMAT, "key": asdict(key), **asdict(measured)})


def sufficient(measured: Measured | None, gpus: int, in_4bit: bool) -> bool:
    """Whether nothing is left to measure with so many GPUs, for weights that may be in 4 bit."""
    if measured is None or measured.gpus < min(2, gpus):
        return False
    return not in_4bit or measured.nf4_scratch_bytes is not None


def measure_once(
    key: MachineKey, uuids: Sequence[str], measure: Callable[[Sequence[str]], Measured], in_4bit: bool = False
) -> Measured:
    """Measure, and keep it; of several processes that want to, one does and the others read what it found.

    Args:
        uuids: the GPU itself, and another for NCCL where there is one.
        measure: what does it; `in_child` but for tests.
        in_4bit: what 4-bit weights take is wanted too.

    Raises:
        NotMeasured: it failed, and why.
        OSError: the cache cannot be written.
    """
    asked = time.time()
    with _alone():
        found = _newer(key, asked)
        if found is not None and sufficient(found, len(uuids), in_4bit):
            return found
        found = replace(measure(uuids), measured_at=time.strftime("%Y-%m-%d %H:%M:%S"))
        write(key, found)
        return found


def _newer(key: MachineKey, since: float) -> Measured | None:
    """What another process measured while this one waited for its turn."""
    with contextlib.suppress(OSError):
        if path_of(key).stat().st_mtime >= since:
            return read(key)
    return None


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One measurement at a time for a user: two would see each other's memory. The kernel frees a dead one's lock."""
    folder = path_of(MachineKey("", "", "", "", "")).parent
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def in_child(
    uuids: Sequence[str],
    command: Sequence[str] = MEASURE,
    timeout_seconds: float = MEASURING_SECONDS,
    in_4bit: bool = False,
) -> Measured:
    """Measure in a process of its own, so that this one never holds a CUDA context.

    Args:
        in_4bit: what 4-bit weights take too; the import of bitsandbytes takes a second.

    Raises:
        NotMeasured: the process failed, took too long, or said nothing that can be read.
    """
    env = {"NCCL_SOCKET_IFNAME": "lo", **os.environ, "CUDA_VISIBLE_DEVICES": ",".join(uuids)}
    env.update(allocator_variables(env))
    with subprocess.Popen(
        (*command, *uuids, *([IN_4BIT] if in_4bit else [])),
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=die_with_parent,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired as error:
            raise NotMeasured(f"the measuring process took more than {timeout_seconds:.0f} s") from error
        finally:
            # Its own child as well, whatever has happened.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0:
        last = err.strip().splitlines()[-1:] or ["it said nothing"]
        raise NotMeasured(f"the measuring process ended with code {process.returncode}: {last[0]}")
    try:
        return parse(json.loads(out.strip().splitlines()[-1]))
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise NotMeasured(f"the measuring process gave no constants: {error}") from error
