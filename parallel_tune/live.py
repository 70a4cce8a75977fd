"""The live panel of a run in a terminal: progress, loss, speed, and each device against its prediction."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from parallel_tune.gauges import Gauge, Reading
from parallel_tune.plan_view import headline, short_name
from parallel_tune.progress import Progress, duration
from strategies.contracts import DevicePlan, Plan

GIB = 2**30
SECONDS_BETWEEN_READINGS = 1.0
LEAST_SPARK = 8
SPARKS = "▁▂▃▄▅▆▇█"


class LivePanel:
    """Draws the state of a run again and again at the same place; the last state stays on the screen."""

    def __init__(self, plan: Plan, console: Console, gauge: Gauge | None, clock: Callable[[], float] = time.monotonic):
        self._plan = plan
        self._gauge = gauge
        self._clock = clock
        self._began = clock()
        self._read_at = float("-inf")
        self._readings: list[Reading | None] = [None] * len(plan.devices)
        self._peaks = [0] * len(plan.devices)
        self._progress = Progress(plan.global_batch)
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop")

    def start(self) -> None:
        self._live.start()

    def stop(self) -> None:
        self._live.stop()

    def tell(self, lines: list[str]) -> None:
        """Print lines above the panel, where they stay."""
        for line in lines:
            self._live.console.print(line, markup=False, highlight=False)

    def show(self, rows: list[dict[str, Any]]) -> None:
        """Take in new rows of metrics, read the devices when it is time, and draw."""
        for row in rows:
            self._progress.add(row)
        due = self._clock() - self._read_at >= SECONDS_BETWEEN_READINGS
        if due:
            self._read_at = self._clock()
            self._read()
        if rows or due:
            self._live.update(self.render(), refresh=True)

    def _read(self) -> None:
        if self._gauge is not None:
            self._readings = self._gauge()
            self._peaks = [
                max(peak, reading.used_bytes if reading else 0)
                for peak, reading in zip(self._peaks, self._readings, strict=True)
            ]

    def render(self) -> Group:
        """The panel as it stands."""
        # A terminal echoes ^C where the cursor is: on an empty last line it does not move the panel.
        head = Text(headline(self._plan), style="bold", no_wrap=True, overflow="ellipsis")
        return Group(head, *self._training(), self._devices(), Text(""))

    def _training(self) -> list[Any]:
        progress = self._progress
        if not progress.max_steps:
            held_out = f", held-out loss {progress.held_out:.4f} before" if progress.held_out is not None else ""
            return [Text(f"loading model and data, {duration(self._clock() - self._began)}{held_out}")]
        line = Table.grid(padding=(0, 2), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        line.add_row(
            f"step {progress.step:,}/{progress.max_steps:,}",
            ProgressBar(total=progress.max_steps, completed=progress.step),
            f"epoch {progress.epoch:.2f}, {duration(progress.seconds_left)} left",
        )
        return [line, LossLine(progress)]

    def _devices(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=True)
        table.add_column("device", no_wrap=True, max_width=22, overflow="ellipsis", style="cyan")
        table.add_column("memory, | is the prediction", ratio=1, no_wrap=True)
        for name in ("GiB now", "peak", "predicted", "in all", "busy"):
            table.add_column(name, justify="right", no_wrap=True)
        for device, reading, peak in zip(self._plan.devices, self._readings, self._peaks, strict=True):
            above = peak > device.predicted_peak_bytes
            table.add_row(
                f"{device.index} {short_name(device.name)}",
                MemoryBar(device, reading.used_bytes if reading else 0),
                f"{reading.used_bytes / GIB:.1f}" if reading else "-",
                Text(f"{peak / GIB:.1f}" if peak else "-", style="yellow" if above else ""),
                f"{device.predicted_peak_bytes / GIB:.1f}",
                f"{device.capacity_bytes / GIB:.1f}",
                f"{reading.busy_share:.0%}" if reading else "-",
            )
        return table


class LossLine:
    """The loss, its course, and what stands beside it, in one line: the course and the lesser figures give way."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        progress = self._progress
        loss = f"loss {progress.losses[-1]:.4f}"
        held_out = [] if progress.held_out is None else [f"held out {progress.held_out:.4f}"]
        parts = [*held_out, f"lr {progress.learning_rate:.2e}", f"{progress.tokens_per_second:,.0f} tok/s"]
        while len(parts) > 1 and len(loss) + sum(len(part) + 3 for part in parts) + LEAST_SPARK > options.max_width:
            parts.pop(-2)  # speed is told to the last
        room = options.max_width - len(loss) - sum(len(part) + 3 for part in parts) - 1
        course = spark(progress.losses, min(24, room)) if room > 0 else ""
        yield Text.assemble("loss ", (loss.removeprefix("loss "), "bold"), " ", "   ".join([course, *parts]))


class MemoryBar:
    """Memory in use on a scale of the whole device, with a mark at the predicted peak."""

    def __init__(self, device: DevicePlan, used_bytes: int) -> None:
        self._device = device
        self._used = used_bytes

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, options.max_width)
        scale = max(self._device.capacity_bytes, self._device.predicted_peak_bytes, 1)
        filled = min(width, round(self._used / scale * width))
        mark = min(width - 1, round(self._device.predicted_peak_bytes / scale * width))
        full, empty = ("#", ".") if options.ascii_only else ("█", "·")
        cells = [full] * filled + [empty] * (width - filled)
        above = Style(color="yellow" if self._used > self._device.predicted_peak_bytes else "green")
        yield Segment("".join(cells[:mark]), above)
        yield Segment("|", Style(color="magenta", bold=True))
        yield Segment("".join(cells[mark + 1 :]), above)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(10, options.max_width)


def spark(values: list[float], width: int = 24) -> str:
    """The course of a value as a row of small bars; each stands for the mean of its stretch."""
    count = min(width, len(values))
    cuts = [len(values) * place // count for place in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    if high - low < 1e-12:
        return SPARKS[0] * count
    return "".join(SPARKS[round((mean - low) / (high - low) * (len(SPARKS) - 1))] for mean in means)
