"""Start training processes, watch them, and end them: the one place that does."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from parallel_tune.alone import alone
from parallel_tune.disk import full_disk
from parallel_tune.launch import LaunchSpec
from parallel_tune.outcome import LAST_WORDS, folder_for_last_words, load
from parallel_tune.process import WATCHER, begin_watched, drop_what_nobody_reads
from parallel_tune.rundir import Outcome, RunDir
from parallel_tune.silent_end import log_size, why_silent
from strategies.errors import ParallelTuneError, RunFailed, Stopped

POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0
"""How long the other processes may take to end by themselves once one has failed, or rank 0 has said how it ended."""

PROCESS_EXITING = 0x4
"""Linux's PF_EXITING, among the flags in /proc/PID/stat."""


class Watcher:
    """Runs the processes of one run from start to end.

    At the first SIGINT, SIGTERM or SIGHUP (a terminal that is closed) the workers save a checkpoint and stop; at the
    second everything is killed.
    """

    stopping = "stopping after this step, with a checkpoint; a second signal ends all at once"

    def __init__(self, processes: int, run: RunDir, spec: LaunchSpec, on_poll: Callable[[], None]) -> None:
        self._processes = processes
        self._run = run
        self._spec = spec
        self._on_poll = on_poll
        self._signals = 0
        self._signal = signal.SIGTERM
        self._forwarded = False
        self._log_begins: dict[int, int] = {}
        self._last_words: Path | None = None
        self._known_pids: dict[int, int] = {}

    @property
    def signalled(self) -> bool:
        """Whether a signal asked for the end."""
        return self._signals > 0

    def run(self) -> None:
        """Start, wait, and return when the result is on disk.

        Raises:
            Stopped: a signal ended the run with a checkpoint on disk.
            RunFailed: a process failed or vanished; every other one is ended.
            ConfigError: another command is training in this run directory, or it cannot be written.
        """
        with alone(self._run), folder_for_last_words() as self._last_words:
            self._run_alone()

    def _run_alone(self) -> None:
        for rank in range(self._processes):
            self._run.outcome(rank).unlink(missing_ok=True)
            self._run.process_id(rank).unlink(missing_ok=True)
            self._log_begins[rank] = log_size(self._run.log(rank))
        # Python lets the main thread alone handle signals; a caller in another one has its own way to stop.
        handled = stop_signals() if threading.current_thread() is threading.main_thread() else ()
        # Before anything is started: an interruption amid that would leave it running.
        previous = {number: signal.signal(number, self._note) for number in handled}
        try:
            process = self._start()
            try:
                vanished = self._wait(process)
            finally:
                self._kill_all(process)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        self._show()
        self._judge(process.returncode, vanished)

    def _start(self) -> subprocess.Popen[bytes]:
        with self._run.logs.joinpath("launcher.log").open("ab") as log:
            return subprocess.Popen(
                self._spec.argv,
                env={**self._spec.env, WATCHER: str(os.getpid()), LAST_WORDS: str(self._last_words or "")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A Ctrl-C in the terminal reaches this process alone, which tells the others in order.
                start_new_session=True,
                preexec_fn=begin_watched,
            )

    def _note(self, number: int, _frame: Any) -> None:
        # A terminal that goes says so more than once; only a user's second word ends all at once.
        if number != signal.SIGHUP or not self._signals:
            self._signals += 1
            self._signal = signal.Signals(number)
        drop_what_nobody_reads()

    def _show(self) -> None:
        if self._signals:
            drop_what_nobody_reads()
        with contextlib.suppress(OSError):  # the terminal may be gone; the run goes on
            self._on_poll()

    def _wait(self, process: subprocess.Popen[bytes]) -> list[int]:
        """Until all have ended, or the end is decided and the grace is over. Returns the ranks that vanished first.

        Decided: a rank failed or vanished, or rank 0 has said how it ended; the others then have nothing left to do.
        """
        vanished: list[int] = []
        deadline: float | None = None
        while process.poll() is None:
            self._show()
            if self._signals == 1 and not self._forwarded:
                self._forwarded = self._ask_to_stop(process)
            if self._signals > 1 or (deadline is not None and time.monotonic() > deadline):
                return vanished
            if deadline is None:
                # In this order: what a rank said because another one died is not read before that death is seen.
                outcomes = self._outcomes()
                vanished = self._vanished()
                if vanished or self._is_decided(outcomes):
                    deadline = time.monotonic() + GRACE_SECONDS
            time.sleep(POLL_SECONDS)
        # Without their launcher ranks are gone or about to be; one that was killed took all along, not only the first.
        if vanished and process.returncode >= 0:
            return vanished
        return [rank for rank in self._pids() if self._said(rank) is None]

    def _outcome_files(self, rank: int) -> list[Path]:
        own = self._run.outcome(rank)
        return [own, *([self._last_words / own.name] if self._last_words else [])]

    def _said(self, rank: int) -> Outcome | None:
        """How a rank said that it ended, wherever it could."""
        said = [load(path) for path in self._outcome_files(rank)]
        return next((outcome for outcome in said if outcome is not None), None)

    def _outcomes(self) -> dict[int, Outcome]:
        said = {rank: self._said(rank) for rank in range(self._processes)}
        return {rank: outcome for rank, outcome in said.items() if outcome is not None}

    def _pids(self) -> dict[int, int]:
        for rank in range(self._processes):
            if rank not in self._known_pids:  # once read it is known, whatever becomes of the file
                with contextlib.suppress(OSError, ValueError):
                    self._known_pids[rank] = int(self._run.process_id(rank).read_text())
        return self._known_pids

    def _is_decided(self, outcomes: Mapping[int, Outcome]) -> bool:
        failed = any(outcome.code not in (0, Stopped.exit_code) for outcome in outcomes.values())
        return failed or 0 in outcomes

    def _vanished(self) -> list[int]:
        """Ranks that began and are gone without a word."""
        gone = [rank for rank, pid in self._pids().items() if not _alive(pid)]
        return [rank for rank in gone if self._said(rank) is None]

    def _ask_to_stop(self, process: subprocess.Popen[bytes]) -> bool:
        """Signal the workers. Those that have not begun are ended: there is nothing to save."""
        pids = self._pids()
        if len(pids) < self._processes:
            self._kill_all(process)
            return True
        for pid in pids.values():
            _send(pid, self._stop_signal())
        with contextlib.suppress(OSError):  # the terminal may be gone
            click.echo(self.stopping, err=True)
        return True

    def _stop_signal(self) -> signal.Signals:
        """What asks a worker to stop."""
        return signal.SIGTERM

    def _kill_all(self, process: subprocess.Popen[bytes]) -> None:
        for pid in self._pids().values():
            if _alive(pid):
                _send(pid, signal.SIGKILL)
        if process.poll() is None:
            process.kill()
        process.wait()

    def _judge(self, code: int, vanished: list[int]) -> None:
        """Decide by what lies on disk; a launcher's exit code says too little and at times the wrong thing."""
        outcomes = self._outcomes()
        main = outcomes.get(0)
        resume = f"parallel-tune resume {shlex.quote(str(self._run.path))}"
        if main is not None and main.code == 0:
            return
        if main is not None and main.code == Stopped.exit_code:
            raise Stopped(main.message, main.hint)
        if main is not None and main.is_final:
            raise failure(0, main, self._run)
        if self._signals:
            raise RunFailed(
                "ended by a signal before a checkpoint was written",
                f"`{resume}` goes on from the last complete checkpoint, if there is one.",
            )
        if not self._run.logs.exists():
            raise RunFailed(
                f"{self._run.path} was moved or removed during the run",
                "Where it is now, `parallel-tune resume` goes on from the last complete checkpoint.",
            )
        if vanished and (full := full_disk(self._run.path)):
            raise RunFailed(full, f"`{resume}` goes on from the last complete checkpoint.")
        if vanished:
            names = ", ".join(f"rank {rank}" for rank in vanished)
            log = self._run.log(vanished[0])
            raise RunFailed(
                f"{names} ended without a word: {why_silent(log, self._log_begins[vanished[0]])}",
                f"Log: {log}; `{resume}` goes on from the last checkpoint, if there is one.",
            )
        self._raise_first_failure(outcomes)
        tail = _tail(self._run.logs / "launcher.log")
        raise RunFailed(
            f"the training processes ended with code {code} before they began",
            f"{tail}\nSee {self._run.logs / 'launcher.log'}.",
        )

    def _raise_first_failure(self, outcomes: Mapping[int, Outcome]) -> None:
        failed = [rank for rank, outcome in outcomes.items() if outcome.code != 0]
        if failed:
            rank = min(failed, key=self._said_at)
            raise failure(rank, outcomes[rank], self._run)

    def _said_at(self, rank: int) -> float:
        return min(path.stat().st_mtime for path in self._outcome_files(rank) if path.exists())


def stop_signals() -> tuple[signal.Signals, ...]:
    """Those that ask a run to stop; SIGHUP not where it is ignored, as under nohup."""
    hang_up = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGINT, signal.SIGTERM, *hang_up)


def failure(rank: int, outcome: Outcome, run: RunDir) -> ParallelTuneError:
    """The error that a rank reported, with its exit code."""
    return failure_of(outcome, f"rank {rank}", run.log(rank))


def failure_of(outcome: Outcome, who: str, log: Path) -> ParallelTuneError:
    """The error that a process reported, with its exit code."""
    kinds = {kind.exit_code: kind for kind in ParallelTuneError.__subclasses__()}
    kind = kinds.get(outcome.code, RunFailed)
    error = kind(f"{who}: {outcome.message}", f"{outcome.hint}\nLog: {log}".strip())
    error.trace = outcome.trace
    return error


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return not has_ended(status)


def has_ended(status: str) -> bool:
    """Whether a process is a zombie, or on its way to be one.

    Of a process that used a GPU the driver may take seconds to release all, and its sockets may be closed by then: the
    other ranks would complain of that before its death is seen.

    Args:
        status: its /proc/PID/stat.
    """
    # The name in parentheses may hold anything.
    fields = status.rpartition(")")[2].split()
    return fields[0] in ("Z", "X") or bool(int(fields[6]) & PROCESS_EXITING)


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _tail(path: Path, lines: int = 5) -> str:
    try:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
