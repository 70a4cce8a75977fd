"""The figures of one run, from the files of its directory: also of a run that failed, or still goes on."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel_tune import report
from parallel_tune.config import TrainConfig
from parallel_tune.rundir import RunDir, read_metrics, read_outcome
from strategies.contracts import Plan
from strategies.errors import ConfigError, Stopped

Row = dict[str, Any]


@dataclass(frozen=True)
class Totals:
    """Sums over a run's rows of metrics, so over all parts of a resumed run."""

    steps: int
    samples: int
    tokens: int
    seconds: float
    final_loss: float

    @property
    def samples_per_second(self) -> float | None:
        return self.samples / self.seconds if self.seconds > 0 else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds > 0 else None


@dataclass(frozen=True)
class RunFigures:
    """Everything that a page says of a run.

    Attributes:
        report: report.json; None if the run did not end well.
        training: rows of optimizer steps, in order.
        held_out: rows of evaluations, in order.
        timeline: the schedule of a split's last step, if the run wrote it.
        ended: how it ended, in words.
    """

    path: Path
    config: TrainConfig
    plan: Plan
    report: Row | None
    training: list[Row]
    held_out: list[Row]
    timeline: list[Row]
    ended: str

    @property
    def name(self) -> str:
        return self.config.run_name or self.path.name

    @property
    def earlier_plans(self) -> list[tuple[int, Plan]]:
        """Plans that the run had before it was planned anew, each with the last step that it holds for."""
        found = []
        for path in self.path.glob("plan-to-step-*.json"):
            # An old plan is no reason to show nothing.
            with contextlib.suppress(OSError, ValueError, ConfigError):
                step = int(path.stem.removeprefix("plan-to-step-"))
                found.append((step, Plan.from_json(path.read_text(encoding="utf-8"))))
        return sorted(found, key=lambda one: one[0])

    @property
    def totals(self) -> Totals:
        rows = self.training
        return Totals(
            steps=rows[-1]["step"],
            samples=sum(row.get("samples", 0) for row in rows),
            tokens=sum(row.get("tokens", 0) for row in rows),
            seconds=sum(row.get("seconds", 0.0) for row in rows),
            final_loss=rows[-1]["loss"],
        )

    @property
    def held_out_loss(self) -> float | None:
        """Of the result; of the last evaluation where the run did not end well; None without held-out rows."""
        if self.report is not None and self.report.get("held_out_loss_after") is not None:
            return float(self.report["held_out_loss_after"])
        return float(self.held_out[-1]["eval_loss"]) if self.held_out else None

    @property
    def kind(self) -> str:
        """What is trained: "full", "LoRA" or "QLoRA", with the rank."""
        if self.config.full_finetuning:
            return "full"
        return f"{'QLoRA' if self.config.load_in_4bit else 'LoRA'} r{self.config.r}"

    @property
    def versions(self) -> dict[str, str]:
        """Those of the run; of a run without a report, those installed here."""
        return self.report["versions"] if self.report else report.versions()

    def measured(self, place: int) -> Row:
        """Figures of the plan's device at a place; of a run without a report, what its rows of metrics say."""
        if self.report is not None:
            devices = self.report["devices"]
            return dict(devices[place]) if place < len(devices) else {}
        # With several processes the rows speak of the first one's device alone.
        if self.plan.processes > 1 and place > 0:
            return {}
        ordinal = self.plan.ordinals[place]
        devices = [device for row in self.training for device in row.get("devices", [])]
        seen = [device["allocated_bytes"] for device in devices if device["index"] == ordinal]
        return {"allocated_peak_bytes": max(seen)} if seen else {}

    @property
    def peak_bytes(self) -> int | None:
        """The most that any one device had in use; live tensors alone where that is all that is known."""
        peaks = [self.measured(place) for place in range(len(self.plan.devices))]
        sizes = [peak.get("used_peak_bytes", peak.get("allocated_peak_bytes")) for peak in peaks]
        return max((size for size in sizes if size is not None), default=None)


class NoStepYet(ConfigError):
    """Nothing has been trained in a run yet."""


def load(path: Path) -> RunFigures:
    """Read a run directory.

    Raises:
        NoStepYet: nothing has been trained in it yet.
        ConfigError: it is none, or damaged.
    """
    run = RunDir(path.absolute())
    config, plan = run.read()
    rows = read_metrics(run)
    training = [row for row in rows if isinstance(row.get("loss"), int | float)]
    if not training:
        raise NoStepYet(
            f"{path} has no training step in {run.metrics.name} yet", f"See {run.logs} for what became of the run."
        )
    return RunFigures(
        path=run.path,
        config=config,
        plan=plan,
        report=report.read(run.report) if run.report.exists() else None,
        training=training,
        held_out=[row for row in rows if isinstance(row.get("eval_loss"), int | float)],
        timeline=read_timeline(run.timeline),
        ended=_ended(run, plan),
    )


def read_timeline(path: Path) -> list[Row]:
    """Segments of one step of a split; none where there is no such file or it is not whole."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        segments = said["segments"] if isinstance(said, dict) else said
        return [
            {
                "stage": int(segment["stage"]),
                "micro_batch": int(segment["micro_batch"]),
                "direction": str(segment["direction"]),
                "start": float(segment["start"]),
                "end": float(segment["end"]),
            }
            for segment in segments
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _ended(run: RunDir, plan: Plan) -> str:
    outcomes = [outcome for rank in range(plan.processes) if (outcome := read_outcome(run, rank))]
    bad = next((outcome for outcome in outcomes if outcome.code not in (0, Stopped.exit_code)), None)
    if bad is not None:
        return f"failed: {bad.message}"
    stopped = next((outcome for outcome in outcomes if outcome.code == Stopped.exit_code), None)
    if stopped is not None:
        return stopped.message
    return "finished" if run.report.exists() else "not finished"
