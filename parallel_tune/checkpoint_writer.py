"""Checkpoints of a run: in its middle one that fails is done without, a last one is written wherever there is room."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerState

from parallel_tune.checkpoint import begin, mark_complete, rotate, weight_bytes, written
from parallel_tune.rescue import agreed, write_somewhere
from strategies.base import Session
from strategies.errors import RunFailed


class CheckpointWriter:
    """Writes the checkpoints of a run. Every rank has one, and calls it at the same steps.

    Attributes:
        missed: steps whose checkpoint could not be written.
        elsewhere: where the last one lies, and why it is not in the run's directory; None if it is.
    """

    def __init__(self, session: Session, keep: int | None, is_stopping: Callable[[], bool]) -> None:
        """`keep` complete ones stay; while the run `is_stopping`, the one that is written is all that it leaves."""
        self._session = session
        self._keep = keep
        self._is_stopping = is_stopping
        self._best_before: tuple[float | None, int | None, str | None] = (None, None, None)
        self.missed: list[int] = []
        self.elsewhere: tuple[Path, RunFailed] | None = None

    def remember_best(self, state: TrainerState) -> None:
        """Called before an evaluation may become the best one."""
        self._best_before = (state.best_metric, state.best_global_step, state.best_model_checkpoint)

    def save(
        self,
        state: TrainerState,
        run: Path,
        write_parts: Callable[[Path], None],
        weights: Iterable[Any],
        best_stays: bool,
    ) -> None:
        """Write this step's checkpoint and delete old ones.

        Args:
            write_parts: writes what this rank has of it, given the folder of checkpoints.
            weights: that are trained.

        Raises:
            NotWritten: the run stops, and nowhere is room.
        """
        name = f"checkpoint-{state.global_step}"
        write = partial(self._write, name, write_parts)
        if self._is_stopping():
            # What was trained since the last one would be lost with it.
            folder, error = write_somewhere(write, run, weight_bytes(weights), self._session)
            self.elsewhere = (folder / name, error) if error is not None else None
        elif (error := write(run)) is not None:
            print(f"{error.message}; training goes on without it")
            self.missed.append(state.global_step)
            if state.best_global_step == state.global_step:
                # Its weights are nowhere: the best evaluation is one that has a checkpoint.
                state.best_metric, state.best_global_step, state.best_model_checkpoint = self._best_before
        if error is None and self._session.is_main:
            best = state.best_model_checkpoint
            rotate(run, self._keep, Path(best) if best and best_stays else None, newest=run / name)
        self._session.barrier()

    def _write(self, name: str, write_parts: Callable[[Path], None], folder: Path) -> RunFailed | None:
        """Write a complete checkpoint into a folder. Returns on all ranks alike why it could not be."""
        checkpoint = folder / name
        if self._session.is_main:
            # A torn one of this step may lie there; its mark must not vouch for a new one half written.
            shutil.rmtree(checkpoint, ignore_errors=True)
        self._session.barrier()
        # By itself: the ranks meet in a barrier amid their parts, and none may stay away.
        begun = written(checkpoint, lambda: begin(checkpoint)) if self._session.is_main else None
        error = agreed(begun, self._session)
        if error is None:
            error = agreed(written(checkpoint, lambda: write_parts(folder)), self._session)
        if error is None:
            marked = written(checkpoint, lambda: mark_complete(checkpoint)) if self._session.is_main else None
            error = agreed(marked, self._session)
        if error is not None and self._session.is_main:
            # Another rank may have written on after this one had cleared up.
            shutil.rmtree(checkpoint, ignore_errors=True)
        return error
