"""Early stopping: training ends when the held-out loss has not become better for a while, on all ranks at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from parallel_tune.config import TrainConfig
from strategies.base import Session
from strategies.errors import ConfigError


def evaluations_without_progress(losses: Sequence[float], threshold: float) -> int:
    """How many of the last evaluations were not better than the best before them by more than the threshold."""
    best, count = float("inf"), 0
    for loss in losses:
        count = 0 if best - loss > threshold else count + 1
        best = min(best, loss)
    return count


def check_reached(config: TrainConfig, steps_per_epoch: int) -> None:
    """Refuse a run that waits for evaluations and would end before the first.

    Raises:
        ConfigError: as it says.
    """
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * steps_per_epoch)
    waits = config.early_stopping_patience is not None or config.load_best_model_at_end
    if waits and config.evaluates == "steps" and config.eval_steps > steps:
        raise ConfigError(
            f"eval_steps = {config.eval_steps}, and the run has {steps} steps: nothing would be evaluated in it",
            f"Give --eval_steps {max(1, steps // 10)}, say.",
        )


class StopEarly(TrainerCallback):  # type: ignore[misc]
    """Asks for the end once `patience` evaluations in a row brought no progress.

    It counts in the trainer's own history, which checkpoints hold, so a resumed run goes on counting; one that had
    stopped, and was killed before its result was written, trains no further.

    Attributes:
        stopped_at_step: the step after which it did; None if it did not.
    """

    def __init__(self, patience: int, threshold: float, session: Session) -> None:
        self._patience = patience
        self._threshold = threshold
        self._session = session
        self._had_stopped = False
        self.stopped_at_step: int | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._stop_if_enough(state, control)
        self._had_stopped = self.stopped_at_step is not None

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._stop_if_enough(state, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """An epoch in which nothing was trained has nothing to evaluate and to save."""
        if self._had_stopped:
            control.should_evaluate = control.should_save = False

    def _stop_if_enough(self, state: TrainerState, control: TrainerControl) -> None:
        losses = [row["eval_loss"] for row in state.log_history if "eval_loss" in row]
        enough = evaluations_without_progress(losses, self._threshold) >= self._patience
        # Rank 0 decides, so that no rank goes on alone.
        if self._session.any(self._session.is_main and enough) and state.global_step < state.max_steps:
            self.stopped_at_step = state.global_step
            control.should_training_stop = True
