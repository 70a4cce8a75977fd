"""The benchmark for people: a table in the terminal, a page, and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from parallel_tune.reporting.axes import size
from parallel_tune.reporting.bars import Bar, BarChart, bar_chart, draw_bars
from parallel_tune.reporting.html import join, page, table, tag
from parallel_tune.reporting.pictures import have_matplotlib
from parallel_tune.reporting.schedule import Schedule, draw_schedules, schedule_chart
from parallel_tune.rundir import write_atomically

HEAD = ["", "devices", "tokens/s", "spread", "samples/s", "speed-up", "scaling", "MFU", "peak memory", "predicted"]
HEAD += ["busy", "first step"]


def cells(arm: dict[str, Any], with_reference: bool) -> list[str]:
    """What the table says of an arm."""
    peak = [device["used_peak_bytes"] for device in arm["devices"] if device.get("used_peak_bytes")]
    predicted = [device["predicted_peak_bytes"] for device in arm["devices"] if device.get("predicted_peak_bytes")]
    busy = [device["busy_share"] for device in arm["devices"] if device.get("busy_share") is not None]
    speed = arm["tokens_per_second"]
    first = arm["first_step_seconds"]
    shown = [
        arm["label"],
        str(arm["num_devices"]),
        f"{speed['median']:,.0f}",
        f"{speed['least']:,.0f}–{speed['most']:,.0f}",
        f"{arm['samples_per_second']['median']:,.2f}",
        _times(arm["speedup_over_one_device"]),
        _percent(arm["scaling_efficiency"]),
        _percent(arm["model_flops_utilisation"]),
        size(max(peak)) if peak else "–",
        size(max(predicted)) if predicted else "–",
        " / ".join(f"{share:.0%}" for share in busy) if busy else "–",
        f"{first['first_run']:.1f} s" if first["first_run"] == first["later_runs"]
        else f"{first['first_run']:.1f} s, then {first['later_runs']:.1f} s",
    ]  # fmt: skip
    return [*shown, _times(arm["ratio_to_reference"])] if with_reference else shown


def reference_cells(reference: dict[str, Any]) -> list[str]:
    """What the table says of the reference."""
    speed = reference["tokens_per_second"]
    peak = [device["used_peak_bytes"] for device in reference.get("devices", [])]
    label = "reference" if reference["timed"] == "steps" else "reference, whole"
    return [
        label, "–", f"{speed['median']:,.0f}", f"{speed['least']:,.0f}–{speed['most']:,.0f}",
        f"{reference['samples_per_second']['median']:,.2f}", "–", "–", "–", size(max(peak)) if peak else "–", "–", "–",
        "–", "1.00x",
    ]  # fmt: skip


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}x"


def table_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: an arm a row, the reference last."""
    reference = results["reference"]
    with_reference = reference is not None and "timed" in reference
    rows = [cells(arm, with_reference) for arm in results["arms"]]
    if with_reference:
        return [*HEAD, "to reference"], [*rows, reference_cells(reference)]
    return HEAD, rows


def notes(results: dict[str, Any]) -> list[str]:
    """What was not run, or failed, and how to read the figures."""
    said = [f"not run: {item['label']}: {item['reason']}" for item in results["not_run"]]
    said += [f"failed: {arm['label']}: {arm['failed']}" for arm in results["arms"] if arm["failed"]]
    reference = results["reference"]
    if reference is not None and reference["failed"]:
        said.append(f"failed: reference: {reference['failed']}")
    if reference is not None and reference.get("timed") == "whole":
        said.append("the reference told nothing of its steps: it was timed as a whole, and so are the ratios to it")
    elif reference is not None and reference.get("runs") and not reference["runs"][0]["tokens_told"]:
        said.append("the reference told no tokens: each of its steps is taken to have as many as ours on average")
    if not results["finished"]:
        said.append(f"not finished: {results['turns']} of {results['repeat']} repetitions")
    if results["on_cpu"]:
        said.append("on a CPU a device's memory is its process's, interpreter and libraries included")
    runs = max((len(arm["runs"]) for arm in results["arms"]), default=0)
    how = f"medians of {runs} runs in turn, least and most beside them" if runs > 1 else "one run each"
    said.append(
        f"{results['global_batch']} samples a step; {results['steps']} steps a run, of which the first "
        f"{results['skipped']} do not count; {how}"
    )
    return said


def text_table(results: dict[str, Any], console: Console) -> None:
    """Print it: a column a figure where the terminal is wide enough, else a column an arm."""
    head, rows = table_rows(results)
    wide = sum(max(len(row[at]) for row in [head, *rows]) + 3 for at in range(len(head))) <= console.width
    columns, lines = (head, rows) if wide else ([r[0] for r in [head, *rows]], _transposed(head, rows))
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, name in enumerate(columns):
        shown.add_column(name, justify="right" if place else "left", no_wrap=wide or place == 0, overflow="fold")
    for line in lines:
        shown.add_row(*line)
    console.print(shown)
    for note in notes(results):
        console.print(note, markup=False, highlight=False)


def _transposed(head: list[str], rows: list[list[str]]) -> list[list[str]]:
    return [[head[at], *(row[at] for row in rows)] for at in range(1, len(head))]


def charts(results: dict[str, Any]) -> list[BarChart]:
    """Speed of each, and memory of each device."""
    everyone = [*results["arms"]]
    reference = results["reference"]
    if reference is not None and "timed" in reference:
        everyone.append({**reference, "label": "reference", "devices": reference.get("devices", [])})
    speed = [
        Bar(item["label"], item["tokens_per_second"]["median"], f"{item['tokens_per_second']['median']:,.0f}",
            color=place, low=item["tokens_per_second"]["least"], high=item["tokens_per_second"]["most"])
        for place, item in enumerate(everyone)
    ]  # fmt: skip
    memory = []
    for place, item in enumerate(everyone):
        for device in item["devices"]:
            used, predicted = device.get("used_peak_bytes"), device.get("predicted_peak_bytes")
            if used is None:
                continue  # devices of a CPU that share one process
            said = size(used) + (f", {size(predicted)} predicted" if predicted else "")
            name = f"{item['label']}, {device['index']}"
            memory.append(Bar(name, used / 2**30, said, color=place, mark=predicted / 2**30 if predicted else None))
    found = [BarChart("Throughput, least and most of the runs", "tokens per second", speed)]
    return [*found, BarChart("Peak memory of each device, | is the prediction", "GiB", memory)] if memory else found


def schedules(results: dict[str, Any]) -> list[Schedule]:
    """A step of each arm that split the model, on the clock of its devices."""
    return [
        Schedule(arm["label"], arm["schedule"]["segments"], [(int(i), str(n)) for i, n in arm["schedule"]["places"]])
        for arm in results["arms"]
        if arm["schedule"] is not None
    ]


def write_views(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write bench.html and, where matplotlib is installed, bench.png and the splits' schedule.png; returns which."""
    head, rows = table_rows(results)
    drawn, steps = charts(results), schedules(results)
    title = f"Benchmark of {results['model'].rstrip('/').rpartition('/')[2]}"
    html = page(
        title,
        tag("h1", title),
        tag("p", f"{results['hardware']} · {results['data']} · {results['date']}", class_="muted"),
        tag("h2", "Figures"),
        table(head, rows),
        join(*(tag("p", note, class_="muted") for note in notes(results))),
        tag("h2", "Charts"),
        tag("div", *(bar_chart(chart) for chart in drawn), class_="charts"),
        *([tag("h2", "Schedules"), schedule_chart(steps)] if steps else []),
    )
    written = [folder / "bench.html"]
    write_atomically(written[0], html)
    if have_matplotlib():
        written.append(folder / "bench.png")
        draw_bars(drawn, written[1])
        if steps:
            written.append(folder / "schedule.png")
            draw_schedules(steps, written[2])
    return written
