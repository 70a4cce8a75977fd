"""An estimator whose seconds are those that earlier runs on this machine measured, and the words that say so."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.settings import TrainingSettings
from parallel_tune.memory.stage_times import Costs, Observation, StageTimes, fit, kind_of
from strategies.base import Estimator
from strategies.contracts import Arrangement, Checkpointing, Device, MemoryEstimate, Part, Plan

Estimating = Callable[[TrainingSettings], Estimator]


class TimedEstimator:
    """`strategies.base.Estimator` whose stage seconds are measured, where runs of the kind were.

    Memory is the inner estimator's. So are the seconds of several processes, which no split run measures.

    Args:
        estimating: makes the inner estimator.
        devices: those planned for.
    """

    def __init__(
        self,
        estimating: Estimating,
        settings: TrainingSettings,
        facts: ModelFacts,
        times: StageTimes,
        devices: Sequence[Device],
    ) -> None:
        self._estimating, self._settings, self._facts = estimating, settings, facts
        self._inner = estimating(settings)
        self._devices = devices
        self._runs: Mapping[str, Sequence[Observation]] = times.of(kind_of(facts, settings))
        self._known: dict[tuple[object, ...], Costs | None] = {}

    def memory(self, part: Part, arrangement: Arrangement, device: Device) -> MemoryEstimate:
        """The inner estimator's."""
        return self._inner.memory(part, arrangement, device)

    def micro_batch_seconds(self, part: Part, arrangement: Arrangement, device: Device) -> float:
        """Device seconds of one micro-batch through `part`, by measured seconds of a layer and of the head."""
        costs = self.costs(arrangement, device)
        if costs is None:
            return self._inner.micro_batch_seconds(part, arrangement, device)
        layers = self._inner.micro_batch_seconds(replace(part, head=False), arrangement, device)
        head = self._inner.micro_batch_seconds(part, arrangement, device) - layers if part.head else 0.0
        return layers * costs.layer_factor + head * costs.head_factor

    def host_seconds(self, part: Part, arrangement: Arrangement) -> float:
        """The inner estimator's, but no more than a run here has shown that the host takes."""
        host = self._inner.host_seconds(part, arrangement)
        known = (self.costs(arrangement, device) for device in self._devices)
        shown = [costs.layer_host_seconds for costs in known if costs is not None]
        return min([host, *(part.num_layers * seconds for seconds in shown if seconds is not None)])

    def costs(self, arrangement: Arrangement, device: Device) -> Costs | None:
        """What was measured under the conditions nearest to these; None where nothing was."""
        # A replay has no gaps in which the device waits for the host: what either took says little of the other.
        runs = [run for run in self._runs.get(device.name, ()) if run.captured == arrangement.captured]
        if not runs or arrangement.processes > 1:
            return None
        tokens = arrangement.micro_batch * self._settings.sequence_length
        checkpointing, captured = arrangement.gradient_checkpointing, arrangement.captured
        key = (device.name, device.matmul_flops_per_second, checkpointing, captured, tokens)
        if key not in self._known:
            self._known[key] = fit(runs, checkpointing, tokens, lambda *what: self._formula(device, *what))
        return self._known[key]

    def costs_by_name(self, arrangement: Arrangement, name: str) -> Costs | None:
        """As `costs`, of the first device of a name."""
        return next((self.costs(arrangement, device) for device in self._devices if device.name == name), None)

    def _formula(self, device: Device, run: Observation, layers: int, head: bool) -> float:
        """The inner estimator's seconds of a part under an observation's conditions."""
        row = max(1, round(run.row_tokens))
        rows = max(1, round(run.micro_batch_tokens / row))
        arrangement = Arrangement(1, rows, 1, _checkpointing(run), stages=2, captured=run.captured)
        last = self._facts.num_layers - 1
        first = last - layers + 1 if head else min(1, last)
        part = Part(first, first + layers - 1, embedding=False, head=head)
        estimator = self._estimating(replace(self._settings, sequence_length=row))
        return estimator.micro_batch_seconds(part, arrangement, device) * run.micro_batch_tokens / (rows * row)


def _checkpointing(run: Observation) -> Checkpointing:
    return run.checkpointing if run.checkpointing in ("none", "unsloth") else "full"  # type: ignore[return-value]


def timed(estimating: Estimating, facts: ModelFacts, times: StageTimes, devices: Sequence[Device]) -> Estimating:
    """The same memory, with the seconds that runs on this machine measured."""
    if not times.keys:
        return estimating
    # A plan asks for the same settings again and again.
    return functools.cache(lambda settings: TimedEstimator(estimating, settings, facts, times, devices))


def sentences(
    plan: Plan, estimator: TimedEstimator, arrangement: Arrangement, by_formula: Callable[[], Plan]
) -> list[str]:
    """What a plan's seconds rest on, and what the formula alone would have planned; nothing where nothing was measured.

    Args:
        by_formula: plans the same by the formula alone.
    """
    said = []
    for name in {device.name: None for device in plan.devices}:
        costs = estimator.costs_by_name(arrangement, name)
        if costs is not None:
            said.append(_sentence(name, costs, arrangement))
    if said:
        other = by_formula()
        said.append(
            f"by the formula alone: {_cut(other)}, {other.predicted_tokens_per_second:,.0f} tokens/s; as planned, by "
            f"the measured times: {_cut(plan)}, {plan.predicted_tokens_per_second:,.0f} tokens/s"
        )
    return said


def _sentence(name: str, costs: Costs, arrangement: Arrangement) -> str:
    runs = f"{costs.runs} past run{'s' if costs.runs > 1 else ''} here, the last of {costs.last[:10]}"
    said = (
        f"stage times of {name}: a layer takes {_ms(costs.layer_seconds)} and the head with its loss "
        f"{_ms(costs.head_seconds)} for {costs.micro_batch_tokens:,.0f} tokens, measured by {runs}; the formula says "
        f"{_ms(costs.formula_layer_seconds)} and {_ms(costs.formula_head_seconds)}"
    )
    if costs.checkpointing != arrangement.gradient_checkpointing:
        said += f"; checkpointing was {costs.checkpointing}, and the formula goes on from there"
    return said


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g} ms"


def _cut(plan: Plan) -> str:
    layers = " / ".join(str(device.layers[1] - device.layers[0] + 1) for device in plan.devices)
    lanes = f"{plan.lanes} lanes" if plan.lanes > 1 else "one after the other"
    return f"{layers} layers, micro-batch {plan.micro_batch}, {lanes}"
