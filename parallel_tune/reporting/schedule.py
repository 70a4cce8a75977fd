"""Schedules of optimizer steps: a row a device, a colour a micro-batch, and how busy each device was.

Several, such as a naive split and lanes, are drawn one below the other on one axis of time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel_tune.plan_view import short_name
from parallel_tune.reporting.axes import Axis, make_axis
from parallel_tune.reporting.html import Markup, join, tag
from parallel_tune.reporting.pictures import COLORS
from strategies.contracts import DevicePlan

WIDTH = 1100
LEFT, RIGHT = 150, 90
BAR, ROW, HEAD = 30, 40, 28
NUM_COLORS = 8
OPACITY = {"forward": 0.45, "backward": 1.0}
BETWEEN = 0.72
"""Opacity of the bars; the last stage does both directions in one go and stands between."""
LEGEND = "A colour and number is a micro-batch; pale is forward, full is backward, between them both in one go."


@dataclass(frozen=True)
class Schedule:
    """One step as it ran.

    Attributes:
        name: of what ran it; empty where it stands alone.
        segments: `strategies.visit.Segment` as dictionaries, seconds on any clock; never empty.
        places: index and name of each stage's device.
    """

    name: str
    segments: Sequence[dict[str, Any]]
    places: Sequence[tuple[int, str]]

    @property
    def begin(self) -> float:
        return float(min(segment["start"] for segment in self.segments))

    @property
    def seconds(self) -> float:
        """From the first start to the last end."""
        return float(max(segment["end"] for segment in self.segments)) - self.begin

    @property
    def title(self) -> str:
        """Name, length and mean busy share."""
        shares = busy_shares(self.segments)
        mean = sum(shares.values()) / len(shares)
        return f"{self.name}: {1e3 * self.seconds:,.0f} ms, devices {mean:.0%} busy on average"

    def label(self, stage: int) -> tuple[str, str]:
        """The two lines that name a row."""
        index, name = self.places[stage] if stage < len(self.places) else (stage, "")
        shared = len({index for index, _ in self.places}) < len(self.places)
        return f"device {index}", f"stage {stage}" if shared or not name else short_name(name)[:18]


def places_of(devices: Sequence[DevicePlan]) -> list[tuple[int, str]]:
    """Index and name of the devices of a plan."""
    return [(device.index, device.name) for device in devices]


def busy_shares(segments: Sequence[dict[str, Any]]) -> dict[int, float]:
    """The share of the step, from its first start to its last end, in which each stage worked."""
    begin, end = min(s["start"] for s in segments), max(s["end"] for s in segments)
    shares = {}
    for stage in sorted({s["stage"] for s in segments}):
        busy, until = 0.0, begin
        for segment in sorted((s for s in segments if s["stage"] == stage), key=lambda s: s["start"]):
            busy += max(0.0, segment["end"] - max(segment["start"], until))
            until = max(until, segment["end"])
        shares[stage] = busy / (end - begin) if end > begin else 0.0
    return shares


def shared_axis(schedules: Sequence[Schedule]) -> Axis:
    """Milliseconds from the begin of each step to the end of the longest."""
    return make_axis([1e3 * schedule.seconds for schedule in schedules], count=8, zero=True, tight=True)


def schedule_chart(schedules: Sequence[Schedule]) -> Markup:
    """The picture; nothing without schedules."""
    if not schedules:
        return Markup("")
    axis = shared_axis(schedules)
    heads = HEAD if any(schedule.name for schedule in schedules) else 0
    heights = [heads + ROW * len(busy_shares(schedule.segments)) for schedule in schedules]
    bottom = 4 + sum(heights)
    height = bottom + 36
    parts = []
    for tick, label in zip(axis.ticks, axis.labels(), strict=True):
        parts.append(tag("text", label, x=_x(axis, tick), y=bottom + 15, text_anchor="middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(tag("text", "time within the step (ms)", x=middle, y=height - 4, text_anchor="middle"))
    top = 8
    for schedule, needed in zip(schedules, heights, strict=True):
        if heads:
            parts.append(tag("text", schedule.title, x=0, y=top + 16, class_="ink"))
        for at in (_x(axis, tick) for tick in axis.ticks):
            parts.append(tag("line", x1=at, x2=at, y1=top + heads - 4, y2=top + needed - 4, class_="grid"))
        parts += _rows(schedule, axis, top + heads)
        top += needed
    several = len(schedules) > 1
    name = "Schedules of one step" if several else "Schedule of one step"
    svg = tag("svg", *parts, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=name)
    title = tag("h3", "One step of each as it ran" if several else "One step as it ran")
    return tag("figure", tag("figcaption", title, tag("span", LEGEND, class_="muted")), svg, class_="wide")


def draw_schedules(schedules: Sequence[Schedule], path: Path) -> None:
    """Draw the schedules below each other as a PNG. The file appears only when complete."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = [len(busy_shares(schedule.segments)) for schedule in schedules]
    figure = Figure(figsize=(12.4, 0.55 * sum(counts) + 0.9 * len(counts) + 0.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(counts), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": counts})
    axis = shared_axis(schedules)
    for panel, schedule in zip(panels.flatten(), schedules, strict=True):
        shares = busy_shares(schedule.segments)
        rows = {stage: place for place, stage in enumerate(shares)}
        panel.set_title((schedule.title if schedule.name else "One step").replace("$", r"\$"), loc="left", fontsize=11)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_axisbelow(True)
        panel.grid(axis="x", color="#d9dde5", linewidth=0.8)
        for segment in schedule.segments:
            start, end = (1e3 * (segment[which] - schedule.begin) for which in ("start", "end"))
            color = COLORS[segment["micro_batch"] % NUM_COLORS]
            opacity = OPACITY.get(segment["direction"], BETWEEN)
            panel.barh(rows[segment["stage"]], end - start, left=start, height=0.74, color=color, alpha=opacity)
            if end - start > 0.022 * axis.high:
                at = ((start + end) / 2, rows[segment["stage"]])
                panel.annotate(str(segment["micro_batch"]), at, ha="center", va="center", fontsize=8)
        names = [", ".join(schedule.label(stage)).replace("$", r"\$") for stage in rows]
        panel.set_yticks(range(len(rows)), names)
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.set_xticks(axis.ticks, axis.labels())
        panel.set_xlim(0, axis.high)
        for stage, place in rows.items():
            end = (1.005, 1 - (place + 0.5) / len(rows))
            panel.annotate(f"{shares[stage]:.0%} busy", end, xycoords="axes fraction", va="center", fontsize=9)
    panels.flatten()[-1].set_xlabel(f"time within the step (ms). {LEGEND}")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    figure.savefig(part, format="png")
    part.replace(path)


def _x(axis: Axis, milliseconds: float) -> float:
    return LEFT + axis.share(milliseconds) * (WIDTH - LEFT - RIGHT)


def _rows(schedule: Schedule, axis: Axis, top: int) -> list[Markup]:
    """The rows of one schedule, labels, bars and busy shares."""
    parts = []
    tops = {}
    for place, (stage, share) in enumerate(busy_shares(schedule.segments).items()):
        tops[stage] = top + place * ROW
        first, second = schedule.label(stage)
        parts.append(tag("text", first, x=0, y=tops[stage] + 13, class_="ink"))
        parts.append(tag("text", second, x=0, y=tops[stage] + 28))
        parts.append(tag("text", f"{share:.0%} busy", x=WIDTH - RIGHT + 10, y=tops[stage] + 20, class_="ink"))
    return parts + [_bar(segment, schedule.begin, axis, tops[segment["stage"]]) for segment in schedule.segments]


def _bar(segment: dict[str, Any], begin: float, axis: Axis, top: int) -> Markup:
    number, direction = segment["micro_batch"], segment["direction"]
    start, end = (1e3 * (segment[which] - begin) for which in ("start", "end"))
    left, right = _x(axis, start), _x(axis, end)
    opacity = OPACITY.get(direction, BETWEEN)
    width = max(right - left - 1, 1.0)
    box = tag(
        "rect", tag("title", f"micro-batch {number}, {direction}: {start:.1f} to {end:.1f} ms"), x=left, y=top,
        width=width, height=BAR, rx=2, class_=f"f{number % NUM_COLORS}", fill_opacity=opacity,
    )  # fmt: skip
    if width < 9 * len(str(number)):
        return box
    # On a pale bar the page's ink is read better.
    ink = "ink" if opacity < 0.6 else "on"
    return join(box, tag("text", str(number), x=left + width / 2, y=top + 20, text_anchor="middle", class_=ink))
