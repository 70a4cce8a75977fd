"""What a plan's devices need for the rows that a run has trained: what a measurement is held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from parallel_tune.config import TrainConfig
from parallel_tune.data.sizes import size_for
from parallel_tune.memory.closed_form import ClosedFormEstimator
from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.lookup import load_model_facts
from parallel_tune.memory.settings import MachineConstants
from parallel_tune.memory.unsloth_tape import ATTENTION_ROW, mean_spare_tokens, spare_tokens
from parallel_tune.planning import training_settings
from parallel_tune.sampler import GlobalBatches
from strategies.base import Estimator
from strategies.contracts import Arrangement, Device, DevicePlan, MemoryEstimate, Part, Plan


@dataclass(frozen=True)
class TrainedRows:
    """The lengths of rows, as far as memory depends on them.

    Attributes:
        longest: tokens of the longest row.
        largest_micro_batch: tokens of the largest micro-batch as the device sees it: padding is not counted, what fills
            it up to a fixed size is.
        alike: all rows have one length.
        padded_reason: why rows of a micro-batch are padded; None where they are joined.
        sizes: tokens of the sizes at which steps are captured, ascending, up to the largest; none where they are not.
        spare_tokens: by which Unsloth's attention fills a row up, on average.
    """

    longest: int
    largest_micro_batch: int
    alike: bool
    padded_reason: str | None
    sizes: tuple[int, ...] = ()
    spare_tokens: int | None = None

    def tokens_at_once(self, micro_batch: int) -> int:
        """Tokens of the largest micro-batch, padding included."""
        return self.largest_micro_batch if self.padded_reason is None else micro_batch * self.longest


def trained_rows(
    batches: GlobalBatches, plan: Plan, steps: int, padded_reason: str | None, sizes: Sequence[int] = ()
) -> TrainedRows:
    """The lengths among the first `steps` steps of a run."""
    arrangement = (plan.processes, plan.micro_batch, plan.gradient_accumulation_steps)
    tokens = batches.largest_micro_batch(steps, *arrangement)
    filled_up = size_for(tokens, sizes)
    return TrainedRows(
        longest=batches.longest_row(steps),
        largest_micro_batch=filled_up or tokens,
        alike=len(set(batches.lengths)) == 1,
        padded_reason=padded_reason,
        sizes=tuple(size for size in sizes if size <= (filled_up or 0)),
        spare_tokens=mean_spare_tokens(batches.lengths),
    )


def predict_for_rows(
    config: TrainConfig,
    plan: Plan,
    rows: TrainedRows,
    counted: Callable[[ClosedFormEstimator], Estimator] = lambda closed: closed,
) -> list[MemoryEstimate]:
    """What each device of a plan needs for rows whose lengths are known.

    A plan may count rows of the full sequence length, since it can be made before the data is known; this is the figure
    to hold against a measurement. Padded rows are all counted as long as the longest; of joined ones the sum counts.

    Args:
        counted: what estimates, given the closed form.
    """
    padding_free = rows.padded_reason is None
    facts = load_model_facts(config.model)
    settings = training_settings(config, facts, plan.engine, plan.dtype, padding_free)
    settings = replace(settings, sequence_length=rows.largest_micro_batch if padding_free else rows.longest)
    if rows.alike:
        settings = replace(settings, attention_mask=False)  # rows of one length need none
    if padding_free:
        settings = replace(settings, spare_tokens=_spare_tokens(plan, rows))
    # The eager pass that goes before a recording is kept beside it: that of a smaller size beside the largest.
    second_pass_tokens = rows.sizes[-2] if len(rows.sizes) > 1 else 0
    estimator = counted(
        ClosedFormEstimator(facts, settings, measured=constants_of(plan), second_pass_tokens=second_pass_tokens)
    )
    arrangement = replace(arrangement_of(plan), captured=bool(rows.sizes))
    if padding_free:
        arrangement = replace(arrangement, micro_batch=1)
    predicted = []
    for item in plan.devices:
        part = part_of(item, facts)
        device = Device(item.index, item.name, item.kind, item.capacity_bytes, item.free_bytes)
        predicted.append(estimator.memory(part, arrangement, device))
    return predicted


def _spare_tokens(plan: Plan, rows: TrainedRows) -> int:
    """By which Unsloth's attention fills up the largest micro-batch: each of its rows, or the whole of a fixed size."""
    if rows.sizes:
        return spare_tokens(rows.largest_micro_batch)
    of_a_row = rows.spare_tokens
    if of_a_row is None:  # an older run's
        of_a_row = spare_tokens(rows.longest) if rows.alike else ATTENTION_ROW // 2
    return plan.micro_batch * of_a_row


def constants_of(plan: Plan) -> dict[str, MachineConstants]:
    """The measured constants that a plan was made with, by the devices' names."""
    known: dict[str, Mapping[str, Any]] = {name: dict(values) for name, values in plan.constants.items()}
    return {name: MachineConstants(**values) for name, values in known.items()}


def arrangement_of(plan: Plan) -> Arrangement:
    """How a plan works off its global batch."""
    split = plan.processes == 1 and len(plan.devices) > 1
    return Arrangement(
        plan.processes,
        plan.micro_batch,
        plan.gradient_accumulation_steps,
        plan.gradient_checkpointing,
        lanes=plan.lanes,
        stages=len(plan.devices) if split else 1,
        captured=plan.captured,
    )


def part_of(device: DevicePlan, facts: ModelFacts) -> Part:
    """What of the model a planned device holds."""
    first, last = device.layers
    return Part(first, last, embedding=first == 0, head=last == facts.num_layers - 1)
