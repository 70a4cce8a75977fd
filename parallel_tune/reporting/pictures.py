"""Charts as one PNG, by matplotlib where it is installed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from parallel_tune.reporting.line_chart import Curve, Frame, make_axes

MISSING = "no compare.png: matplotlib is not installed (pip install 'parallel-tune[plots]')"
COLORS = ("#3b62d0", "#e4572e", "#12876f", "#b47a00", "#8e44d6", "#d6457f", "#8a5a3c", "#4f9bd9", "#7d8494", "#6a8f1f")
COLUMNS = 2


def have_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(charts: Sequence[tuple[Frame, Sequence[Curve]]], path: Path) -> None:
    """Draw the charts in two columns with one legend. The file appears only when complete."""
    # Without pyplot there is neither a backend to choose nor a window, and no state of the process is touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = -(-len(charts) // COLUMNS)
    figure = Figure(figsize=(6.2 * COLUMNS, 3.8 * lines + 0.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, COLUMNS, squeeze=False).flatten()
    for panel, (frame, curves) in zip(axes, charts, strict=False):
        panel.set_title(frame.title, loc="left", fontsize=11, fontweight="bold")
        panel.set_xlabel(frame.x_label)
        panel.set_ylabel(frame.y_label)
        panel.grid(color="#d9dde5", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
        for curve in curves:
            panel.plot(
                [x for x, _ in curve.points],
                [y for _, y in curve.points],
                color=COLORS[curve.color],
                linewidth=curve.width,
                linestyle="--" if curve.dash else "-",
                # "$" in a name would begin a formula, "_" at its start would hide it.
                label=curve.name.replace("$", r"\$"),
            )
        x_axis, y_axis = make_axes(frame, curves)
        panel.set_xticks(x_axis.ticks, x_axis.labels())
        panel.set_yticks(y_axis.ticks, y_axis.labels())
        panel.set_xlim(x_axis.low, x_axis.high + 0.01 * (x_axis.high - x_axis.low))
        panel.set_ylim(y_axis.low, y_axis.high)
    for panel in axes[len(charts) :]:
        panel.set_visible(False)
    handles, names = axes[0].get_lines(), [line.get_label() for line in axes[0].get_lines()]
    figure.legend(handles, names, loc="outside lower center", ncols=min(3, len(names)), frameon=False)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    figure.savefig(part, format="png")
    part.replace(path)
