"""Bars beside each other, as SVG and as PNG: one value each, with its spread or with a mark where it was expected."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from parallel_tune.reporting.axes import Axis, make_axis
from parallel_tune.reporting.html import Markup, join, tag
from parallel_tune.reporting.pictures import COLORS

WIDTH = 560
LEFT, RIGHT = 170, 14
ROW, BAR = 40, 16


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        said: the value as text.
        color: 0 to 9, of the page's colours.
        low, high: the spread; None without one.
        mark: where it was expected to end; None without an expectation.
    """

    name: str
    value: float
    said: str
    color: int = 0
    low: float | None = None
    high: float | None = None
    mark: float | None = None


@dataclass(frozen=True)
class BarChart:
    """Bars on one scale that begins at zero; `label` has the unit."""

    title: str
    label: str
    bars: Sequence[Bar]

    @property
    def axis(self) -> Axis:
        ends = [end for bar in self.bars for end in (bar.value, bar.high, bar.mark) if end is not None]
        return make_axis(ends, count=5, zero=True)


def bar_chart(chart: BarChart) -> Markup:
    """A figure; the values stand above their bars, so that long ones are not cut off."""
    axis = chart.axis
    bottom = 8 + ROW * len(chart.bars)

    def x(value: float) -> float:
        return LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT)

    parts = []
    for tick, text in zip(axis.ticks, axis.labels(), strict=True):
        parts.append(tag("line", x1=x(tick), x2=x(tick), y1=4, y2=bottom, class_="grid"))
        anchor = "end" if tick == axis.ticks[-1] else "middle"
        parts.append(tag("text", text, x=x(tick), y=bottom + 16, text_anchor=anchor))
    parts.append(tag("text", chart.label, x=(LEFT + WIDTH - RIGHT) / 2, y=bottom + 32, text_anchor="middle"))
    for place, bar in enumerate(chart.bars):
        top = 8.0 + ROW * place + 18
        parts.append(tag("text", bar.name, x=LEFT - 8, y=top + 12, text_anchor="end", class_="ink"))
        parts.append(tag("text", bar.said, x=LEFT + 4, y=top - 4))
        title = tag("title", f"{bar.name}: {bar.said}")
        width = max(1.0, x(bar.value) - LEFT)
        parts.append(tag("rect", title, x=LEFT, y=top, width=width, height=BAR, class_=f"f{bar.color % 10}"))
        middle = top + BAR / 2
        if bar.low is not None and bar.high is not None and bar.high > bar.low:
            parts.append(tag("line", x1=x(bar.low), x2=x(bar.high), y1=middle, y2=middle, class_="mark"))
            for end in (bar.low, bar.high):
                parts.append(tag("line", x1=x(end), x2=x(end), y1=middle - 4, y2=middle + 4, class_="mark"))
        if bar.mark is not None:
            at = x(bar.mark)
            parts.append(tag("line", x1=at, x2=at, y1=top - 3, y2=top + BAR + 3, class_="mark", stroke_width=2))
    label = f"{chart.title}: {chart.label}"
    svg = tag("svg", join(*parts), viewBox=f"0 0 {WIDTH} {bottom + 38}", role="img", aria_label=label)
    return tag("figure", tag("figcaption", tag("h3", chart.title)), svg)


def draw_bars(charts: Sequence[BarChart], path: Path) -> None:
    """Draw the charts below each other as a PNG. The file appears only when complete."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [0.45 * len(chart.bars) + 1.0 for chart in charts]
    figure = Figure(figsize=(9.0, sum(heights)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(charts), 1, squeeze=False, gridspec_kw={"height_ratios": heights}).flatten()
    for panel, chart in zip(panels, charts, strict=True):
        axis = chart.axis
        panel.set_title(chart.title, loc="left", fontsize=11, fontweight="bold")
        panel.set_xlabel(chart.label)
        panel.grid(axis="x", color="#d9dde5", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        for place, bar in enumerate(chart.bars):
            panel.barh(place, bar.value, height=0.62, color=COLORS[bar.color % 10])
            end = bar.value
            if bar.low is not None and bar.high is not None and bar.high > bar.low:
                panel.plot([bar.low, bar.high], [place, place], color="#1c2230", linewidth=1.2, marker="|")
                end = max(end, bar.high)
            if bar.mark is not None:
                panel.plot([bar.mark, bar.mark], [place - 0.4, place + 0.4], color="#1c2230", linewidth=2)
                end = max(end, bar.mark)
            panel.annotate(bar.said, (end, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
        # "$" in a name would begin a formula.
        panel.set_yticks(range(len(chart.bars)), [bar.name.replace("$", r"\$") for bar in chart.bars])
        panel.set_ylim(len(chart.bars) - 0.5, -0.5)
        panel.set_xticks(axis.ticks, axis.labels())
        panel.set_xlim(0, axis.high * 1.35)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    figure.savefig(part, format="png")
    part.replace(path)
