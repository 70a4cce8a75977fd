"""What a layer and the head took in past split runs on this machine, kept in the user's cache, a line a device and run.

The formula of `speed` knows how seconds grow with tokens, layers and recomputation; a measurement knows how fast this
machine is. So a plan takes the measured seconds of the nearest kind of run, and the formula's ratio from there to what
it plans. Where nothing was measured the formula stands alone.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from parallel_tune.cache import append_lines, cache_folder
from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.machine_key import MachineKey
from parallel_tune.memory.settings import TrainingSettings
from strategies.contracts import Plan

FORMAT = 1
"""Of the cached lines; those of another are passed over."""
FEWEST_STEPS = 3
"""A run that looked at fewer steps says little."""
LATEST_RUNS = 10
"""Older runs are forgotten: the median follows what has changed."""
ALIKE = 1.1
"""Micro-batches whose tokens differ by no more than this factor are taken together."""
MOST_TOKENS = 1e8
LONGEST_SECONDS = 3600.0
"""No stage takes as long for a micro-batch: a figure above it is no measurement."""


@dataclass(frozen=True)
class Observation:
    """The stages of one run that lay on devices of one name.

    Attributes:
        layers, head, seconds: of each stage: how many layers, whether the head too, and forward and backward of a
            micro-batch.
        row_tokens: of a row on average.
        layer_host_seconds: the host issues a layer's work of a micro-batch in no more than this. Where stages overlap
            it keeps up with the slowest of them; where they take turns, with all together.
        captured: whether the stages were replayed, without the gaps that waiting for the host leaves.
    """

    checkpointing: str
    micro_batch_tokens: float
    row_tokens: float
    layers: tuple[int, ...]
    head: tuple[bool, ...]
    seconds: tuple[float, ...]
    layer_host_seconds: float
    at: str = ""
    captured: bool = False


def kind_of(facts: ModelFacts, settings: TrainingSettings) -> str:
    """What stage times are kept for: a layer's shape and how it is trained. The number of layers has no part in it."""
    shape = (
        f"{facts.model_type} {facts.hidden_size}/{facts.moe_intermediate_size or facts.intermediate_size} "
        f"heads {facts.num_heads}/{facts.num_kv_heads}x{facts.head_dim} vocabulary {facts.vocab_size}"
    )
    if facts.num_experts:
        shape += f" experts {facts.experts_per_token}/{facts.num_experts}"
    if settings.method == "full":
        method = "full"
    else:
        targets = "+".join(sorted(settings.lora_targets))
        extras = f"{' dora' if settings.use_dora else ''}{' dropout' if settings.lora_dropout else ''}"
        method = f"{'4-bit ' if settings.load_in_4bit else ''}lora r{settings.lora_rank} {targets}{extras}"
    eager = ["eager attention"] if settings.eager_attention else []
    return "; ".join(
        [_version_of(settings.engine), shape, settings.compute_dtype, method, settings.cross_entropy, *eager]
    )


@functools.lru_cache(maxsize=4)
def _version_of(engine: str) -> str:
    try:
        return f"{engine} {importlib.metadata.version(engine)}"
    except importlib.metadata.PackageNotFoundError:
        return engine


def path_of(key: MachineKey) -> Path:
    """The file of a machine's stage times."""
    return cache_folder() / "stages" / f"{key.file_name}.jsonl"


def rows_of(report: Mapping[str, Any], plan: Plan, kind: str, run: str) -> dict[str, dict[str, Any]]:
    """What a finished run teaches, by the devices' names; nothing if it was too short or told no stage's time."""
    measured = report.get("stage_seconds")
    if measured is None or measured["steps"] < FEWEST_STEPS or not report["samples"]:
        return {}
    if plan.captured and report["captured"]["reason"] is not None:
        return {}  # partly replayed, partly not
    found: dict[str, dict[str, Any]] = {}
    pace = max(measured["seconds"]) if report["lanes"] > 1 and not report["lanes_reason"] else sum(measured["seconds"])
    num_layers = plan.devices[-1].layers[1] + 1
    for place, (device, seconds) in enumerate(zip(plan.devices, measured["seconds"], strict=True)):
        row = found.setdefault(
            device.name,
            {
                "format": FORMAT,
                "kind": kind,
                "run": run,
                "at": time.strftime("%Y-%m-%d %H:%M:%S"),
                "checkpointing": plan.gradient_checkpointing,
                "captured": plan.captured,
                "lanes": plan.lanes,
                "micro_batch_tokens": measured["micro_batch_tokens"],
                "row_tokens": report["tokens"] / report["samples"],
                "layer_host_seconds": pace / num_layers,
                "layers": [],
                "head": [],
                "seconds": [],
            },
        )
        row["layers"].append(device.layers[1] - device.layers[0] + 1)
        row["head"].append(place == len(plan.devices) - 1)
        row["seconds"].append(seconds)
    return found


def remember(key: MachineKey, row: Mapping[str, Any]) -> None:
    """Add what a run has taught.

    Raises:
        OSError: the cache cannot be written.
    """
    append_lines(path_of(key), [{**row, "key": asdict(key)}])


def observations(key: MachineKey, kind: str) -> list[Observation]:
    """The runs of a kind, oldest first; lines that are torn, of another version or absurd are passed over."""
    found = []
    for row in _lines(path_of(key)):
        if row.get("format") != FORMAT or row.get("key") != asdict(key) or row.get("kind") != kind:
            continue
        try:
            found.append(_parse(row))
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # half a line, or not ours
        if isinstance(row, dict):
            yield row


def _parse(row: Mapping[str, Any]) -> Observation:
    layers, head, seconds = row["layers"], row["head"], row["seconds"]
    if not layers or not len(layers) == len(head) == len(seconds):
        raise ValueError("not as many of each")
    if any(type(count) is not int or count < 1 for count in layers) or any(type(last) is not bool for last in head):
        raise ValueError("no stages")
    figures = [float(each) for each in (*seconds, row["micro_batch_tokens"], row["row_tokens"])]
    host = float(row["layer_host_seconds"])
    if not all(math.isfinite(figure) and figure > 0 for figure in (*figures, host)):
        raise ValueError("no figures of a machine")
    if max(figures[:-2]) > LONGEST_SECONDS or max(figures[-2:]) > MOST_TOKENS:
        raise ValueError("beyond all machines")
    return Observation(
        str(row["checkpointing"]), figures[-2], figures[-1], tuple(layers), tuple(head), tuple(figures[:-2]),
        host, str(row.get("at", "")), row.get("captured") is True,
    )  # fmt: skip


Formula = Callable[[Observation, int, bool], float]
"""(observation, layers, head) -> the formula's seconds of such a part under the observation's conditions."""


@dataclass(frozen=True)
class Costs:
    """Measured seconds of a micro-batch, and what the formula says for the same.

    Attributes:
        layer_seconds, head_seconds: forward and backward; the head with its loss. Medians over runs.
        checkpointing, micro_batch_tokens: under which they were measured.
        layer_host_seconds: what the host takes at most; None where only another checkpointing was measured.
        runs: how many runs they come from.
        last: when the last of them was.
    """

    layer_seconds: float
    head_seconds: float
    formula_layer_seconds: float
    formula_head_seconds: float
    checkpointing: str
    micro_batch_tokens: float
    layer_host_seconds: float | None
    runs: int
    last: str

    @property
    def layer_factor(self) -> float:
        return self.layer_seconds / self.formula_layer_seconds

    @property
    def head_factor(self) -> float:
        return self.head_seconds / self.formula_head_seconds if self.formula_head_seconds > 0 else 1.0


def fit(runs: Sequence[Observation], checkpointing: str, tokens: float, formula: Formula) -> Costs | None:
    """What the runs nearest to these conditions say: the same checkpointing, or as much recomputed, before like tokens.

    Layers are taken to be alike. The head's share is what its stage took beyond its layers at the pace of the other
    stages; where one device has no other stage, layers and head are taken to be off by one factor.
    """
    if not runs:
        return None
    alike = [run for run in runs if (run.checkpointing == "none") == (checkpointing == "none")]
    same = [run for run in runs if run.checkpointing == checkpointing] or alike or list(runs)
    nearest = min(same, key=lambda run: abs(math.log(run.micro_batch_tokens / tokens)))
    near = [
        run
        for run in same
        if run.checkpointing == nearest.checkpointing
        and abs(math.log(run.micro_batch_tokens / nearest.micro_batch_tokens)) <= math.log(ALIKE)
    ][-LATEST_RUNS:]
    layers, heads, formula_layers, formula_heads = zip(*(_parts(run, formula) for run in near), strict=True)
    return Costs(
        statistics.median(layers),
        statistics.median(heads),
        statistics.median(formula_layers),
        statistics.median(formula_heads),
        nearest.checkpointing,
        statistics.median(run.micro_batch_tokens for run in near),
        min(run.layer_host_seconds for run in same[-LATEST_RUNS:]) if nearest.checkpointing == checkpointing else None,
        len(near),
        near[-1].at,
    )


def _parts(run: Observation, formula: Formula) -> tuple[float, float, float, float]:
    """Seconds of a layer and of the head, measured, and by the formula."""
    formula_layer = formula(run, 1, False)
    formula_head = max(0.0, formula(run, 1, True) - formula_layer)
    stages = list(zip(run.layers, run.head, run.seconds, strict=True))
    inner = [(count, seconds) for count, head, seconds in stages if not head]
    last = [(count, seconds) for count, head, seconds in stages if head]
    if inner:
        layer = sum(seconds for _, seconds in inner) / sum(count for count, _ in inner)
        head = layer / formula_layer * formula_head
        if last:
            head = max(0.0, last[0][1] - last[0][0] * layer)
        return layer, head, formula_layer, formula_head
    count, seconds = last[0]
    factor = seconds / (count * formula_layer + formula_head)
    return factor * formula_layer, factor * formula_head, formula_layer, formula_head


@dataclass(frozen=True)
class StageTimes:
    """The stage times of this machine's devices.

    Attributes:
        keys: of the machine's devices, by their names; empty where they are only declared.
    """

    keys: Mapping[str, MachineKey] = field(default_factory=dict)

    def of(self, kind: str) -> Mapping[str, Sequence[Observation]]:
        """The runs of a kind, by the devices' names; none unless all devices have some.

        To plan with one device measured and another by the formula would compare what cannot be compared.
        """
        found = {name: _observations(key, kind) for name, key in self.keys.items()}
        return found if all(found.values()) else {}


@functools.lru_cache(maxsize=64)
def _cached(path: Path, changed: int, key: MachineKey, kind: str) -> tuple[Observation, ...]:
    return tuple(observations(key, kind))


def _observations(key: MachineKey, kind: str) -> tuple[Observation, ...]:
    """Read once for all the candidates of a plan, and again when the file has changed."""
    path = path_of(key)
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        return ()
    return _cached(path, changed, key, kind)
