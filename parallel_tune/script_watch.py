"""Watching the processes of a user's script: its output live, its end by what each rank said."""

from __future__ import annotations

import codecs
import signal
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from parallel_tune.rundir import Outcome
from parallel_tune.watcher import Watcher
from strategies.errors import RunFailed


class OutputFollower:
    """Passes on what one rank writes to its log, as it comes."""

    def __init__(self, log: Path, to: TextIO) -> None:
        log.touch()
        self._file = log.open("rb")
        self._to = to
        # A character may be cut in two where the file ends for now.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.poll()
        self._file.close()

    def poll(self) -> None:
        """Pass on what was added since the last call."""
        text = self._decoder.decode(self._file.read())
        if text:
            self._to.write(text)
            self._to.flush()


class ScriptWatcher(Watcher):
    """A script's processes: they succeed together, and no checkpoint of ours is to be had.

    A rank that ended without a word may have left by `os._exit(0)`, so the launcher's exit code tells it from a
    killed one, and torchrun ends the others.
    """

    stopping = "asking the script's processes to end; a second signal ends them at once"

    def _stop_signal(self) -> signal.Signals:
        # Ctrl-C is a KeyboardInterrupt in the script, as when it runs by itself: many save what they have then.
        return signal.SIGINT if self._signal == signal.SIGINT else signal.SIGTERM

    def _is_decided(self, outcomes: Mapping[int, Outcome]) -> bool:
        if self.signalled:
            return len(outcomes) == self._processes  # one may need longer to save than the others
        return len(outcomes) == self._processes or any(outcome.code != 0 for outcome in outcomes.values())

    def _vanished(self) -> list[int]:
        return []

    def _judge(self, code: int, vanished: list[int]) -> None:
        outcomes = self._outcomes()
        if code == 0 or (len(outcomes) == self._processes and all(o.code == 0 for o in outcomes.values())):
            return
        if self._signals:
            raise RunFailed("the script was ended by a signal", f"See {self._run.logs}.")
        self._raise_first_failure(outcomes)
        silent = [f"rank {rank}" for rank in self._pids() if rank not in outcomes]
        if silent:
            raise RunFailed(
                f"{', '.join(silent)} ended without a word, and the launcher with code {code}: killed from outside, "
                "out of host memory, or left by os._exit",
                f"See {self._run.logs}.",
            )
        super()._judge(code, vanished)
