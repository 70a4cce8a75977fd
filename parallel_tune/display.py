"""What a person sees of a run in the terminal: a live panel, or plain lines where there is no terminal."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import click
from rich.console import Console

from parallel_tune.data_part import DataPart
from parallel_tune.disk import full_disk
from parallel_tune.gauges import Gauge, Reading, open_gauge
from parallel_tune.live import LivePanel
from parallel_tune.progress import MetricsFollower, duration, steps_of
from parallel_tune.rundir import RunDir
from parallel_tune.startup import startup_line
from strategies.contracts import Plan


class View(Protocol):
    """One way of showing rows of metrics."""

    def start(self) -> None: ...

    def show(self, rows: list[dict[str, Any]]) -> None: ...

    def tell(self, lines: list[str]) -> None: ...

    def stop(self) -> None: ...


class PlainLines:
    """A line a row."""

    def __init__(self, global_batch: int) -> None:
        self._global_batch = global_batch

    def start(self) -> None:
        pass

    def show(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            click.echo(format_row(row, self._global_batch))

    def tell(self, lines: list[str]) -> None:
        for line in lines:
            click.echo(line)

    def stop(self) -> None:
        pass


def _version(path: Path | None) -> tuple[int, int] | None:
    """What tells a file from one that is later put in its place; None if there is none."""
    if path is None or not path.exists():
        return None
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


class Display:
    """Follows a run's metrics and shows them, after what its data adds to the plan. An error of the display ends the
    display, never the run. Once the run's disk is full, it says so."""

    def __init__(
        self, follower: MetricsFollower, view: View, data: Path | None = None, disk: Path | None = None
    ) -> None:
        self._follower = follower
        self._data = data
        # A run that goes on has one from before, which may be of other rows.
        self._data_before = _version(data)
        self._disk = disk
        self._view: View | None = view
        self._guard(view.start)

    def poll(self) -> None:
        """Show what is new."""
        view = self._view
        if view is not None and self._data is not None and _version(self._data) not in (None, self._data_before):
            data, self._data = self._data, None
            self._guard(lambda: view.tell(DataPart.load(data).lines()))
        if view is not None and self._disk is not None and (full := full_disk(self._disk)):
            self._disk = None
            self._guard(lambda: view.tell([f"{full}; training goes on, without checkpoints until there is room"]))
        if self._view is not None and view is not None:
            self._guard(lambda: view.show(self._follower.poll()))

    def close(self) -> None:
        if self._view is not None:
            self._guard(self._view.stop)
        self._view = None

    def _guard(self, action: Any) -> None:
        view = self._view
        try:
            action()
        except Exception as error:
            self._view = None
            try:
                if view is not None:
                    view.stop()
                click.echo(f"no more display: {type(error).__name__}: {error}; the run goes on", err=True)
            except Exception:
                return  # nowhere left to say it


@contextmanager
def open_display(plan: Plan, run: RunDir) -> Iterator[Display]:
    """Show the run while the block runs; before that, what the GPUs have in use already."""
    follower = MetricsFollower(run.metrics)
    gauge = _gauge(plan, run)
    if gauge is not None:
        for line in status_lines(plan, gauge()):
            click.echo(line)
    console = Console()
    view: View = PlainLines(plan.global_batch)
    if console.is_terminal and not console.is_dumb_terminal:
        view = LivePanel(plan, console, gauge)
    display = Display(follower, view, run.data, run.path)
    try:
        yield display
    finally:
        display.close()


def _gauge(plan: Plan, run: RunDir) -> Gauge | None:
    try:
        return open_gauge(plan, run, os.environ)
    except Exception as error:
        click.echo(f"devices cannot be watched: {type(error).__name__}: {error}", err=True)
        return None


def status_lines(plan: Plan, readings: list[Reading | None]) -> list[str]:
    """GPUs before the start, a line each."""
    return [
        f"GPU {device.index} {device.name}: {gib(reading.used_bytes)} of {gib(device.capacity_bytes)} in use, "
        f"{reading.busy_share:.0%} busy; {gib(device.predicted_peak_bytes)} predicted"
        for device, reading in zip(plan.devices, readings, strict=True)
        if device.kind == "cuda" and reading is not None
    ]


def format_row(row: dict[str, Any], global_batch: int) -> str:
    """One row for people."""
    if "eval_loss" in row:
        return f"step {row['step']:>5}          held-out loss {row['eval_loss']:.4f}"
    left = (row["max_steps"] - row["step"]) * row["seconds"] / steps_of(row, global_batch)
    rate = row["tokens_per_second"]
    return (
        f"step {row['step']:>5}/{row['max_steps']:<5}    loss {row['loss']:.4f}   "
        f"lr {row['learning_rate']:.2e}   {rate or 0:>8,.0f} tok/s   {duration(left)} left"
    )


def summary(report: dict[str, Any], run: Path) -> str:
    """The end of a run: what came out, and memory predicted against measured."""
    lines = [
        "",
        f"{report['strategy']} with {report['engine']}: {report['steps']} steps, {report['samples']} samples, "
        f"{report['tokens']:,} tokens in {duration(report['seconds'])}, {report['tokens_per_second'] or 0:,.0f} tok/s",
    ]
    if "startup_seconds" in report:
        lines.append(startup_line(report["startup_seconds"]))
    if "held_out_loss_before" in report:
        before, after = report["held_out_loss_before"], report["held_out_loss_after"]
        lines.append(f"held-out loss {before:.4f} -> {after:.4f}")
    if "stopped_early_at_step" in report:
        lines.append(f"stopped early after step {report['stopped_early_at_step']}: the held-out loss fell no more")
    if "best_step" in report:
        lines.append(f"the result has the weights of step {report['best_step']}, the best evaluation")
    if "missed_checkpoints" in report:
        steps = ", ".join(map(str, report["missed_checkpoints"]))
        lines.append(f"checkpoints that could not be written: of step {steps}; the log of rank 0 says why")
    measured = [device for device in report["devices"] if "allocated_peak_bytes" in device]
    if measured:
        lines.append(
            f"{'device':<8}{'predicted':>12}{'in use':>12}{'off by':>9}{'tensors':>12}{'predicted':>12}{'off by':>9}"
        )
        for device in measured:
            used, allocated = device["used_peak_bytes"], device["allocated_peak_bytes"]
            predicted_used, predicted = device["predicted_peak_bytes"], device["predicted_allocated_bytes"]
            lines.append(
                f"{device['index']:<8}{gib(predicted_used):>12}{gib(used):>12}{predicted_used / used - 1:>+9.1%}"
                f"{gib(allocated):>12}{gib(predicted):>12}{predicted / allocated - 1:>+9.1%}"
            )
    if (run / "profile").is_dir():
        lines.append(f"profile: {run / 'profile'}")
    lines.append(f"result: {run / report['result']}")
    return "\n".join(lines)


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
