"""What past runs on this machine used beyond what was predicted, kept in the user's cache, a line a device and run.

A correction is a median of differences in bytes. Over the 21 runs of examples/benchmarks/results on an H200, each
corrected by the others of its engine and method, that changed the mean error of the card's use from 1.1% to 1.2% and
left the worst at 4.5%; ratios were no better. So where the built-in constants are right there is nothing to gain, and
the prediction stays what it is. It serves machines where they are wrong by about the same bytes in every run.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from parallel_tune.cache import append_lines, cache_folder
from parallel_tune.memory.machine_key import MachineKey
from parallel_tune.memory.settings import TrainingSettings
from strategies.base import Estimator
from strategies.contracts import Arrangement, Device, DevicePlan, MemoryEstimate, Part, Plan

RUNS_THAT_COUNT = 3
"""From so many runs on, a correction may refuse a plan; before that it is only shown."""
LATEST_RUNS = 20
"""Older runs are forgotten: the median follows what has changed."""
FEWEST_STEPS = 2
"""The optimizer's states are made in the first step; a run of one never had them beside activations."""
MOST_BYTES = 4 << 30
FARTHEST = 0.5
"""A difference of more than so many bytes and this share of the prediction is no error of the formula but another
process on the card."""


@dataclass(frozen=True)
class Correction:
    """What to add to a prediction.

    Attributes:
        bytes: median of used less predicted; negative where less was used.
        runs: how many runs it comes from.
    """

    bytes: int
    runs: int


def kind_of(engine: str, method: str, load_in_4bit: bool, processes: int, stages: int, estimate: str) -> str:
    """What a correction is kept for: runs of one kind err alike, since they share code, libraries and formulas.

    Args:
        estimate: what counted the memory; see `Plan.estimate`.
    """
    layout = "replicas" if processes > 1 else "stages" if stages > 1 else "alone"
    kind = f"{engine}/{'4bit' if load_in_4bit else method}/{layout}"
    return kind if estimate == "closed_form" else f"{kind}/{estimate}"


def path_of(key: MachineKey) -> Path:
    """The file of a machine's past runs."""
    return cache_folder() / "corrections" / f"{key.file_name}.jsonl"


def rows_of(report: Mapping[str, Any], plan: Plan, kind: str, run: str) -> dict[str, list[dict[str, Any]]]:
    """What a finished run teaches, by the devices' names.

    Nothing, where something is missing: on a CPU, after a run too short to reach its peak, where several stages share
    a device, or where the card's use is so far off that another process must have had a part of it.

    Args:
        run: what tells this run from all others; its ranks and stages are one observation.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    if report["steps"] < FEWEST_STEPS or len(plan.visible) < len(plan.devices) or "prediction_note" in report:
        return found
    for device, measured in zip(plan.devices, report["devices"], strict=True):
        used, predicted = measured.get("used_peak_bytes"), measured["predicted_peak_bytes"]
        if device.kind != "cuda" or used is None or measured.get("allocated_peak_bytes") is None or predicted <= 0:
            continue
        difference = used - predicted
        if abs(difference) > MOST_BYTES and abs(difference) > FARTHEST * predicted:
            continue
        found.setdefault(device.name, []).append(
            {
                "kind": kind,
                "run": run,
                "at": time.strftime("%Y-%m-%d %H:%M:%S"),
                "measured_constants": device.name in plan.constants,
                "predicted_allocated_bytes": measured["predicted_allocated_bytes"],
                "allocated_peak_bytes": measured["allocated_peak_bytes"],
                "reserved_peak_bytes": measured.get("reserved_peak_bytes"),
                "predicted_peak_bytes": predicted,
                "used_peak_bytes": used,
            }
        )
    return found


def remember(key: MachineKey, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add what a run has taught.

    Raises:
        OSError: the cache cannot be written.
    """
    append_lines(path_of(key), [{**row, "key": asdict(key)} for row in rows])


def learned(key: MachineKey, kind: str, measured_constants: bool) -> Correction | None:
    """The correction for a kind of run, from its latest runs; None if there are none.

    Runs that were predicted by other constants say nothing of these.
    """
    by_run: dict[str, list[int]] = {}
    for row in _rows(key):
        if row.get("kind") != kind or row.get("measured_constants") is not measured_constants:
            continue
        used, predicted = row.get("used_peak_bytes"), row.get("predicted_peak_bytes")
        if type(used) is int and type(predicted) is int and used > 0 and predicted > 0:
            by_run.setdefault(str(row.get("run")), []).append(used - predicted)
    # The fullest device of a run decides; equal replicas are one observation, not several.
    latest = [max(differences) for differences in by_run.values()][-LATEST_RUNS:]
    return Correction(round(statistics.median(latest)), len(latest)) if latest else None


def _rows(key: MachineKey) -> Iterator[dict[str, Any]]:
    try:
        lines = path_of(key).read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # half a line, or not ours
        if isinstance(row, dict) and row.get("key") == asdict(key):
            yield row


@dataclass(frozen=True)
class Corrections:
    """The corrections of this machine's devices.

    Attributes:
        keys: of the machine's GPUs, by the devices' names.
        measured: names of the devices whose constants were measured.
    """

    keys: Mapping[str, MachineKey]
    measured: frozenset[str]

    def of(self, name: str, kind: str) -> Correction | None:
        """The correction of a device by its name."""
        key = self.keys.get(name)
        return learned(key, kind, name in self.measured) if key is not None else None


class CautiousEstimator:
    """An estimator whose memory also says what past runs used beyond it.

    The prediction itself is untouched; only whether a plan fits is judged by the larger of the two.
    """

    def __init__(
        self, inner: Estimator, settings: TrainingSettings, corrections: Corrections, estimate: str = "closed_form"
    ) -> None:
        self._inner, self._settings, self._corrections, self._estimate = inner, settings, corrections, estimate
        self._known: dict[tuple[str, str], Correction | None] = {}

    def memory(self, part: Part, arrangement: Arrangement, device: Device) -> MemoryEstimate:
        """As the inner estimator's, with `caution_bytes`."""
        estimate = self._inner.memory(part, arrangement, device)
        settings = self._settings
        kind = kind_of(
            settings.engine,
            settings.method,
            settings.load_in_4bit,
            arrangement.processes,
            arrangement.stages,
            self._estimate,
        )
        if (device.name, kind) not in self._known:
            self._known[device.name, kind] = self._corrections.of(device.name, kind)
        correction = self._known[device.name, kind]
        if correction is None or correction.runs < RUNS_THAT_COUNT:
            return estimate
        return replace(estimate, caution_bytes=max(0, correction.bytes))

    def micro_batch_seconds(self, part: Part, arrangement: Arrangement, device: Device) -> float:
        """The inner estimator's."""
        return self._inner.micro_batch_seconds(part, arrangement, device)

    def host_seconds(self, part: Part, arrangement: Arrangement) -> float:
        """The inner estimator's."""
        return self._inner.host_seconds(part, arrangement)


def correct(plan: Plan, kind: str, corrections: Corrections) -> tuple[Plan, list[str]]:
    """The plan with `corrected_peak_bytes` on each device that past runs speak of, and a sentence a device model."""
    devices: list[DevicePlan] = []
    said: dict[str, str] = {}
    for device in plan.devices:
        correction = corrections.of(device.name, kind)
        if correction is not None:
            device = replace(
                device, corrected_peak_bytes=device.predicted_peak_bytes + correction.bytes, past_runs=correction.runs
            )
            said[device.name] = _sentence(device.name, kind, correction)
        devices.append(device)
    return replace(plan, devices=tuple(devices)), list(said.values())


def _sentence(name: str, kind: str, correction: Correction) -> str:
    runs = f"{correction.runs} past run{'s' if correction.runs > 1 else ''}"
    if correction.bytes < 0:
        use = "less; the prediction stands"
    elif correction.runs < RUNS_THAT_COUNT:
        use = f"more; shown only, until {RUNS_THAT_COUNT} runs agree"
    else:
        use = "more; a plan must leave room for that too"
    mib = abs(correction.bytes) / (1 << 20)
    return f"correction for {name}: {runs} of {kind} here used a median of {mib:,.0f} MiB {use}"
