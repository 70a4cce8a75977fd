"""A row of metrics wherever a run may end or go on: every sample that was trained is then in a row."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class LogAtEdges(TrainerCallback):  # type: ignore[misc]
    """Logs at the last step, and where a checkpoint is saved, held-out rows are evaluated, or training is stopped.

    Comes after the callbacks that decide so.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        edge = control.should_save or control.should_evaluate or control.should_training_stop
        control.should_log = control.should_log or edge or state.global_step >= state.max_steps
        return control

    on_epoch_end = on_step_end
