"""A reference command line beside ours, on the same rows.

The command is run without a shell, in the working directory, with these words filled in: {model}, {rows} (a file with
a `{"text": ...}` a line: the rows of our steps, in their order, cut as ours), {steps}, {global_batch}, {max_seq_length}
and {result}. If it writes a JSON object to {result}, or to the path in the environment variable PARALLEL_TUNE_RESULT,
then these are read from it, and its first steps are left out as ours are:

    seconds     a list: the seconds of each optimizer step. Needed.
    tokens      a list: the tokens of each step over all processes, or one number for each step
    samples     a list, or one number
    losses      a list
    used_bytes  a number or a list: the peak memory of each device

Without tokens a step is taken to have as many as ours on average. A command that writes nothing is timed as a whole,
start-up included, and held against our whole runs.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel_tune.bench.running import Interrupted, Timed
from parallel_tune.bench.work import Work
from parallel_tune.launch import without_launcher
from parallel_tune.process import die_with_parent
from strategies.errors import ConfigError, RunFailed

RESULT = "PARALLEL_TUNE_RESULT"
WORDS = ("model", "rows", "steps", "global_batch", "max_seq_length", "result")


@dataclass(frozen=True)
class ReferenceRun:
    """What one run of the command measured.

    Attributes:
        timed: its steps; None where it told nothing of them.
        whole_seconds: from its start to its end.
    """

    timed: Timed | None
    whole_seconds: float


def reference_argv(command: str, words: Mapping[str, object]) -> list[str]:
    """The command with its words filled in. Other braces stay as they are.

    Raises:
        ConfigError: it is empty, or its quotes do not match.
    """
    try:
        parts = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"--reference {command!r} is no command: {error}", "Check its quotes.") from error
    if not parts:
        raise ConfigError("--reference is empty", "Give a command line, e.g. 'python train.py {rows} {result}'.")
    for name in WORDS:
        parts = [part.replace("{" + name + "}", str(words[name])) for part in parts]
    return parts


def run_reference(argv: Sequence[str], result: Path, log: Path, work: Work, samples: int, skipped: int) -> ReferenceRun:
    """Run the command to its end.

    Args:
        result: where it may write what it measured.
        samples: of one of our steps, the global batch.

    Raises:
        Interrupted: the user ended it.
        RunFailed: it could not be started, failed, or wrote something that cannot be read.
    """
    result.unlink(missing_ok=True)
    environ = without_launcher(os.environ) | {RESULT: str(result)}
    began = time.monotonic()
    with log.open("ab") as output:
        try:
            process = subprocess.Popen(
                argv, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
        except OSError as error:
            raise RunFailed(f"the reference {argv[0]!r} cannot be started: {error.strerror}", f"Log: {log}") from error
        try:
            code = process.wait()
        except KeyboardInterrupt as error:
            raise Interrupted("the benchmark was stopped by a signal", "") from error
        finally:
            _end(process)
    seconds = time.monotonic() - began
    if code != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:])
        raise RunFailed(f"the reference ended with code {code}", f"{tail}\nLog: {log}")
    return ReferenceRun(read_result(result, work, samples, skipped) if result.exists() else None, seconds)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Whatever of the command is left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_result(path: Path, work: Work, samples: int, skipped: int) -> Timed:
    """What a reference wrote.

    Raises:
        RunFailed: it is not of the documented form.
    """
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        seconds = _numbers(said["seconds"])
        if not seconds or not min(seconds) > 0:
            raise ValueError(f"seconds = {said['seconds']!r}")
        mean = statistics.mean(work.tokens)
        tokens = _each(said.get("tokens"), len(seconds), mean)
        if not min(tokens) > 0:
            raise ValueError(f"tokens = {said['tokens']!r}")
        counts = _each(said.get("samples"), len(seconds), samples)
        used = said.get("used_bytes")
        peaks = _numbers(used if isinstance(used, list) else [used] if used is not None else [])
        losses = _numbers(said.get("losses") or [])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunFailed(
            f"what the reference wrote to {path} cannot be read: {type(error).__name__}: {error}",
            'It must be an object like {"seconds": [0.5, 0.4], "tokens": [900, 870]}, a number a step.',
        ) from error
    if len(seconds) <= skipped:
        raise RunFailed(f"the reference timed {len(seconds)} steps, and {skipped} are skipped", "Use {steps} in it.")
    return Timed(
        seconds=seconds,
        tokens=tokens,
        samples=counts,
        losses=losses,
        skipped=skipped,
        devices=[{"index": index, "used_peak_bytes": int(peak)} for index, peak in enumerate(peaks)],
        details={"tokens_told": said.get("tokens") is not None, "processes": said.get("processes")},
    )


def _numbers(values: Any) -> list[float]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is no list")
    numbers = [float(value) for value in values]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{values!r} is not finite")
    return numbers


def _each(value: Any, count: int, otherwise: float) -> list[float]:
    """A number a step, from a list, from one number, or from neither."""
    if value is None:
        return [otherwise] * count
    if not isinstance(value, list):
        return _numbers([value] * count)
    if len(value) != count:
        raise ValueError(f"{len(value)} figures for {count} steps")
    return _numbers(value)
