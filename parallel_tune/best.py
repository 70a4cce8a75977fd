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


def forget_best_if_damaged(state: TrainerState, session: Session) -> bool:
    """Whether the best checkpoint cannot be taken for what was written; it is forgotten then. Every rank calls it."""
    best = Path(state.best_model_checkpoint)
    damaged = session.any(session.is_main and (not is_complete(best) or damaged_file(best) is not None))
    if damaged:
        forget_best(state)
    return damaged


def forget_best(state: TrainerState) -> None:
    """The next evaluation is the best one so far."""
    print(f"{state.best_model_checkpoint} is gone or damaged: its weights cannot become the result")
    state.best_metric, state.best_global_step, state.best_model_checkpoint = None, None, None
