"""report.html: one run, on a page that needs nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
from pathlib import Path

import click

from parallel_tune.plan_view import facts, headline, short_name
from parallel_tune.progress import duration
from parallel_tune.reporting.figures import NoStepYet, Row, RunFigures, load
from parallel_tune.reporting.html import Markup, join, page, table, tag
from parallel_tune.reporting.line_chart import Curve, Frame, line_chart
from parallel_tune.reporting.memory_chart import memory_section
from parallel_tune.reporting.schedule import Schedule, places_of, schedule_chart
from parallel_tune.rundir import write_atomically

LOSS = "loss per predicted token (nats)"
STEP = "optimizer step"
SMOOTH_FROM = 50
"""From this many rows on, the loss gets a smoothed curve beside it."""


def write_page(path: Path) -> Path:
    """Write RUN/report.html anew and return its path.

    Raises:
        ConfigError: the folder is no run, or nothing has been trained in it yet.
    """
    run = load(path)
    target = run.path / "report.html"
    write_atomically(target, render(run))
    return target


def try_to_write_page(path: Path) -> None:
    """Write the page at the end of a run, however it ended. What goes wrong here must not hide how it did."""
    try:
        said = f"report: {write_page(path)}"
    except NoStepYet:
        return
    except Exception as error:
        said = f"no report.html: {type(error).__name__}: {error}"
    with contextlib.suppress(OSError):  # nobody may read any more
        click.echo(said, err=said.startswith("no "))


def render(run: RunFigures) -> str:
    """The page of a run."""
    model = run.config.model.rstrip("/").rpartition("/")[2]
    ended = tag("p", run.ended, class_="bad" if run.ended.startswith("failed") else "muted")
    return page(
        f"{run.name}: {model}",
        tag("h1", model),
        tag("p", headline(run.plan), f" · {run.kind} · {run.config.data_source}", class_="muted"),
        *(tag("p", f"until step {step}: {headline(plan)}", class_="muted") for step, plan in run.earlier_plans),
        ended if run.ended != "finished" else "",
        _facts(run),
        tag("h2", "Training"),
        _charts(run),
        tag("h2", "Memory"),
        memory_section(run),
        *_schedule(run),
        tag("h2", "Plan"),
        _plan(run),
        tag("h2", "Settings and versions"),
        _settings(run),
    )


def _schedule(run: RunFigures) -> list[Markup]:
    if not run.timeline:
        return []
    schedule = Schedule("", run.timeline, places_of(run.plan.devices))
    return [tag("h2", "Schedule"), schedule_chart([schedule])]


def _facts(run: RunFigures) -> Markup:
    totals = run.totals
    planned = run.training[-1].get("max_steps", totals.steps)
    said = [
        ("optimizer steps", f"{totals.steps:,}" if planned == totals.steps else f"{totals.steps:,} of {planned:,}"),
        ("samples", f"{totals.samples:,}"),
        ("tokens", f"{totals.tokens:,}"),
        ("training time", duration(totals.seconds)),
        ("tokens/s", f"{totals.tokens_per_second or 0:,.0f}"),
        ("samples/s", f"{totals.samples_per_second or 0:,.2f}"),
        ("final training loss", f"{totals.final_loss:.4f}"),
    ]
    if run.report and "startup_seconds" in run.report:
        said.append(("command to first step", duration(run.report["startup_seconds"]["total"])))
    if run.held_out:
        first, last = run.held_out[0]["eval_loss"], run.held_out[-1]["eval_loss"]
        change = f"{first:.4f} → {last:.4f}" if len(run.held_out) > 1 else f"{last:.4f}"
        said.append(("held-out loss", change))
    if run.report and "best_step" in run.report:
        said.append((f"of the result: step {run.report['best_step']}", f"{run.report['held_out_loss_after']:.4f}"))
    return tag(
        "div", *(tag("div", tag("b", value), tag("span", name), class_="fact") for name, value in said), class_="facts"
    )


def _charts(run: RunFigures) -> Markup:
    charts = [
        line_chart(Frame("Loss by step", STEP, LOSS, whole_x=True), _losses(run, "step")),
        line_chart(Frame("Loss by epoch", "epoch", LOSS), _losses(run, "epoch")),
        line_chart(
            Frame("Learning rate", STEP, "learning rate", whole_x=True, zero=True),
            [Curve("learning rate", points(run.training, "step", "learning_rate"), color=2)],
        ),
        line_chart(
            Frame("Throughput", STEP, "tokens per second", whole_x=True, zero=True),
            [
                Curve("each step", points(run.training, "step", "tokens_per_second"), color=3),
                *_predicted_throughput(run),
            ],
        ),
    ]  # fmt: skip
    return tag("div", *charts, class_="charts")


def _losses(run: RunFigures, over: str) -> list[Curve]:
    training = points(run.training, over, "loss")
    curves = [Curve("training", training, color=0)]
    if len(training) >= SMOOTH_FROM:
        window = max(2, len(training) // 50) * 2 + 1
        curves = [
            Curve("training, each step", training, color=7, width=1.0),
            Curve(f"training, mean of {window} steps", smooth(training, window), color=0, width=2.5),
        ]
    return [*curves, Curve("held out", points(run.held_out, over, "eval_loss"), color=1)]


def _predicted_throughput(run: RunFigures) -> list[Curve]:
    rate = run.plan.predicted_tokens_per_second
    # For rows of full length, which a CPU's or a short run's rows seldom are: shown where it says something.
    steps = [row["step"] for row in run.training]
    best = max((row.get("tokens_per_second") or 0.0 for row in run.training), default=0.0)
    if rate <= 0 or not best / 4 <= rate <= best * 4:
        return []
    return [Curve("predicted, rows full", [(steps[0], rate), (steps[-1], rate)], color=8, width=1.5, dash="5 4")]


def points(rows: list[Row], x: str, y: str) -> list[tuple[float, float]]:
    """The rows that have both values; one that is not finite has no place on an axis."""
    pairs = [(float(row[x]), float(row[y])) for row in rows if row.get(x) is not None and row.get(y) is not None]
    return [pair for pair in pairs if all(map(math.isfinite, pair))]


def smooth(values: list[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Means over the points around each, as many before as behind, so that a falling curve is not moved."""
    means = []
    for place, (x, _) in enumerate(values):
        half = min(window // 2, place, len(values) - 1 - place)
        around = values[place - half : place + half + 1]
        means.append((x, sum(y for _, y in around) / len(around)))
    return means


def _plan(run: RunFigures) -> Markup:
    plan = run.plan
    devices = table(
        ["device", "layers", "planned peak (GiB)", "free before (GiB)", "in all (GiB)"],
        [
            [
                f"{device.index} {short_name(device.name)}",
                f"{device.layers[0]}–{device.layers[1]}",
                *(
                    f"{size / 2**30:.2f}"
                    for size in (device.predicted_peak_bytes, device.free_bytes, device.capacity_bytes)
                ),
            ]
            for device in plan.devices
        ],
    )
    said = [[part.strip() for part in text.split("  ", 1)] for text in facts(plan)]
    said += [["why", reason] for reason in plan.reasons]
    said += [["figures", source] for source in plan.basis]
    said += [["not taken", f"{rejection.strategy}: {rejection.reason}"] for rejection in plan.rejected]
    if plan.launch:
        said.append(["command", shlex.join(plan.launch)])
    return join(devices, table(["", ""], said, text_columns=2))


def _settings(run: RunFigures) -> Markup:
    settings = {item.name: getattr(run.config, item.name) for item in dataclasses.fields(run.config)}
    rows = [
        [name, _value(value)] for name, value in settings.items() if value is not None and not name.endswith("_token")
    ]
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    return join(
        tag("p", versions if run.report else f"{versions} (installed when this page was made)"),
        tag("details", tag("summary", f"{len(rows)} settings"), table(["setting", "value"], rows, text_columns=2)),
    )


def _value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
