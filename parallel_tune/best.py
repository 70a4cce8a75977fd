"""The best evaluation of a run is one whose checkpoint is there, beside the others and undamaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from parallel_tune.checkpoint import damaged_file, is_complete
from strategies.base import Session


class FindBest(TrainerCallback):  # type: ignore[misc]
    """Finds the best checkpoint of a run that goes on, by its step.

    A state names it by the path that it was written to: the run may have been moved since, or that checkpoint alone.
    """

    def __init__(self, run: Path) -> None:
        self._run = run

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.best_global_step is not None:
            best = self._run / f"checkpoint-{state.best_global_step}"
            state.best_model_checkpoint = str(best)
            if not is_complete(best):
                forget_best(state)


def last_weights_stay(state: TrainerState, evaluated: tuple[int, float] | None, session: Session) -> bool:
    """Whether those in memory become the result, not the best checkpoint's. Every rank calls it.

    They do where they are better, and their own checkpoint could not be written; and where the best one is damaged.

    Args:
        evaluated: the step of the last evaluation, and its loss.
    """
    if evaluated is not None and evaluated[0] == state.global_step:
        better = session.is_main and state.best_metric is not None and evaluated[1] < state.best_metric
        if session.any(better):
            state.best_global_step, state.best_metric = state.global_step, evaluated[1]
            return True
    return _forget_best_if_damaged(state, session)


def _forget_best_if_damaged(state: TrainerState, session: Session) -> bool:
    """Whether the best checkpoint cannot be taken for what was written; it is forgotten then."""
    best = Path(state.best_model_checkpoint)
    damaged = session.any(session.is_main and (not is_complete(best) or damaged_file(best) is not None))
    if damaged:
        forget_best(state)
    return damaged


def forget_best(state: TrainerState) -> None:
    """The next evaluation is the best one so far."""
    print(f"{state.best_model_checkpoint} is gone or damaged: its weights cannot become the result")
    state.best_metric, state.best_global_step, state.best_model_checkpoint = None, None, None
