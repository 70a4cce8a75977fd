"""Figures of all repetitions: medians and spread, and what they mean beside each other."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from parallel_tune.bench.arms import SINGLE, Arm
from parallel_tune.bench.reference import ReferenceRun
from parallel_tune.bench.running import Timed
from parallel_tune.bench.work import Work
from parallel_tune.gpus import SUSTAINED_SHARE
from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.speed import model_flops
from parallel_tune.planning import training_settings
from parallel_tune.reporting.schedule import places_of
from strategies.contracts import Hardware


@dataclass
class Measured:
    """All runs of one arm so far; `failed` says why there are no more."""

    arm: Arm
    runs: list[Timed] = field(default_factory=list)
    failed: str = ""


@dataclass
class ReferenceMeasured:
    """All runs of the reference so far."""

    command: str
    runs: list[ReferenceRun] = field(default_factory=list)
    failed: str = ""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def flops_utilisation(measured: Measured, facts: ModelFacts, hardware: Hardware, work: Work) -> float | None:
    """Model FLOPs utilisation: the operations that the rows need, over what the arm's GPUs could do in that time.

    Operations as `speed.model_flops` counts them (Chowdhery et al. 2022, PaLM), recomputation and padding left out; the
    GPUs' rate is the datasheet's dense one in half precision (`gpus.GPUS`).

    Returns:
        The median over repetitions, 0 to 1; None on a CPU and in float32, for which the table has no rates, for a
        model whose layers are not known, and where rows were encoded otherwise than here.
    """
    arm = measured.arm
    assert arm.plan is not None
    known = hardware.kind == "cuda" and arm.plan.dtype != "float32" and facts.closed_form_known
    if not known or any(list(run.tokens) != work.tokens for run in measured.runs):
        return None
    settings = training_settings(arm.config, facts, arm.plan.engine, arm.plan.dtype)
    rates = {device.index: device.matmul_flops_per_second / SUSTAINED_SHARE for device in hardware.devices}
    peak = sum(rates[index] for index in arm.plan.visible)
    shares = []
    for run in measured.runs:
        lengths = [length for step in work.row_lengths[run.skipped :] for length in step]
        shares.append(model_flops(facts, settings, lengths) / sum(run.counted_seconds) / peak)
    return statistics.median(shares)


def arm_figures(measured: Measured, facts: ModelFacts, hardware: Hardware, work: Work) -> dict[str, Any]:
    """The JSON of one arm that was run at least once."""
    arm, runs = measured.arm, measured.runs
    assert arm.plan is not None
    first_steps = [run.first_step_seconds for run in runs if run.first_step_seconds is not None]
    return {
        "name": arm.name,
        "label": arm.label,
        "strategy": arm.plan.strategy,
        "engine": arm.plan.engine,
        "processes": arm.plan.processes,
        "num_devices": len(arm.plan.visible),
        "micro_batch": arm.plan.micro_batch,
        "gradient_accumulation_steps": arm.plan.gradient_accumulation_steps,
        "gradient_checkpointing": arm.plan.gradient_checkpointing,
        "lanes": arm.plan.lanes,
        "captured": arm.plan.captured,
        "tokens_per_second": spread([run.tokens_per_second for run in runs]),
        "samples_per_second": spread([run.samples_per_second for run in runs]),
        "step_seconds": spread([seconds for run in runs for seconds in run.counted_seconds]),
        "model_flops_utilisation": flops_utilisation(measured, facts, hardware, work),
        "plan_seconds": arm.plan_seconds,
        "first_step_seconds": {
            "first_run": first_steps[0],
            "later_runs": statistics.median(first_steps[1:] or first_steps),
        },
        "predicted_tokens_per_second": arm.plan.predicted_tokens_per_second,
        "devices": _devices(runs),
        "final_loss": [run.losses[-1] for run in runs],
        "schedule": _schedule(measured),
        "failed": measured.failed,
        "runs": [_run(run) for run in runs],
    }


def _schedule(measured: Measured) -> dict[str, Any] | None:
    """The last step of the run of median speed, and the device of each stage; None where nothing was split."""
    assert measured.arm.plan is not None
    shown = [run for run in measured.runs if run.timeline]
    if not shown:
        return None
    middle = sorted(shown, key=lambda run: run.tokens_per_second)[len(shown) // 2]
    return {"places": places_of(measured.arm.plan.devices), "segments": middle.timeline}


def _run(run: Timed) -> dict[str, Any]:
    return {
        "tokens_per_second": run.tokens_per_second,
        "seconds": run.seconds,
        "tokens": run.tokens,
        "losses": run.losses,
        "first_step_seconds": run.first_step_seconds,
        **run.details,
    }


def _devices(runs: Sequence[Timed]) -> list[dict[str, Any]]:
    """Each device's peaks, the largest of all runs, and its busy share, the median."""
    devices = []
    for same in zip(*(run.devices for run in runs), strict=True):
        found = {name: same[0][name] for name in ("index", "name") if name in same[0]}
        for name in ("predicted_peak_bytes", "predicted_allocated_bytes", "used_peak_bytes", "allocated_peak_bytes"):
            values = [device[name] for device in same if device.get(name) is not None]
            found[name] = max(values) if values else None
        shares = [device["busy_share"] for device in same if device.get("busy_share") is not None]
        devices.append({**found, "busy_share": statistics.median(shares) if shares else None})
    return devices


def reference_figures(reference: ReferenceMeasured, work: Work, samples: int) -> dict[str, Any]:
    """The JSON of the reference; `tokens_per_second` is that of its steps or of whole runs, as `timed` says."""
    found: dict[str, Any] = {"command": reference.command, "failed": reference.failed}
    if not reference.runs:
        return found
    timed = [run.timed for run in reference.runs if run.timed is not None]
    found["whole_seconds"] = spread([run.whole_seconds for run in reference.runs])
    if len(timed) < len(reference.runs):
        total, count = sum(work.tokens), samples * len(work.tokens)
        wholes = [run.whole_seconds for run in reference.runs]
        return {
            **found,
            "timed": "whole",
            "tokens_per_second": spread([total / seconds for seconds in wholes]),
            "samples_per_second": spread([count / seconds for seconds in wholes]),
        }
    return {
        **found,
        "timed": "steps",
        "tokens_per_second": spread([run.tokens_per_second for run in timed]),
        "samples_per_second": spread([run.samples_per_second for run in timed]),
        "step_seconds": spread([seconds for run in timed for seconds in run.counted_seconds]),
        "devices": _devices(timed) if len({len(run.devices) for run in timed}) == 1 else [],
        "runs": [_run(run) for run in timed],
    }


def compare(arms: list[dict[str, Any]], reference: dict[str, Any] | None) -> None:
    """Add to each arm its scaling efficiency against one device, and its ratio to the reference.

    The global batch is the same for all, so this is strong scaling: tokens per second over those of one device, divided
    by the number of devices. A reference that was timed as a whole is held against our whole runs, up to the last step.
    """
    single = next((arm["tokens_per_second"]["median"] for arm in arms if arm["name"] == SINGLE), None)
    for arm in arms:
        speed = arm["tokens_per_second"]["median"]
        arm["speedup_over_one_device"] = speed / single if single else None
        alone = arm["name"] == SINGLE
        arm["scaling_efficiency"] = speed / single / arm["num_devices"] if single and not alone else None
        arm["ratio_to_reference"] = None
        if reference is None or "timed" not in reference:
            continue
        if reference["timed"] == "whole":
            speed = statistics.median(_whole_speed(run) for run in arm["runs"])
        arm["ratio_to_reference"] = speed / reference["tokens_per_second"]["median"]


def _whole_speed(run: dict[str, Any]) -> float:
    seconds: float = run["first_step_seconds"] + sum(run["seconds"][1:])
    return float(sum(run["tokens"])) / seconds
