"""A plan for people: plain text, readable at 80 columns, without colour and without a terminal."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import textwrap
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from strategies.candidate import over_devices
from strategies.contracts import DevicePlan, MemoryEstimate, Plan
from strategies.fit import GIB, gib, usable_bytes

PARTS: tuple[tuple[str, str, str], ...] = (
    ("W", "weights", "weights_bytes"),
    ("L", "adapters", "adapters_bytes"),
    ("G", "gradients", "gradients_bytes"),
    ("O", "optimizer", "optimizer_bytes"),
    ("A", "activations", "activations_bytes"),
    ("C", "cross-entropy", "cross_entropy_bytes"),
    ("B", "buffers", "buffers_bytes"),
    ("X", "context", "context_bytes"),
    ("R", "reserve", "reserve_bytes"),
)
"""Letter in the bar, name in the legend, attribute of MemoryEstimate."""

CHECKPOINTING = {
    "none": "off: all activations are kept",
    "full": "full: each layer is recomputed in the backward pass",
    "unsloth": "unsloth: recomputed, with layer inputs kept in host memory",
}
GLUE = "\0"
"""A space at which a line is not broken."""

MIN_WIDTH = 60
MAX_WIDTH = 140


def render_plan(plan: Plan, width: int | None = None) -> str:
    """The plan as text of at most `width` columns (the launch command excepted, so that it can be copied)."""
    width = max(MIN_WIDTH, min(width or shutil.get_terminal_size((100, 24)).columns, MAX_WIDTH))
    blocks = [
        "\n".join(_wrapped(headline(plan), width)),
        _device_table(plan, width),
        "\n".join(_wrapped(_legend(plan), width)),
        "\n".join(line for text in facts(plan) for line in _wrapped(text, width, "  ")),
        _section("Why", plan.reasons, width),
        _section("Figures", plan.basis, width),
        _section("Not taken", (f"{r.strategy}: {r.reason}" for r in plan.rejected), width),
        _section(
            "Any one of these would fit",
            (
                f"{s.change}: {s.strategy}, {gib(s.predicted_peak_bytes)} on the fullest device"
                for s in plan.suggestions
            ),
            width,
        ),
        f"Command\n  {shlex.join(plan.launch)}" if plan.launch else "",
    ]
    return "\n\n".join(block for block in blocks if block)


def memory_bar(device: DevicePlan, full_scale_bytes: int, width: int) -> str:
    """A device's memory drawn to scale, a letter for each part of its predicted peak.

    "." is free, "|" is where the memory that a plan may use ends; letters behind it do not fit.
    """
    per_column = full_scale_bytes / width
    # Columns are cut where the running sum falls, so that the bar as a whole is right to half a column.
    bar, filled = "", 0
    for letter, _, attribute in PARTS:
        filled += getattr(device.memory, attribute)
        bar += letter * (round(filled / per_column) - len(bar))
    limit = min(round(usable_bytes(device) / per_column), width - 1)
    bar = bar.ljust(limit, ".")
    return (bar[:limit] + "|" + bar[limit + 1 :]).ljust(width)


def headline(plan: Plan) -> str:
    """The plan in one line."""
    if plan.processes > 1:
        how = f"{plan.processes} processes, a whole model on each device"
    elif len(plan.devices) > 1:
        lanes = f", {plan.lanes} micro-batches in flight" if plan.lanes > 1 else ""
        how = f"1 process, one model {over_devices(len(plan.devices), len(plan.visible), 'device')}{lanes}"
    else:
        how = "1 process on 1 device"
    verdict = "" if plan.fits else "DOES NOT FIT. Closest: "
    return f"{verdict}{plan.strategy} with {plan.engine}: {how}"


def _device_table(plan: Plan, width: int) -> str:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=False)
    table.add_column("device", no_wrap=True, overflow="ellipsis", max_width=width // 4)
    table.add_column("layers", no_wrap=True)
    table.add_column("peak GiB", justify="right", no_wrap=True)
    table.add_column("usable", justify="right", no_wrap=True)
    table.add_column("in all", justify="right", no_wrap=True)
    table.add_column("what fills it", no_wrap=True)
    names = [f"{device.index} {short_name(device.name)}" for device in plan.devices]
    layers = [_layers(plan, device) for device in plan.devices]
    used = min(width // 4, max(6, *map(len, names))) + max(6, *map(len, layers)) + 8 + 6 + 6 + 5 * 2
    bar_width = max(10, width - used - 1)
    scale = max(max(device.capacity_bytes, device.predicted_peak_bytes) for device in plan.devices)
    for name, held, device in zip(names, layers, plan.devices, strict=True):
        sizes = (device.predicted_peak_bytes, usable_bytes(device), device.capacity_bytes)
        table.add_row(name, held, *(f"{size / GIB:.1f}" for size in sizes), memory_bar(device, scale, bar_width))
    out = io.StringIO()
    Console(
        file=out,
        width=width,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
        highlight=False,
        markup=False,
    ).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def _layers(plan: Plan, device: DevicePlan) -> str:
    held = f"{device.layers[0]}-{device.layers[1]}"
    if plan.processes > 1 or len(plan.devices) == 1:
        return held
    ends = ("emb " if device is plan.devices[0] else "", " head" if device is plan.devices[-1] else "")
    return f"{ends[0]}{held}{ends[1]}"


def _legend(plan: Plan) -> str:
    fullest = max(plan.devices, key=lambda device: device.predicted_peak_bytes / max(1, usable_bytes(device)))
    shown = [part for part in PARTS if any(getattr(device.memory, part[2]) for device in plan.devices)]
    parts = ", ".join(
        f"{letter}{GLUE}{name}{GLUE}{_part(fullest.memory, attribute)}" for letter, name, attribute in shown
    )
    which = "each device" if plan.processes > 1 else f"device {fullest.index}"
    if len({device.predicted_peak_bytes for device in plan.devices}) > 1:
        which = f"the fullest, device {fullest.index}"
    phase = f" in the {fullest.memory.phase.replace('_', '-')} phase" if fullest.memory.phase else ""
    return f"GiB on {which}, at its peak{phase}: {parts}; .{GLUE}free, |{GLUE}end of what is usable"


def _part(memory: MemoryEstimate, attribute: str) -> str:
    size: int = getattr(memory, attribute)
    return "0" if size == 0 else f"{size / GIB:.1f}" if size >= 0.05 * GIB else "<0.1"


def facts(plan: Plan) -> Iterable[str]:
    """Batch, checkpointing and speed, each as a name, spaces and what is so."""
    product = plan.processes * plan.micro_batch * plan.gradient_accumulation_steps
    factors = (
        f"{plan.processes} process{'es' if plan.processes > 1 else ''} x micro-batch {plan.micro_batch} "
        f"x {plan.gradient_accumulation_steps} accumulation step{'s' if plan.gradient_accumulation_steps > 1 else ''}"
    )
    if product == plan.global_batch:
        yield f"global batch   {plan.global_batch} = {factors}"
    else:
        yield f"global batch   {plan.global_batch}, in {product} places, some left empty = {factors}"
    if plan.padding_free:
        yield "padding        none: the rows of a micro-batch are joined, attention keeps to each of them"
    else:
        why = f", since {plan.padded_reason}" if plan.padded_reason else ""
        yield f"padding        rows are padded to the longest of their micro-batch{why}"
    if plan.captured:
        how = ", of compiled layers" if plan.compiled else ""
        yield f"steps          captured as CUDA graphs{how}, one for each size of micro-batch, and replayed"
    elif len(plan.devices) > 1 and plan.devices[0].kind == "cuda":
        yield f"steps          not captured: {plan.uncaptured_reason}"
    traced = [device for device in plan.devices if device.traced_allocated_bytes is not None]
    if traced:
        yield "tensors traced " + "; ".join(_beside(device) for device in traced)
    corrected = [device for device in plan.devices if device.corrected_peak_bytes is not None]
    if corrected:
        peaks = ", ".join(f"{gib(device.corrected_peak_bytes or 0)} on device {device.index}" for device in corrected)
        yield f"corrected      {peaks}, by {max(d.past_runs for d in corrected)} past runs here; the peak above is raw"
    yield f"checkpointing  {CHECKPOINTING[plan.gradient_checkpointing]}"
    whose = "by the lengths of these rows" if plan.rows_known else "rows full"
    if plan.predicted_tokens_per_second > 0:
        yield f"speed          about {_rounded(plan.predicted_tokens_per_second)} tokens/s, {whose}"


def _beside(device: DevicePlan) -> str:
    traced, formula = device.traced_allocated_bytes or 0, device.closed_form_allocated_bytes or 0
    off = f" ({formula / traced - 1:+.1%})" if traced else ""
    return f"{traced / GIB:.2f} GiB on device {device.index}, {formula / GIB:.2f} by the closed form{off}"


def _rounded(rate: float) -> str:
    # Two figures: a prediction of speed is no better than that.
    digits = max(0, len(str(int(rate))) - 2)
    return f"{round(rate / 10**digits) * 10**digits:,}"


def _section(title: str, items: Iterable[str], width: int) -> str:
    lines = [line for item in items for line in _wrapped(f"- {item}", width, "    ", "  ")]
    return "\n".join([title, *lines]) if lines else ""


def _wrapped(text: str, width: int, hanging: str = "  ", first: str = "") -> list[str]:
    lines = textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False
    )
    return [line.replace(GLUE, " ") for line in lines]


def short_name(name: str) -> str:
    """A device's name without vendor and family: "NVIDIA GeForce RTX 3090" -> "RTX 3090"."""
    return re.sub(r"\b(NVIDIA|GeForce|Tesla)\b\s*", "", name).strip() or name
