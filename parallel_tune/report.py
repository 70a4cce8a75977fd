"""report.json: what came out, beside what was predicted."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel_tune import machine
from parallel_tune.capture import replayed
from parallel_tune.config import TrainConfig
from parallel_tune.device_use import CardUse
from parallel_tune.prediction import TrainedRows
from parallel_tune.rundir import RunDir, write_atomically
from parallel_tune.tracing import predict_for_rows
from strategies.base import Session
from strategies.contracts import Plan
from strategies.errors import ConfigError, ParallelTuneError

if TYPE_CHECKING:
    from parallel_tune.callbacks import MetricsWriter

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "unsloth",
    "bitsandbytes",
    "parallel-tune",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write(
    run: RunDir,
    config: TrainConfig,
    plan: Plan,
    session: Session,
    metrics: MetricsWriter,
    steps: int,
    results: dict[str, Any],
    data: Any,
    rows: TrainedRows,
    total_seconds: float,
    startup_seconds: dict[str, float],
    use: CardUse,
) -> None:
    """Gather every rank's measurements and write the report from the main one. Every rank calls it.

    The plan counts rows of the full sequence length, unless it knew the run's own (`planned_peak_bytes`); the
    measurement is held against the prediction for the rows that were trained (`predicted_*_bytes`).
    """
    measured: dict[int, dict[str, Any]] = {}
    for by_device in session.gather(measure_devices(plan, session, use)):
        measured.update(by_device)
    if not session.is_main:
        return
    by_strategy = session.report()
    stages = by_strategy.pop("stages", None) or [{}] * len(plan.devices)
    timeline = by_strategy.pop("timeline", None)
    if "captured" in by_strategy:
        print(replayed(by_strategy["captured"]))
    note: dict[str, str] = {}
    try:
        predictions = predict_for_rows(config, plan, rows)
    except ParallelTuneError as error:
        # The run is done, and its report is worth more than one prediction.
        predictions = [device.memory for device in plan.devices]
        note = {"prediction_note": f"the plan's own, since: {error.message}"}
    body = {
        "strategy": plan.strategy,
        "engine": plan.engine,
        "model": config.model,
        "world_size": plan.processes,
        "global_batch": plan.global_batch,
        "steps": steps,
        "samples": metrics.samples,
        "tokens": metrics.tokens,
        "seconds": metrics.seconds,
        "total_seconds": total_seconds,
        "startup_seconds": startup_seconds,
        "tokens_per_second": metrics.tokens / metrics.seconds if metrics.seconds else None,
        "final_loss": metrics.final_loss,
        **results,
        **by_strategy,
        "result": str(run.result(config).relative_to(run.path)),
        "data": asdict(data),
        "longest_row": rows.longest,
        "largest_micro_batch_tokens": rows.largest_micro_batch,
        "padding_free": rows.padded_reason is None,
        "padded_reason": rows.padded_reason,
        "predicted_for": asdict(rows),
        **note,
        "devices": [
            {
                "index": device.index,
                "name": device.name,
                "planned_peak_bytes": device.predicted_peak_bytes,
                "predicted_allocated_bytes": predicted.allocated_bytes,
                "predicted_peak_bytes": predicted.peak_bytes,
                **measured.get(device.index, {}),
                **stage,
            }
            for device, predicted, stage in zip(plan.devices, predictions, stages, strict=True)
        ],
        "versions": versions(),
    }
    if timeline:
        write_atomically(run.timeline, json.dumps({"step": steps, "segments": timeline}, indent=1))
    write_atomically(run.report, json.dumps(body, indent=2))
    for remember in (machine.remember, machine.remember_stages):
        try:
            remember(plan, body, config, f"{run.path} {time.time():.0f}")
        except Exception as error:  # a cache that cannot be written, a driver that does not answer
            # A lesson lost; the run and its report stand.
            print(f"what this run used was not kept for later plans: {type(error).__name__}: {error}")


def measure_devices(plan: Plan, session: Session, use: CardUse) -> dict[int, dict[str, Any]]:
    """Peaks of the devices that this rank used, by the plan's device index; `used_by` says whose use it is.

    On a CPU the process is the device: its peak resident size, weights of the interpreter and libraries included.
    """
    import torch

    places = [session.rank] if plan.processes > 1 else list(range(len(plan.devices)))
    if session.device.type == "cpu":
        return {plan.devices[places[0]].index: {"used_peak_bytes": peak_resident_bytes()}} if len(places) == 1 else {}
    result = {}
    for place in places:
        ordinal = session.device.index if plan.processes > 1 else plan.ordinals[place]
        free, total = torch.cuda.mem_get_info(ordinal)
        reserved = torch.cuda.memory_reserved(ordinal)
        # torch leaves out the beginning that NVML and CUDA_VISIBLE_DEVICES have.
        uuid = f"GPU-{torch.cuda.get_device_properties(ordinal).uuid}"
        used, used_by = use.now(uuid, reserved, total - free)
        reserved_peak = torch.cuda.max_memory_reserved(ordinal)
        result[plan.devices[place].index] = {
            "allocated_peak_bytes": torch.cuda.max_memory_allocated(ordinal),
            "reserved_peak_bytes": reserved_peak,
            # What lies outside the allocator stays until the end; what it had reserved it may have given back.
            "used_peak_bytes": used - reserved + reserved_peak,
            "used_by": used_by,
        }
    return result


def peak_resident_bytes() -> int:
    """The largest resident size that this process has had."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read(path: Path) -> dict[str, Any]:
    """A report that `write` wrote.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} is damaged: {error}", "Move it away: the run's other files tell what they know without it."
        ) from error
