"""Early stopping: training ends when the held-out loss has not become better for a while, on all ranks at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from strategies.base import Session


def evaluations_without_progress(losses: Sequence[float], threshold: float) -> int:
    """How many of the last evaluations were not better than the best before them by more than the threshold."""
    best, count = float("inf"), 0
    for loss in losses:
        count = 0 if best - loss > threshold else count + 1
        best = min(best, loss)
    return count


class StopEarly(TrainerCallback):  # type: ignore[misc]
    """Asks for the end once `patience` evaluations in a row brought no progress.

    It counts in the trainer's own history, which checkpoints hold, so a resumed run goes on counting.

    Attributes:
        stopped_at_step: the step after which it did; None if it did not.
    """

    def __init__(self, patience: int, threshold: float, session: Session) -> None:
        self._patience = patience
        self._threshold = threshold
        self._session = session
        self.stopped_at_step: int | None = None

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        losses = [row["eval_loss"] for row in state.log_history if "eval_loss" in row]
        enough = evaluations_without_progress(losses, self._threshold) >= self._patience
        # Rank 0 decides, so that no rank goes on alone.
        if self._session.any(self._session.is_main and enough) and state.global_step < state.max_steps:
            self.stopped_at_step = state.global_step
            control.should_training_stop = True
