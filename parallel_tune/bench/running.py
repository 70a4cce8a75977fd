"""One real, short run of one arm in processes of its own, and its figures."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from parallel_tune import rundir
from parallel_tune.bench.arms import Arm
from parallel_tune.gauges import Gauge, open_gauge
from parallel_tune.launch import launch_spec
from parallel_tune.progress import MetricsFollower
from parallel_tune.report import read as read_report
from parallel_tune.reporting.figures import read_timeline
from parallel_tune.startup import clocks
from parallel_tune.watcher import Watcher
from strategies.errors import ParallelTuneError, RunFailed

SECONDS_BETWEEN_READINGS = 0.25


class Interrupted(RunFailed):
    """The user ended the benchmark."""


@dataclass(frozen=True)
class Timed:
    """What one run measured, ours or a reference's.

    Attributes:
        seconds, tokens, losses: of each step; no losses where the run does not tell them.
        skipped: steps at the beginning that are no part of any rate.
        samples: of each step.
        first_step_seconds: from the command to the end of the first step; None if unknown.
        devices: of each device its index, predicted and measured bytes, and the share of time in which it was busy.
        details: startup by phase, what was captured, versions.
    """

    seconds: list[float]
    tokens: list[float]
    samples: list[float]
    losses: list[float]
    skipped: int
    first_step_seconds: float | None = None
    devices: list[dict[str, Any]] = field(default_factory=list)
    timeline: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def counted_seconds(self) -> list[float]:
        return self.seconds[self.skipped :]

    @property
    def tokens_per_second(self) -> float:
        return sum(self.tokens[self.skipped :]) / sum(self.counted_seconds)

    @property
    def samples_per_second(self) -> float:
        return sum(self.samples[self.skipped :]) / sum(self.counted_seconds)


def run_arm(arm: Arm, steps: int, skipped: int, folder: Path) -> Timed:
    """Train `steps` steps as the arm's plan says, into a run directory of its own; the weights are not kept.

    Raises:
        Interrupted: a signal ended it.
        ParallelTuneError: it failed, and why.
    """
    assert arm.plan is not None
    config = arm.config.replace(max_steps=steps, output_dir=str(folder))
    run = rundir.create(config, arm.plan)
    # What planning took is part of a command, though it was done once for all repetitions.
    environ = os.environ | clocks(time.monotonic() - arm.plan_seconds)
    spec = launch_spec(arm.plan, run, environ, psutil.cpu_count(logical=True) or 1)
    busy = _Busy(_gauge(arm, run), run.metrics, skipped, steps)
    watcher = Watcher(arm.plan.processes, run, spec, busy.poll)
    try:
        watcher.run()
    except ParallelTuneError as error:
        if watcher.signalled:
            raise Interrupted("the benchmark was stopped by a signal", "") from error
        raise
    finally:
        # A full model for each repetition would fill a disk.
        for path in (run.result(config), *run.path.glob("checkpoint-*")):
            shutil.rmtree(path, ignore_errors=True)
    timeline = read_timeline(run.timeline)
    return _figures(read_report(run.report), rundir.read_metrics(run), skipped, busy.shares(), timeline)


def _figures(
    report: dict[str, Any],
    rows: list[dict[str, Any]],
    skipped: int,
    busy: list[float | None],
    timeline: list[dict[str, Any]],
) -> Timed:
    devices = []
    for place, device in enumerate(report["devices"]):
        seen = busy[place] if place < len(busy) else None
        # Of a split the recorded schedule of a step says it exactly.
        devices.append({**device, "busy_share": device.get("busy_share", seen)})
    startup = report["startup_seconds"]
    return Timed(
        seconds=[row["seconds"] for row in rows],
        tokens=[row["tokens"] for row in rows],
        samples=[row["samples"] for row in rows],
        losses=[row["loss"] for row in rows],
        skipped=skipped,
        first_step_seconds=startup["total"],
        devices=devices,
        timeline=timeline,
        details={
            "startup_seconds": startup,
            "padding_free": report["padding_free"],
            "captured": report.get("captured"),
            "lanes": report.get("lanes"),
            "versions": report["versions"],
        },
    )


def _gauge(arm: Arm, run: rundir.RunDir) -> Gauge | None:
    assert arm.plan is not None
    try:
        return open_gauge(arm.plan, run, os.environ)
    except Exception:  # whatever the driver's library raises; the share is then unknown, and shown as such
        return None


class _Busy:
    """How busy each device was, on average over the steps that count."""

    def __init__(self, gauge: Gauge | None, metrics: Path, skipped: int, steps: int) -> None:
        self._gauge = gauge
        self._follower = MetricsFollower(metrics)
        self._counted = range(skipped, steps)
        self._rows = 0
        self._last = 0.0
        self._seen: list[list[float | None]] = []

    def poll(self) -> None:
        """Read the devices when it is time."""
        if self._gauge is None or time.monotonic() - self._last < SECONDS_BETWEEN_READINGS:
            return
        self._last = time.monotonic()
        self._rows += len(self._follower.poll())
        if self._rows in self._counted:
            self._seen.append([reading.busy_share if reading else None for reading in self._gauge()])

    def shares(self) -> list[float | None]:
        """One share a device, None where it cannot be read; none at all where the steps were too short for readings."""
        # The first reading of a process has no time before it.
        columns = zip(*self._seen[1:], strict=True)
        means = [[share for share in column if share is not None] for column in columns]
        return [sum(column) / len(column) if column else None for column in means]
