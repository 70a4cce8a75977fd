"""The schedule of one pipelined step: a row a device, a colour a micro-batch, and how busy each device was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from parallel_tune.plan_view import short_name
from parallel_tune.reporting.axes import make_axis
from parallel_tune.reporting.html import Markup, join, tag
from strategies.contracts import DevicePlan

WIDTH = 1100
LEFT, RIGHT = 150, 90
BAR, ROW = 30, 40
COLORS = 8
OPACITY = {"forward": 0.45, "backward": 1.0}
"""Of the bars; the last stage does both in one go and stands between."""


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


def schedule_chart(segments: Sequence[dict[str, Any]], devices: Sequence[DevicePlan]) -> Markup:
    """The picture; nothing without segments."""
    if not segments:
        return Markup("")
    shares = busy_shares(segments)
    begin = min(s["start"] for s in segments)
    axis = make_axis([1e3 * (s["end"] - begin) for s in segments], count=8, zero=True, tight=True)
    shared = len({device.index for device in devices}) < len(devices)
    rows = {stage: place for place, stage in enumerate(shares)}
    height = 8 + ROW * len(rows) + 40

    def x(seconds: float) -> float:
        return LEFT + axis.share(1e3 * (seconds - begin)) * (WIDTH - LEFT - RIGHT)

    parts = []
    bottom = height - 36
    for tick, label in zip(axis.ticks, axis.labels(), strict=True):
        at = LEFT + axis.share(tick) * (WIDTH - LEFT - RIGHT)
        parts.append(tag("line", x1=at, x2=at, y1=4, y2=bottom, class_="grid"))
        parts.append(tag("text", label, x=at, y=bottom + 15, text_anchor="middle"))
    parts.append(
        tag("text", "time within the step (ms)", x=(LEFT + WIDTH - RIGHT) / 2, y=height - 4, text_anchor="middle")
    )
    for stage, place in rows.items():
        top = 8 + place * ROW
        name = short_name(devices[stage].name)[:18] if stage < len(devices) and not shared else f"stage {stage}"
        index = devices[stage].index if stage < len(devices) else stage
        parts.append(tag("text", f"device {index}", x=0, y=top + 13, class_="ink"))
        parts.append(tag("text", name, x=0, y=top + 28))
        parts.append(tag("text", f"{shares[stage]:.0%} busy", x=WIDTH - RIGHT + 10, y=top + 20, class_="ink"))
    parts += [_bar(s, x(s["start"]), x(s["end"]), 8 + rows[s["stage"]] * ROW, begin) for s in segments]
    svg = tag("svg", *parts, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label="Schedule of one step")
    said = "A colour and number is a micro-batch; pale is forward, full is backward, between them both in one go."
    title = tag("h3", "One step as it ran")
    return tag("figure", tag("figcaption", title, tag("span", said, class_="muted")), svg, class_="wide")


def _bar(segment: dict[str, Any], start: float, end: float, top: int, begin: float) -> Markup:
    number, direction = segment["micro_batch"], segment["direction"]
    title = (
        f"micro-batch {number}, {direction}: "
        f"{1e3 * (segment['start'] - begin):.1f} to {1e3 * (segment['end'] - begin):.1f} ms"
    )
    opacity = OPACITY.get(direction, 0.72)
    width = max(end - start - 1, 1.0)
    box = tag(
        "rect", tag("title", title), x=start, y=top, width=width, height=BAR, rx=2,
        class_=f"f{number % COLORS}", fill_opacity=opacity,
    )  # fmt: skip
    if width < 9 * len(str(number)):
        return box
    # On a pale bar the page's ink is read better.
    ink = "ink" if opacity < 0.6 else "on"
    label = tag("text", str(number), x=start + width / 2, y=top + 20, text_anchor="middle", class_=ink)
    return join(box, label)
