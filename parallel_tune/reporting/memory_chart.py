"""Memory of each device: what the plan counted, part by part, above what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from parallel_tune.plan_view import PARTS, short_name
from parallel_tune.reporting.axes import Axis, make_axis, size
from parallel_tune.reporting.figures import RunFigures
from parallel_tune.reporting.html import Markup, join, table, tag
from strategies.contracts import DevicePlan

WIDTH = 1100
LEFT, RIGHT = 150, 110
BAR, GAP, GROUP = 17, 3, 76
PREDICTED, MEASURED = 8, 9
"""Colours of the bars that are not made of parts."""

CPU_NOTE = "On a CPU a device is a process, measured by its resident memory: interpreter and libraries are in it."
SPLIT_NOTE = "On a CPU the devices of a split model share one process, whose memory cannot be told apart by device."


@dataclass(frozen=True)
class _Bytes:
    """A device's figures; 0 where there is none."""

    device: DevicePlan
    predicted_allocated: int
    predicted: int
    allocated: int
    used: int


def memory_section(run: RunFigures) -> Markup:
    """The chart and its table."""
    figures = [_figures(run, place) for place in range(len(run.plan.devices))]
    split = run.plan.processes < len(run.plan.devices)
    note = tag("p", SPLIT_NOTE if split else CPU_NOTE, class_="muted")
    on_cpu = run.plan.devices[0].kind == "cpu"
    return join(_chart(figures, _trained(run)), note if on_cpu else "", _table(figures))


def _figures(run: RunFigures, place: int) -> _Bytes:
    said = run.measured(place)
    allocated = said.get("allocated_peak_bytes", 0)
    return _Bytes(
        device=run.plan.devices[place],
        predicted_allocated=said.get("predicted_allocated_bytes", 0),
        predicted=said.get("predicted_peak_bytes", 0),
        allocated=allocated,
        used=max(said.get("used_peak_bytes", 0), allocated),
    )


def _trained(run: RunFigures) -> str:
    longest = (run.report or {}).get("longest_row")
    return f"predicted for the longest row trained, {longest:,} tokens" if longest else "predicted for the rows trained"


def _chart(figures: list[_Bytes], trained: str) -> Markup:
    most = max(max(f.device.predicted_peak_bytes, f.predicted, f.used) for f in figures)
    # On a scale of the whole card a small run would be a line.
    capacity = max(f.device.capacity_bytes for f in figures)
    scale_end = capacity if most > capacity / 4 else most
    unit, unit_name = (2**30, "GiB") if scale_end >= 2**30 else (2**20, "MiB")
    axis = make_axis([0.0, scale_end / unit], count=8, zero=True)
    height = 10 + GROUP * len(figures) + 36
    drawn = [_group(f, 10 + place * GROUP, axis, unit) for place, f in enumerate(figures)]
    label = "Memory planned, predicted and measured on each device"
    svg = tag(
        "svg", _axis(axis, height, f"memory at the peak ({unit_name})"), *drawn,
        viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=label,
    )  # fmt: skip
    shown: list[tuple[str, int, float | None]] = [
        (name, color, None)
        for color, (_, name, attribute) in enumerate(PARTS)
        if any(getattr(f.device.memory, attribute) for f in figures)
    ]
    plan = tag("ul", tag("li", "plan, rows full:"), *(_entry(*item) for item in shown), class_="legend")
    shown = []
    if any(f.predicted for f in figures):
        shown.append((trained, PREDICTED, 0.45))
    if any(f.used > f.allocated for f in figures):
        shown.append(("measured, all in use", MEASURED, 0.5))
    if any(f.allocated for f in figures):
        shown.append(("of it live tensors", MEASURED, None))
    below = tag("ul", tag("li", "below:"), *(_entry(*item) for item in shown), class_="legend") if shown else ""
    title = tag("h3", "Memory of each device")
    return tag("figure", tag("figcaption", title, plan, below), svg, class_="wide")


def _group(figures: _Bytes, top: int, axis: Axis, unit: int) -> Markup:
    device = figures.device

    def x(num_bytes: float) -> float:
        return LEFT + axis.share(min(num_bytes / unit, axis.high)) * (WIDTH - LEFT - RIGHT)

    def bar(start: int, end: int, line: int, color: int, title: str, opacity: float | None = None) -> Markup:
        place: dict[str, object] = {
            "x": x(start), "y": top + line * (BAR + GAP), "width": max(x(end) - x(start), 1.0), "height": BAR,
        }  # fmt: skip
        label = tag("title", f"{title}: {size(end - start)}")
        drawn = tag("rect", label, class_=f"f{color}", fill_opacity=opacity, **place)
        # The grid must not shine through.
        return drawn if opacity is None else join(tag("rect", class_="under", **place), drawn)

    def said(text: str, end: int, line: int) -> Markup:
        return tag("text", text, x=x(end) + 6, y=top + line * (BAR + GAP) + 13)

    parts = [
        tag("text", f"device {device.index}", x=0, y=top + 13, class_="ink"),
        tag("text", short_name(device.name)[:22], x=0, y=top + 31),
    ]
    start = 0
    for color, (_, name, attribute) in enumerate(PARTS):
        end = start + getattr(device.memory, attribute)
        if end > start:
            parts.append(bar(start, end, 0, color, f"plan, {name}"))
        start = end
    parts.append(said(size(device.predicted_peak_bytes), device.predicted_peak_bytes, 0))
    line = 1
    if figures.predicted:
        parts.append(bar(0, figures.predicted, line, PREDICTED, "predicted for the rows trained", 0.45))
        parts.append(said(size(figures.predicted), figures.predicted, line))
        line += 1
    if figures.used > figures.allocated:
        parts.append(bar(0, figures.used, line, MEASURED, "measured, all in use", 0.5))
    if figures.allocated:
        parts.append(bar(0, figures.allocated, line, MEASURED, "measured, live tensors"))
    parts.append(said(size(figures.used) if figures.used else "not measured", figures.used, line))
    return tag("g", *parts)


def _axis(axis: Axis, height: int, label: str) -> Markup:
    bottom = height - 36
    parts = []
    for tick, text in zip(axis.ticks, axis.labels(), strict=True):
        x = LEFT + axis.share(tick) * (WIDTH - LEFT - RIGHT)
        parts.append(tag("line", x1=x, x2=x, y1=4, y2=bottom, class_="grid"))
        parts.append(tag("text", text, x=x, y=bottom + 15, text_anchor="middle"))
    parts.append(tag("text", label, x=(LEFT + WIDTH - RIGHT) / 2, y=height - 4, text_anchor="middle"))
    return join(*parts)


def _entry(name: str, color: int, opacity: float | None) -> Markup:
    box = tag("rect", x=4, y=0, width=14, height=10, class_=f"f{color}", fill_opacity=opacity)
    return tag("li", tag("svg", box, viewBox="0 0 22 10", aria_hidden="true"), name)


def _table(figures: list[_Bytes]) -> Markup:
    head = ["device", "in use: planned", "predicted", "measured", "off by"]
    head += ["tensors: planned", "predicted", "measured", "off by"]
    rows = []
    for f in figures:
        # Resident memory of a process is another thing than what a plan for a CPU counts: no error is stated.
        gpu = f.device.kind == "cuda"
        rows.append(
            [
                f"{f.device.index} {short_name(f.device.name)}",
                size(f.device.predicted_peak_bytes),
                _size(f.predicted),
                _size(f.used if f.used > f.allocated else 0),
                _error(f.predicted, f.used) if gpu and f.used > f.allocated else "–",
                size(f.device.predicted_allocated_bytes),
                _size(f.predicted_allocated),
                _size(f.allocated),
                _error(f.predicted_allocated, f.allocated) if gpu else "–",
            ]
        )
    return table(head, rows)


def _size(num_bytes: int) -> str:
    return size(num_bytes) if num_bytes else "–"


def _error(predicted: int, measured: int) -> str:
    return f"{predicted / measured - 1:+.1%}" if predicted and measured else "–"
