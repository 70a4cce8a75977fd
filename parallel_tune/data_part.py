"""The data part of a plan: what is known once the rows' lengths are. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from parallel_tune.outcome import write_atomically
from parallel_tune.sampler import GlobalBatches
from strategies.contracts import MemoryEstimate, Plan

if TYPE_CHECKING:
    from parallel_tune.data.rows import DataReport

GIB = 2**30


@dataclass(frozen=True)
class Packed:
    """Sequences that hold several rows each.

    Attributes:
        rows: rows in all of them.
        sequences: how many there are.
        filled: the share of `sequences` x `sequence_length` tokens that rows take.
    """

    rows: int
    sequences: int
    sequence_length: int
    filled: float


@dataclass(frozen=True)
class DataPart:
    """What the data adds to a plan.

    Attributes:
        summary: the dataset in a line.
        steps_per_epoch: optimizer steps.
        padded_reason: why rows of a micro-batch are padded; None where they are joined.
        padding_share: of all positions of an epoch's micro-batches, were they padded, those that are padding.
        packed: what packing made, if it was asked for.
        planned_peak_bytes: of each device, as planned.
        predicted_peak_bytes: of each device, for the rows of the first epoch.
        begun_with: the summary of what the run began with, where a resume found another dataset; else None.
    """

    summary: str
    steps_per_epoch: int
    padded_reason: str | None
    padding_share: float
    packed: Packed | None
    planned_peak_bytes: Sequence[int]
    predicted_peak_bytes: Sequence[int]
    begun_with: str | None = None

    def lines(self) -> list[str]:
        """For people."""
        said = [f"data           {self.summary}"]
        if self.begun_with is not None:
            said.append(f"               CHANGED: the run began with {self.begun_with}")
            said.append("               the order of rows is another: some are learned twice, some not at all")
        if self.packed:
            said.append(
                f"packing        {self.packed.rows:,} rows in {self.packed.sequences:,} sequences of at most "
                f"{self.packed.sequence_length:,} tokens, {self.packed.filled:.1%} full; a batch counts sequences"
            )
        if self.padded_reason is None:
            said.append(f"padding        none: rows are joined, which saves {self.padding_share:.1%} of all positions")
        else:
            said.append(
                f"padding        {self.padding_share:.1%} of all positions: rows are padded, since {self.padded_reason}"
            )
        said.append(f"steps          {self.steps_per_epoch:,} an epoch")
        peak = max(self.predicted_peak_bytes)
        place = self.predicted_peak_bytes.index(peak)
        said.append(
            f"memory         {peak / GIB:.1f} GiB predicted for these rows on the fullest device, "
            f"{self.planned_peak_bytes[place] / GIB:.1f} GiB planned"
        )
        return said

    def after(self, path: Path) -> DataPart:
        """The same for a run that goes on, and whose `path` says what it found before."""
        try:
            before = DataPart.load(path)
        except (OSError, ValueError, KeyError, TypeError):
            return self
        first = before.begun_with or before.summary
        return replace(self, begun_with=None if first == self.summary else first)

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, path: Path) -> DataPart:
        """Read what `save` wrote."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        raw["packed"] = Packed(**raw["packed"]) if raw["packed"] else None
        return cls(**raw)


def describe_data(
    report: DataReport,
    batches: GlobalBatches,
    row_lengths: Sequence[Sequence[int]],
    plan: Plan,
    sequence_length: int,
    padded_reason: str | None,
    predicted: Sequence[MemoryEstimate],
) -> DataPart:
    """The data part of a plan.

    Args:
        batches: what meets in which step; its samples are rows, or packed sequences.
        row_lengths: tokens of the rows of each sample; one of each unless they are packed.
        predicted: what each device needs for these rows.
    """
    packed = None
    if report.sequences:
        tokens = sum(batches.lengths)
        count = sum(len(lengths) for lengths in row_lengths)
        packed = Packed(count, len(row_lengths), sequence_length, tokens / (len(row_lengths) * sequence_length))
    return DataPart(
        summary=report.summary(),
        steps_per_epoch=batches.steps_per_epoch,
        padded_reason=padded_reason,
        padding_share=padding_share(replace(batches, joined=False), row_lengths, plan),
        packed=packed,
        planned_peak_bytes=tuple(device.predicted_peak_bytes for device in plan.devices),
        predicted_peak_bytes=tuple(estimate.peak_bytes for estimate in predicted),
    )


def padding_share(batches: GlobalBatches, row_lengths: Sequence[Sequence[int]], plan: Plan) -> float:
    """Of all positions that the first epoch's micro-batches have when their rows are padded, those that are padding."""
    tokens = positions = 0
    for step in range(batches.steps_per_epoch):
        arrangement = (plan.processes, plan.micro_batch, plan.gradient_accumulation_steps)
        for rank in batches.micro_batches(step, *arrangement):
            for samples in rank:
                rows = [length for sample in samples for length in row_lengths[sample]]
                tokens += sum(rows)
                positions += len(rows) * max(rows, default=0)
    return 1 - tokens / positions
