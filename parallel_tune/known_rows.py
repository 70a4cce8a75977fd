"""Planning for rows whose lengths are known, where a plan without data counts all as full. Imports no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import ceil
from pathlib import Path

import click

from parallel_tune.capture import NO_ROOM, RECOMPUTED
from parallel_tune.config import TrainConfig
from parallel_tune.data.known_lengths import keep_lengths, lengths_file, read_lengths
from parallel_tune.memory.settings import TrainingSettings
from parallel_tune.memory.unsloth_tape import mean_spare_tokens
from parallel_tune.process import WATCHER
from parallel_tune.sampler import GlobalBatches
from strategies.base import Estimator
from strategies.batching import DEFAULT_ACCUMULATION, DEFAULT_MICRO_BATCH
from strategies.contracts import Arrangement, Device, MemoryEstimate, Part, Plan
from strategies.errors import ConfigError

MOST_ROWS = 2_000_000
"""Rows of a whole run up to which each of its steps is looked at; beyond it the longest rows are taken to meet."""

MOST_ROWS_DEALT = 200_000
"""Rows of a whole run up to which they are dealt as the run will: a second for each arrangement that is looked at."""

SILENT_SECONDS = 3.0
"""After which a plan that is still reading rows says what it waits for."""


def could_do_better(config: TrainConfig, plan: Plan, num_devices: int) -> bool:
    """Whether a plan for full rows might be another one for shorter rows."""
    if config.packing:
        return False  # sequences are full
    fixed = config.per_device_train_batch_size is not None or config.gradient_accumulation_steps is not None
    more_at_once = not fixed and plan.gradient_accumulation_steps > 1
    recomputes = config.use_gradient_checkpointing == "auto" and plan.gradient_checkpointing != "none"
    splits = config.strategy == "auto" and plan.processes < num_devices
    uncaptured = config.capture == "auto" and plan.uncaptured_reason in (NO_ROOM, RECOMPUTED)
    return not plan.fits or more_at_once or recomputes or splits or uncaptured


class KnownRows:
    """The lengths of a run's training rows.

    Attributes:
        lengths: tokens of each row.
        longest_held_out: tokens of the longest row that evaluation takes; 0 if it takes none.
    """

    def __init__(self, lengths: Sequence[int], longest_held_out: int = 0) -> None:
        self.lengths = tuple(lengths)
        self.longest_held_out = longest_held_out
        self._largest: dict[tuple[int, ...], int] = {}

    @cached_property
    def spare_tokens(self) -> int:
        """By which Unsloth's attention fills a row up, on average."""
        return mean_spare_tokens(self.lengths)

    @property
    def mean(self) -> float:
        """Tokens of a row on average."""
        return sum(self.lengths) / len(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def cut(self, max_seq_length: int) -> KnownRows:
        """The rows when none may be longer."""
        if max(self.longest, self.longest_held_out) <= max_seq_length:
            return self
        return KnownRows(
            [min(length, max_seq_length) for length in self.lengths], min(self.longest_held_out, max_seq_length)
        )

    def largest_micro_batch(self, config: TrainConfig, arrangement: Arrangement) -> int:
        """Tokens of the largest micro-batch of a whole run, its rows joined."""
        processes, micro_batch = arrangement.processes, arrangement.micro_batch
        micro, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
        product = (micro or DEFAULT_MICRO_BATCH) * (steps or DEFAULT_ACCUMULATION) * processes
        global_batch = config.global_batch_size or product
        batches = GlobalBatches(self.lengths, (), global_batch, config.seed, joined=True)
        num_steps = ceil(config.num_train_epochs) * batches.steps_per_epoch
        if config.max_steps > 0:
            num_steps = config.max_steps
        if num_steps * global_batch > MOST_ROWS:
            return sum(sorted(self.lengths, reverse=True)[:micro_batch])
        key = (batches.global_batch, processes, micro_batch, num_steps, config.seed)
        if key not in self._largest:
            # Each arrangement deals all rows once.
            if num_steps * global_batch > MOST_ROWS_DEALT:
                batches = replace(batches, joined=False)  # no less, and quicker
            count = arrangement.gradient_accumulation_steps
            self._largest[key] = batches.largest_micro_batch(num_steps, processes, micro_batch, count)
        return self._largest[key]


@dataclass(frozen=True)
class RowsEstimator:
    """`strategies.base.Estimator` for rows of known lengths.

    Attributes:
        estimating: makes the estimator for rows of one length.
        settings: those of full rows.
    """

    estimating: Callable[[TrainingSettings], Estimator]
    settings: TrainingSettings
    config: TrainConfig
    rows: KnownRows

    def memory(self, part: Part, arrangement: Arrangement, device: Device) -> MemoryEstimate:
        """Bytes at the peak: for the largest micro-batch where rows are joined, else for the longest row."""
        tokens, spare = self.rows.longest, None
        if self.settings.packed:
            tokens = self.rows.largest_micro_batch(self.config, arrangement)
            spare = arrangement.micro_batch * self.rows.spare_tokens
            arrangement = replace(arrangement, micro_batch=1)
        # Evaluation takes no more tokens at once than training, but a row at least.
        tokens = max(tokens, -(-self.rows.longest_held_out // arrangement.micro_batch))
        return self._of(tokens, spare).memory(part, arrangement, device)

    def micro_batch_seconds(self, part: Part, arrangement: Arrangement, device: Device) -> float:
        """Device seconds of one micro-batch of average rows."""
        return self._of(round(self.rows.mean)).micro_batch_seconds(part, arrangement, device)

    def host_seconds(self, part: Part, arrangement: Arrangement) -> float:
        """Host seconds of one micro-batch, which do not depend on its length."""
        return self.estimating(self.settings).host_seconds(part, arrangement)

    def _of(self, tokens: int, spare: int | None = None) -> Estimator:
        return self.estimating(replace(self.settings, sequence_length=tokens, spare_tokens=spare))


def measure_rows(config: TrainConfig) -> KnownRows:
    """The lengths of the training rows: kept ones, or measured in a process of its own, so that this one stays light.

    Raises:
        ConfigError: the dataset or the tokenizer cannot be read.
    """
    kept = lengths_file(config)
    if kept is not None and (known := read_lengths(kept)) is not None:
        return KnownRows(*known)
    with tempfile.TemporaryDirectory() as folder, _saying(f"reading the rows of {config.data_source} for the plan"):
        found = Path(folder) / "lengths.json"
        for options in (["--without-torch"], []):  # seconds sooner, and enough for nearly every tokenizer
            # It needs no GPU, and must leave none of their memory in use.
            done = subprocess.run(
                [sys.executable, "-P", "-m", "parallel_tune.data.measure", str(found), *options],
                input=config.to_yaml(),
                text=True,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": "1", WATCHER: str(os.getpid())},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                check=False,
            )
            if found.exists():
                break
        else:
            last = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
            raise ConfigError(f"the rows of {config.dataset} could not be read: {last}", "Check --dataset and --model.")
        said = json.loads(found.read_text(encoding="utf-8"))
    if "message" in said:
        raise ConfigError(said["message"], said["hint"])
    known = said["lengths"], said["longest_held_out"]
    if kept is not None and lengths_file(config) == kept:  # else the data have changed meanwhile
        keep_lengths(kept, *known)
    return KnownRows(*known)


@contextmanager
def _saying(text: str) -> Iterator[None]:
    """Within it, a line on stderr once it has taken long."""
    late = threading.Timer(SILENT_SECONDS, partial(click.echo, text, err=True))
    late.daemon = True
    late.start()
    try:
        yield
    finally:
        late.cancel()
