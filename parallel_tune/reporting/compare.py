"""Several runs side by side: a table, and their curves over steps, epochs and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import click

from parallel_tune.progress import duration
from parallel_tune.reporting.axes import size
from parallel_tune.reporting.figures import Row, RunFigures, load
from parallel_tune.reporting.html import page, table, tag
from parallel_tune.reporting.line_chart import Curve, Frame, Point, line_chart
from parallel_tune.reporting.pictures import MISSING, draw, have_matplotlib
from parallel_tune.reporting.run_page import LOSS, STEP, points
from parallel_tune.reporting.schedule import Schedule, draw_schedules, places_of, schedule_chart
from parallel_tune.rundir import write_atomically
from strategies.errors import ConfigError

HEAD = ["run", "strategy", "engine", "trained", "processes", "global batch", "steps", "samples", "tokens", "time"]
HEAD += ["samples/s", "tokens/s", "final loss", "held-out loss", "peak memory"]
TEXT_COLUMNS = 4
MOST_RUNS = 10
WIDEST_RIM = 8.0
"""How much wider than its own line the lowest of curves that coincide may be, in points."""


@dataclass(frozen=True)
class Chart:
    """A frame and its curves, drawn alike as SVG and as PNG."""

    frame: Frame
    curves: Sequence[Curve]


def compare(paths: Sequence[Path], output: Path) -> None:
    """Print the table, and write compare.html, compare.png and, where splits are among the runs, schedule.png.

    Raises:
        ConfigError: a folder is no run, there are too many, or the output cannot be written.
    """
    if len(paths) > MOST_RUNS:
        raise ConfigError(f"{len(paths)} runs are too many for one picture", f"Give at most {MOST_RUNS}.")
    runs = [load(path) for path in paths]
    names = unique_names(runs)
    charts = make_charts(runs, names)
    click.echo(text_table(runs, names))
    try:
        output.mkdir(parents=True, exist_ok=True)
        html, png = output / "compare.html", output / "compare.png"
        write_atomically(html, render(runs, names, charts))
        if have_matplotlib():
            draw([(chart.frame, chart.curves) for chart in charts], png, speed_rows(runs, names))
            if schedules := schedules_of(runs, names):
                draw_schedules(schedules, output / "schedule.png")
    except OSError as error:
        raise ConfigError(f"cannot write into {output}: {error.strerror}", "Choose another --output.") from error
    click.echo(f"\nwritten: {html}")
    click.echo(f"written: {png}" if have_matplotlib() else MISSING)
    if have_matplotlib() and schedules_of(runs, names):
        click.echo(f"written: {output / 'schedule.png'}")


def schedules_of(runs: Sequence[RunFigures], names: Sequence[str]) -> list[Schedule]:
    """The last step of each run that split its model."""
    return [
        Schedule(name, run.timeline, places_of(run.plan.devices))
        for run, name in zip(runs, names, strict=True)
        if run.timeline
    ]


def unique_names(runs: Sequence[RunFigures]) -> list[str]:
    """A name for each run; folders of one name are told apart by their parents."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} ({run.path.parent.name}/{run.path.name})"
        for name, run in zip(names, runs, strict=True)
    ]


def row(run: RunFigures, name: str) -> list[str]:
    """What the table says of a run."""
    totals, peak, held_out = run.totals, run.peak_bytes, run.held_out_loss
    return [
        name,
        run.plan.strategy,
        run.plan.engine,
        run.kind,
        str(run.plan.processes),
        str(run.plan.global_batch),
        f"{totals.steps:,}",
        f"{totals.samples:,}",
        f"{totals.tokens:,}",
        duration(totals.seconds),
        f"{totals.samples_per_second or 0:,.2f}",
        f"{totals.tokens_per_second or 0:,.0f}",
        f"{totals.final_loss:.4f}",
        f"{held_out:.4f}" if held_out is not None else "–",
        size(peak) if peak is not None else "–",
    ]


def speed_rows(runs: Sequence[RunFigures], names: Sequence[str]) -> list[list[str]]:
    """The rows of the picture's table, its head first."""
    shown = ("run", "trained", "processes", "samples/s", "tokens/s", "final loss")
    rows = [HEAD, *(row(run, name) for run, name in zip(runs, names, strict=True))]
    return [[cells[HEAD.index(name)] for name in shown] for cells in rows]


def text_table(runs: Sequence[RunFigures], names: Sequence[str]) -> str:
    """The table for the terminal: a column a run, so that it stays narrow."""
    columns = [HEAD, *(row(run, name) for run, name in zip(runs, names, strict=True))]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for cells in zip(*columns, strict=True):
        first, *others = cells
        lines.append(
            "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))])
        )
    return "\n".join(lines)


def make_charts(runs: Sequence[RunFigures], names: Sequence[str]) -> list[Chart]:
    """Loss and epochs over steps, loss over time, tokens per second."""
    by_step = [points(run.training, "step", "loss") for run in runs]
    epochs = [[(0.0, 0.0), *points(run.training, "step", "epoch")] for run in runs]
    speed = [points(run.training, "step", "tokens_per_second") for run in runs]
    over_seconds = [over_time(run) for run in runs]
    return [
        Chart(Frame("Training loss by step", STEP, LOSS, whole_x=True), nested_curves(names, by_step)),
        Chart(Frame("Epochs done by step", STEP, "epochs", whole_x=True, zero=True), nested_curves(names, epochs)),
        Chart(Frame("Training loss over time", "training time (s)", LOSS), nested_curves(names, over_seconds)),
        Chart(Frame("Throughput", STEP, "tokens per second", whole_x=True, zero=True), nested_curves(names, speed)),
    ]


def nested_curves(names: Sequence[str], of_runs: Sequence[list[Point]]) -> list[Curve]:
    """A curve a run. At one global batch runs coincide by steps: the earlier is then drawn wider, and all are seen."""
    over = [sum(coincide(mine, other) for other in of_runs[place + 1 :]) for place, mine in enumerate(of_runs)]
    rim = min(2.5, WIDEST_RIM / max(1, *over))
    return [
        Curve(name, mine, place, 2.0 + rim * above)
        for place, (name, mine, above) in enumerate(zip(names, of_runs, over, strict=True))
    ]


def coincide(one: list[Point], other: list[Point]) -> bool:
    """Whether curves differ by less than the eye sees, 1% of their range, at most of the places that they share."""
    there = dict(other)
    shared = [(y, there[x]) for x, y in one if x in there and x > 0]
    values = [y for pair in shared for y in pair]
    return bool(shared) and median(abs(a - b) for a, b in shared) <= 0.01 * (max(values) - min(values))


def over_time(run: RunFigures) -> list[Point]:
    """(seconds of training so far, loss)."""
    seconds, result = 0.0, list[Row]()
    for step in run.training:
        seconds += step.get("seconds", 0.0)
        result.append({"seconds": seconds, "loss": step["loss"]})
    return points(result, "seconds", "loss")


def render(runs: Sequence[RunFigures], names: Sequence[str], charts: Sequence[Chart]) -> str:
    """compare.html."""
    models = sorted({run.config.model.rstrip("/").rpartition("/")[2] for run in runs})
    rows = [row(run, name) for run, name in zip(runs, names, strict=True)]
    schedules = schedules_of(runs, names)
    trained = HEAD.index("trained")
    rows = [[*cells[:trained], cells[trained].replace(" ", "\u00a0"), *cells[trained + 1 :]] for cells in rows]
    return page(
        f"{len(runs)} runs compared",
        tag("h1", f"{len(runs)} runs compared"),
        tag("p", ", ".join(models), class_="muted"),
        tag("h2", "Figures"),
        table(HEAD, rows, TEXT_COLUMNS),
        tag("h2", "Curves"),
        tag("div", *(line_chart(chart.frame, chart.curves) for chart in charts), class_="charts"),
        *([tag("h2", "Schedules"), schedule_chart(schedules)] if schedules else []),
    )
