"""What happens around optimizer steps: rows of metrics.jsonl, and an orderly stop at a signal."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from parallel_tune.rundir import RunDir, read_metrics
from parallel_tune.sampler import GlobalBatches
from parallel_tune.startup import Startup
from parallel_tune.watcher import stop_signals
from strategies.base import Session
from strategies.errors import RunFailed


class MetricsWriter(TrainerCallback):  # type: ignore[misc]
    """Writes a row a logging step from rank 0; tokens and samples are counted over all ranks.

    `host_seconds` of a row is the part of its `seconds` until the host had issued the steps' work; what is left it
    waited for the device. Much less than `seconds` means that the device is what takes the time.
    """

    def __init__(self, run: RunDir, batches: GlobalBatches, session: Session) -> None:
        self._run = run
        self._batches = batches
        self._session = session
        self._unwritten: list[dict[str, Any]] = []
        self._last_step = 0
        self._last_time = 0.0
        self._host_seconds = 0.0
        self._issuing_since = 0.0
        self.tokens = 0
        self.samples = 0
        self.seconds = 0.0
        self.final_loss: float | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._last_step = state.global_step
        for row in read_metrics(self._run):
            # What was trained before a resume counts too.
            if "loss" in row and int(row["step"]) <= state.global_step:
                try:
                    figures = int(row["tokens"]), int(row["samples"]), float(row["seconds"]), float(row["loss"])
                except (KeyError, TypeError, ValueError):
                    # The weights are whole; figures that lack a row are no reason to lose them.
                    print(f"{self._run.metrics}: the row of step {row['step']} is damaged, and does not count")
                    continue
                self.tokens += figures[0]
                self.samples += figures[1]
                self.seconds += figures[2]
                self.final_loss = figures[3]
        self._last_time = self._issuing_since = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        now = time.monotonic()
        self._host_seconds += now - self._issuing_since
        self._issuing_since = now

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs and "loss" in logs:
            self._training_row(state, logs)
        elif logs and "eval_loss" in logs:
            self._write({"step": state.global_step, "epoch": state.epoch or 0.0, "eval_loss": logs["eval_loss"]})
            # Evaluation is no training time.
            self._last_time = self._issuing_since = time.monotonic()

    def _training_row(self, state: TrainerState, logs: dict[str, float]) -> None:
        if not math.isfinite(logs["loss"]):
            raise RunFailed(
                f"the loss is {logs['loss']} at step {state.global_step}",
                "Lower --learning_rate, or use --dtype bfloat16 or float32; a checkpoint before it can be resumed.",
            )
        steps = range(self._last_step, state.global_step)
        now = time.monotonic()
        seconds = now - self._last_time
        tokens = sum(self._batches.tokens(step) for step in steps)
        samples = sum(self._batches.samples(step) for step in steps)
        self.tokens += tokens
        self.samples += samples
        self.seconds += seconds
        self.final_loss = logs["loss"]
        host_seconds, self._host_seconds = self._host_seconds, 0.0
        self._last_step, self._last_time = state.global_step, now
        grad_norm = logs.get("grad_norm")
        self._write(
            {
                "step": state.global_step,
                "steps": len(steps),
                "max_steps": state.max_steps,
                "epoch": state.epoch,
                "loss": logs["loss"],
                "grad_norm": grad_norm if grad_norm is not None and math.isfinite(grad_norm) else None,
                "learning_rate": logs.get("learning_rate"),
                "tokens": tokens,
                "samples": samples,
                "seconds": seconds,
                "host_seconds": host_seconds,
                "tokens_per_second": tokens / seconds if seconds > 0 else None,
                "devices": [
                    {"index": index, "allocated_bytes": torch.cuda.max_memory_allocated(index)}
                    for index in self._own_devices()
                ],
            }
        )
        self._issuing_since = time.monotonic()

    def _own_devices(self) -> list[int]:
        """CUDA ordinals that this process computes on: its own under ddp, all visible ones of a split."""
        if self._session.device.type != "cuda":
            return []
        if self._session.world_size > 1:
            return [self._session.device.index]
        return list(range(torch.cuda.device_count()))

    def _write(self, row: dict[str, Any]) -> None:
        if not self._session.is_main:
            return
        self._unwritten.append(row)
        try:
            with self._run.metrics.open("a+b") as file:
                # A row that was torn, by a full disk or when an earlier process died, must not spoil this one.
                if file.tell() > 0:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        file.write(b"\n")
                file.write(b"".join(json.dumps(row).encode() + b"\n" for row in self._unwritten))
        except FileNotFoundError:
            raise  # the run directory is gone: there is nowhere to write checkpoints and the result either
        except OSError as error:
            # The training is worth more than its figures, which come later if somebody makes room.
            print(f"{self._run.metrics} takes no rows: {error}; training goes on")
        else:
            self._unwritten.clear()


class FirstStep(TrainerCallback):  # type: ignore[misc]
    """Notes when the first step that this process trains is done."""

    def __init__(self, startup: Startup) -> None:
        self._startup = startup

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self._startup.done:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # issued is not done
            self._startup.finish()


class StopAtSignal(TrainerCallback):  # type: ignore[misc]
    """After SIGTERM, SIGINT or SIGHUP on any rank, all ranks save a checkpoint at the same step and stop.

    The handler only sets a flag: a collective inside it could meet another one half done.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._asked = False
        self.stopped = False

    def listen(self) -> None:
        """Take over the signals of this process."""
        for number in stop_signals():
            signal.signal(number, self._note)

    def _note(self, _number: int, _frame: Any) -> None:
        self._asked = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        return self._stop_if_asked(state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Evaluations may take long: a signal amid one does not wait for a further step."""
        return self._stop_if_asked(state, control) if state.global_step else control

    def _stop_if_asked(self, state: TrainerState, control: TrainerControl) -> TrainerControl:
        if self._session.any(self._asked) and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """A stop amid an epoch is not its end; an evaluation that is due there belongs in the checkpoint."""
        if self.stopped:
            control.should_evaluate = control.should_evaluate and float(state.epoch).is_integer()
            control.should_save = control.should_evaluate
        return control
