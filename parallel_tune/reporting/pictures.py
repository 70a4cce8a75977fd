"""Charts as one PNG, by matplotlib where it is installed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from parallel_tune.reporting.line_chart import Curve, Frame, make_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = "no compare.png: matplotlib is not installed (pip install 'parallel-tune[plots]')"
COLORS = ("#3b62d0", "#e4572e", "#12876f", "#b47a00", "#8e44d6", "#d6457f", "#8a5a3c", "#4f9bd9", "#7d8494", "#6a8f1f")
RULE = "#d9dde5"
COLUMNS = 2
CHART_INCHES, ROW_INCHES = 3.8, 0.3
LONGEST_NAME = 56
"""Characters of a run's name that are shown; of a longer one its beginning and its end."""
LEGEND_CHARACTERS = 140
"""That fit side by side."""


def have_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(charts: Sequence[tuple[Frame, Sequence[Curve]]], path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Draw the charts in two columns with one legend, and a table below. The file appears only when complete.

    Args:
        rows: the table's, its head first.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    make_figure(charts, rows).savefig(part, format="png")
    part.replace(path)


def make_figure(charts: Sequence[tuple[Frame, Sequence[Curve]]], rows: Sequence[Sequence[str]]) -> Figure:
    """The picture, not yet in a file."""
    # Without pyplot there is neither a backend to choose nor a window, and no state of the process is touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = -(-len(charts) // COLUMNS)
    table_inches = ROW_INCHES * (len(rows) + 1)
    size = (6.2 * COLUMNS, CHART_INCHES * lines + table_inches + 0.6)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(lines + 1, COLUMNS, height_ratios=[*[CHART_INCHES] * lines, table_inches])
    for place, (frame, curves) in enumerate(charts):
        _panel(figure.add_subplot(grid[place // COLUMNS, place % COLUMNS]), frame, curves)
    below = figure.add_subplot(grid[lines, :])
    below.set_axis_off()
    _table(below, rows)
    if charts:
        handles = figure.axes[0].get_lines()
        names = [str(line.get_label()) for line in handles]
        columns = max(1, min(3, len(names), LEGEND_CHARACTERS // (max(map(len, names), default=0) + 8)))
        figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _table(axes: Axes, rows: Sequence[Sequence[str]]) -> None:
    cells = [[_shortened(name), *others] for name, *others in rows]
    widths = [max(map(len, column)) + 4 for column in zip(*cells, strict=True)]
    table = axes.table(
        cellText=cells,
        cellLoc="right",
        loc="center",
        edges="horizontal",
        colWidths=[width / sum(widths) for width in widths],
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9.5)
    for (line, column), cell in table.get_celld().items():
        cell.set_edgecolor(RULE)
        cell.set_height(1 / (len(rows) + 1))
        if column == 0:
            cell.set_text_props(ha="left")
            cell.PAD = 0.02  # a share of its width, which is large
        if line == 0:
            cell.set_text_props(color="#5b6475")


def _shortened(name: str) -> str:
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}"


def _panel(panel: Axes, frame: Frame, curves: Sequence[Curve]) -> None:
    panel.set_title(frame.title, loc="left", fontsize=11, fontweight="bold")
    panel.set_xlabel(frame.x_label)
    panel.set_ylabel(frame.y_label)
    panel.grid(color=RULE, linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)
    for curve in curves:
        panel.plot(
            [x for x, _ in curve.points],
            [y for _, y in curve.points],
            color=COLORS[curve.color],
            linewidth=curve.width,
            linestyle="--" if curve.dash else "-",
            # "$" in a name would begin a formula, "_" at its start would hide it.
            label=_shortened(curve.name).replace("$", r"\$"),
        )
    x_axis, y_axis = make_axes(frame, curves)
    panel.set_xticks(x_axis.ticks, x_axis.labels())
    panel.set_yticks(y_axis.ticks, y_axis.labels())
    panel.set_xlim(x_axis.low, x_axis.high + 0.01 * (x_axis.high - x_axis.low))
    panel.set_ylim(y_axis.low, y_axis.high)
