"""Curves over an axis, as SVG: few ticks, units in the labels, values under the pointer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallel_tune.reporting.axes import Axis, make_axis
from parallel_tune.reporting.html import Markup, join, tag

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 24, 40
MOST_POINTS = 600
MOST_MARKS = 60

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        color: 0 to 9, of the page's colours.
        width: stroke width; where curves may coincide, later ones are narrower so that all are seen.
        dash: SVG dash pattern, or None for a whole line.
    """

    name: str
    points: Sequence[Point]
    color: int = 0
    width: float = 2.0
    dash: str | None = None


@dataclass(frozen=True)
class Frame:
    """What a chart says around its curves.

    Attributes:
        x_label: with unit.
        y_label: with unit.
        whole_x: x counts things.
        zero: the y axis begins at zero.
    """

    title: str
    x_label: str
    y_label: str
    whole_x: bool = False
    zero: bool = False


def line_chart(frame: Frame, curves: Sequence[Curve]) -> Markup:
    """A figure with its legend; empty curves are left out."""
    shown = [curve for curve in curves if curve.points]
    if not shown:
        return Markup("")
    x_axis, y_axis = make_axes(frame, shown)
    drawn = [_draw(curve, x_axis, y_axis, frame) for curve in shown]
    label = f"{frame.title}: {frame.y_label} over {frame.x_label}"
    svg = tag(
        "svg", _axes(frame, x_axis, y_axis), *drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label
    )
    legend = tag("ul", *(tag("li", _swatch(curve), curve.name) for curve in shown), class_="legend")
    return tag("figure", tag("figcaption", tag("h3", frame.title), legend), svg)


def make_axes(frame: Frame, curves: Sequence[Curve]) -> tuple[Axis, Axis]:
    """The axes that hold all curves."""
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    x_axis = make_axis(xs, count=6, whole=frame.whole_x, zero=True, tight=True)
    return x_axis, make_axis(ys, count=4, zero=frame.zero)


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about `most` points that keep every peak: the lowest and the highest of each stretch."""
    if len(points) <= most:
        return list(points)
    size = -(-2 * len(points) // most)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {
            min(range(len(stretch)), key=lambda i: stretch[i][1]),
            max(range(len(stretch)), key=lambda i: stretch[i][1]),
        }
        kept += [stretch[i] for i in sorted(ends)]
    return kept


def _place(point: Point, x_axis: Axis, y_axis: Axis) -> Point:
    x = LEFT + x_axis.share(point[0]) * (WIDTH - LEFT - RIGHT)
    y = HEIGHT - BOTTOM - y_axis.share(point[1]) * (HEIGHT - TOP - BOTTOM)
    return x, y


def _draw(curve: Curve, x_axis: Axis, y_axis: Axis, frame: Frame) -> Markup:
    places = [(_place(point, x_axis, y_axis), point) for point in thin(curve.points)]
    line = tag(
        "polyline",
        points=" ".join(f"{x:.1f},{y:.1f}" for (x, y), _ in places),
        class_=f"curve s{curve.color}",
        stroke_width=curve.width,
        stroke_dasharray=curve.dash,
    )
    radius = max(2.5, curve.width * 0.9) if len(places) <= MOST_MARKS else 0
    marks = [
        tag(
            "circle",
            tag("title", f"{curve.name}: {value:,.6g} at {frame.x_label} {at:,.6g}"),
            cx=x, cy=y, r=float(radius), class_=f"f{curve.color}",
        )
        for (x, y), (at, value) in places
        if radius
    ]  # fmt: skip
    return join(line, *marks)


def _axes(frame: Frame, x_axis: Axis, y_axis: Axis) -> Markup:
    parts = [tag("text", frame.y_label, x=4, y=12)]
    for tick, label in zip(y_axis.ticks, y_axis.labels(), strict=True):
        y = _place((x_axis.low, tick), x_axis, y_axis)[1]
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", label, x=LEFT - 7, y=y + 4, text_anchor="end"))
    bottom = HEIGHT - BOTTOM
    parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom, class_="axis"))
    for tick, label in zip(x_axis.ticks, x_axis.labels(), strict=True):
        x = _place((tick, y_axis.low), x_axis, y_axis)[0]
        parts.append(tag("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
        # A label at the very edge would be cut off.
        anchor = "end" if x > WIDTH - RIGHT - 12 and len(label) > 4 else "middle"
        parts.append(tag("text", label, x=x, y=bottom + 17, text_anchor=anchor))
    parts.append(tag("text", frame.x_label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 5, text_anchor="middle"))
    return join(*parts)


def _swatch(curve: Curve) -> Markup:
    line = tag(
        "line", x1=1, x2=21, y1=5, y2=5, class_=f"s{curve.color}",
        stroke_width=curve.width, stroke_dasharray=curve.dash,
    )  # fmt: skip
    return tag("svg", line, viewBox="0 0 22 10", aria_hidden="true")
