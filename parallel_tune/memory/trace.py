"""The traced check: one training step on fake tensors, two and three layers deep, extrapolated to the whole part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.fake_model import cut_to
from parallel_tune.memory.settings import TrainingSettings
from parallel_tune.memory.training_step import TrainingStep, as_on_a_gpu
from strategies.contracts import Arrangement, Part


def trace_peak(
    facts: ModelFacts,
    settings: TrainingSettings,
    part: Part,
    arrangement: Arrangement,
    overrides: Mapping[str, Any] | None = None,
) -> int:
    """Bytes of live tensors at the peak of a training step through `part`."""
    return max(Tracer(facts, settings, overrides).phases(part, arrangement).values())


@dataclass(frozen=True)
class Trace:
    """What one traced step held.

    Attributes:
        phases: the peak of each phase, in bytes.
        kept: bytes by what they are: "weights" (frozen, or all in full training), "adapters", "gradients",
            "optimizer", and "stored", what a micro-batch leaves for its backward pass in a part without the head; and
            trainable elements, "trainable" and those that an 8-bit optimizer keeps "float32_states" of.
    """

    phases: Mapping[str, int]
    kept: Mapping[str, int]


class Tracer:
    """Traces of one model under one set of settings; each stack of layers is traced once."""

    def __init__(
        self, facts: ModelFacts, settings: TrainingSettings, overrides: Mapping[str, Any] | None = None
    ) -> None:
        self.facts, self.settings, self.overrides = facts, settings, overrides
        self._known: dict[tuple[Any, ...], Trace] = {}

    def phases(self, part: Part, arrangement: Arrangement) -> dict[str, int]:
        """The peak of each phase. Every layer in the middle of a stack costs a phase the same, for its kind; so a stack
        of the first and the last layer, and one with a layer of each kind between them, say what the whole stack costs.

        Modules outside the text model (a vision tower) are not run; their weights are added.
        """
        base, deeper, kinds = self._stacks(part, arrangement)
        phases = {
            phase: peak + sum(len(kinds[kind]) * (deep.phases[phase] - peak) for kind, deep in deeper.items())
            for phase, peak in base.phases.items()
        }
        # In the middle, each layer below costs what it stores, and each one above what it leaves behind.
        for kind, deep in deeper.items():
            for layer in (kinds[kind][0], kinds[kind][-1]):
                beside = [(other, k) for k, members in kinds.items() for other in members if other != layer]
                phases[f"backward_{layer}"] = deep.phases["backward_middle"] + sum(
                    deeper[k].phases[phase] - base.phases[phase]
                    for other, k in beside
                    for phase in ("backward_top" if other < layer else "backward_bottom",)
                )
        outside = self._outside_bytes(part)
        return {phase: peak + outside for phase, peak in phases.items()}

    def kept(self, part: Part, arrangement: Arrangement) -> dict[str, int]:
        """What a step keeps, by what it is; see `Trace`."""
        base, deeper, kinds = self._stacks(part, arrangement)
        kept = {
            name: size + sum(len(kinds[kind]) * (deep.kept[name] - size) for kind, deep in deeper.items())
            for name, size in base.kept.items()
        }
        return {**kept, "weights": kept["weights"] + self._outside_bytes(part)}

    def _outside_bytes(self, part: Part) -> int:
        return self.facts.extra_parameters * self.settings.weight_bytes if part.embedding else 0

    def _stacks(
        self, part: Part, arrangement: Arrangement
    ) -> tuple[Trace, dict[tuple[bool, bool], Trace], dict[tuple[bool, bool], list[int]]]:
        """The shortest stack, one with a middle layer of each kind, and the layers of each kind."""
        layers = tuple(range(part.first_layer, part.last_layer + 1))
        first, last = layers[0], layers[-1]
        base = self._trace(part, arrangement, (first, last) if len(layers) > 1 else layers)
        kinds: dict[tuple[bool, bool], list[int]] = {}
        for layer in layers[1:-1]:
            kinds.setdefault((layer in self.facts.windowed_layers, self.facts.is_mixture(layer)), []).append(layer)
        deeper = {kind: self._trace(part, arrangement, (first, members[0], last)) for kind, members in kinds.items()}
        return base, deeper, kinds

    def _trace(self, part: Part, arrangement: Arrangement, layers: tuple[int, ...]) -> Trace:
        """Counted on fake tensors, in a model that has only these layers; what cannot matter is left out of the key."""
        facts = cut_to(self.facts, layers)
        steps, checkpointed = min(2, arrangement.gradient_accumulation_steps), arrangement.gradient_checkpointing
        alike = Arrangement(
            min(2, arrangement.processes), arrangement.micro_batch, steps, "none" if checkpointed == "none" else "full"
        )
        key = (facts, part.embedding, part.head, alike)
        if key not in self._known:
            self._known[key] = trace_layers(facts, self.settings, part, alike, self.overrides)
        return self._known[key]


def trace_layers(
    facts: ModelFacts,
    settings: TrainingSettings,
    part: Part,
    arrangement: Arrangement,
    overrides: Mapping[str, Any] | None = None,
) -> Trace:
    """One traced step of a model of a few layers, all of which `part` holds."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), as_on_a_gpu():
        step = TrainingStep(facts, settings, part, arrangement, overrides)
        phases = step.peaks_bytes()
        return Trace(phases, step.kept())
