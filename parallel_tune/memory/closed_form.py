"""The closed form: memory and time of a part of a model, in milliseconds and without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby

from parallel_tune.memory import speed
from parallel_tune.memory.captured import (
    CAPTURED_STREAMS,
    GRADIENT_COPIES,
    GRAPHS_CONTEXT_BYTES,
    captured_settings,
    returned_loss_bytes,
)
from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.fused_loss import fused_loss_bytes
from parallel_tune.memory.layer_tape import Segment, head_segment, layer_segment
from parallel_tune.memory.reserve import recordings_reserve_bytes, reserve_bytes
from parallel_tune.memory.settings import CPU_DEFAULTS, CUDA_DEFAULTS, MachineConstants, TrainingSettings
from parallel_tune.memory.split import lane_workspace_bytes, split_context_bytes
from parallel_tune.memory.states import StateBytes, lent_parameters, state_bytes, table_bytes
from parallel_tune.memory.unsloth_tape import OFFLOAD_CONTEXT_BYTES, OFFLOADED_HIDDEN, unpacked_weight_bytes
from strategies.contracts import Arrangement, Device, MemoryEstimate, Part

INDEX_BYTES = 8
"""An int64: token ids, labels, positions."""


@dataclass(frozen=True)
class ClosedFormEstimator:
    """`strategies.base.Estimator` for one model and its settings.

    Attributes:
        constants: of every device; None for `measured`, and where that has none for the kind's documented defaults.
        measured: constants that were measured on this machine, by the device's name.
        second_pass_tokens: of a captured run, tokens of the eager pass whose memory is kept beside the recordings';
            None for as many as the largest pass has, the most that there can be.
    """

    facts: ModelFacts
    settings: TrainingSettings
    constants: MachineConstants | None = None
    measured: Mapping[str, MachineConstants] = field(default_factory=dict)
    second_pass_tokens: int | None = None

    def memory(self, part: Part, arrangement: Arrangement, device: Device) -> MemoryEstimate:
        """Bytes at the peak on the device that holds `part`: the largest of the phases."""
        if device.kind == "cpu" and arrangement.gradient_checkpointing == "unsloth":
            # Checkpoints in host memory are the device's own there, and no stream copies them.
            arrangement = replace(arrangement, gradient_checkpointing="full")
        moments = _Moments(self.facts, self.settings, part, arrangement)
        phases = tuple(moments.all())
        peak = max(phases, key=lambda phase: phase.allocated_bytes)
        loss_bytes = max((phase.allocated_bytes for phase in phases if phase.phase == "cross_entropy"), default=0)
        estimate = self.on_device(peak, part, arrangement, device, peak.allocated_bytes - loss_bytes)
        hole = moments.table_hole_bytes(peak.allocated_bytes)
        return replace(estimate, reserve_bytes=estimate.reserve_bytes + hole)

    def on_device(
        self, peak: MemoryEstimate, part: Part, arrangement: Arrangement, device: Device, above_loss_bytes: int
    ) -> MemoryEstimate:
        """Live tensors at the peak, with what the machine adds to them.

        Args:
            above_loss_bytes: by how much the peak's live tensors exceed those of the loss.
        """
        built_in = CUDA_DEFAULTS if device.kind == "cuda" else CPU_DEFAULTS
        constants = self.constants or self.measured.get(device.name, built_in)
        streams = CAPTURED_STREAMS if arrangement.captured else 1
        workspaces = streams * constants.workspace_bytes + lane_workspace_bytes(constants, arrangement)
        peak = replace(peak, buffers_bytes=peak.buffers_bytes + workspaces)
        context = constants.context_bytes + (constants.nccl_bytes if arrangement.processes > 1 else 0)
        context += GRAPHS_CONTEXT_BYTES if arrangement.captured else 0
        context += split_context_bytes(part, arrangement) if device.kind == "cuda" else 0
        context += OFFLOAD_CONTEXT_BYTES if arrangement.gradient_checkpointing == "unsloth" else 0
        scratch = constants.nf4_scratch_bytes if self.settings.load_in_4bit else 0
        return replace(
            peak,
            context_bytes=context + scratch,
            reserve_bytes=max(
                reserve_bytes(peak, above_loss_bytes, self.facts, self.settings, constants, part, arrangement),
                self._captured_reserve_bytes(peak, part, arrangement),
            ),
        )

    def _captured_reserve_bytes(self, peak: MemoryEstimate, part: Part, arrangement: Arrangement) -> int:
        """Recordings keep their memory; an eager pass of a size that is not yet recorded takes its own beside it."""
        if not arrangement.captured:
            return 0
        # Each lane has recordings of its own; the last stage's share their memory, as no micro-batch waits there.
        others = 0 if part.head else (arrangement.lanes - 1) * peak.activations_bytes
        a_pass = peak.activations_bytes + peak.cross_entropy_bytes
        eager = a_pass + others  # each lane may be at one
        if self.second_pass_tokens is None:
            return others + eager
        # All but the tables of positions grows with the tokens.
        second = eager * self.second_pass_tokens // (arrangement.micro_batch * self.settings.sequence_length)
        return others + second + recordings_reserve_bytes(a_pass, self.facts, self.settings, part, arrangement)

    def phases(self, part: Part, arrangement: Arrangement) -> tuple[MemoryEstimate, ...]:
        """Live tensors at every moment that can be the peak: the loss, a layer's backward, the optimizer step."""
        return tuple(_Moments(self.facts, self.settings, part, arrangement).all())

    def micro_batch_seconds(self, part: Part, arrangement: Arrangement, device: Device) -> float:
        """Device seconds of one micro-batch, forward and backward, through `part`."""
        return speed.micro_batch_seconds(self.facts, self.settings, part, arrangement, device)

    def host_seconds(self, part: Part, arrangement: Arrangement) -> float:
        """Host seconds that issuing one micro-batch through `part` takes, device aside."""
        return speed.host_seconds(self.settings, part, arrangement)


class _Moments:
    """The moments of one optimizer step on one device."""

    def __init__(self, facts: ModelFacts, settings: TrainingSettings, part: Part, arrangement: Arrangement) -> None:
        settings = captured_settings(settings) if arrangement.captured else settings
        self.facts, self.settings, self.part, self.arrangement = facts, settings, part, arrangement
        self.states: StateBytes = state_bytes(facts, settings, part)
        self.hidden_bytes = arrangement.micro_batch * settings.sequence_length * facts.hidden_size
        self.hidden_bytes *= settings.compute_bytes
        # An earlier micro-batch, or another lane, has left its gradients; DDP's buckets hold them all the time.
        self.gradients_exist = arrangement.captured or (
            arrangement.gradient_accumulation_steps > 1 or arrangement.lanes > 1 or arrangement.processes > 1
        )
        self.checkpointed = arrangement.gradient_checkpointing != "none"
        self.layers = range(part.first_layer, part.last_layer + 1)
        self.segments = self._segments()
        self.stored = [self._stored(segment) for segment in self.segments]
        self.constant = self._constant_bytes()
        # Every other lane may wait with all that its micro-batch has stored, and the output that it has sent on; not in
        # the last stage, which takes a micro-batch's forward and backward in one go. Recordings are made one by one.
        others = 0 if part.head or arrangement.captured else arrangement.lanes - 1
        self.other_lanes = others * (sum(self.stored) + self.constant + self.hidden_bytes)

    def all(self) -> Iterator[MemoryEstimate]:
        if self.part.head:
            yield self._loss()
        yield self._forward()
        yield from self._layers()
        if self.part.embedding and self.settings.method == "full":
            yield self._embedding()
        yield self._optimizer()

    def _loss(self) -> MemoryEstimate:
        head = head_segment(self.facts, self.settings, self.arrangement.micro_batch, self.gradients_exist)
        own = head.backward_weight_gradient_bytes
        peak = max(head.backward_bytes - own, head.forward_bytes)
        if self.settings.cross_entropy == "fused":
            peak = min(peak, fused_loss_bytes(self.facts, self.settings, self.arrangement.micro_batch))
        if self.settings.cross_entropy == "returned":
            peak = returned_loss_bytes(self.facts, self.settings, self.arrangement.micro_batch)
        return self._estimate(
            "cross_entropy",
            self.states.gradients_bytes if self.gradients_exist else own,
            sum(self.stored) + self.constant + self.other_lanes,
            cross_entropy=peak,
        )

    def _layers(self) -> Iterator[MemoryEstimate]:
        """Backward reaches a layer when those above have left their gradients and those below still wait."""
        tables = table_bytes(self.facts, self.settings, self.part)
        waiting = tables.passing_bytes if self.gradients_exist else 0
        per_layer = (self.states.gradients_bytes - tables.gradient_bytes) // len(self.segments)
        above, below = tables.head_gradient_bytes, sum(self.stored)
        # A stage holds its output while it plays backwards, and the gradient that came for it; the topmost layer's own
        # bytes count that gradient already.
        ends = 0 if self.part.head else self.hidden_bytes
        for segment, stored, ends_of_run in self._runs(ends):
            if self.checkpointed:
                running, own = segment.checkpointed_bytes, segment.checkpointed_weight_gradient_bytes
            else:
                running, own = segment.backward_bytes, segment.backward_weight_gradient_bytes
            for passed, ends in ends_of_run:
                gradients = self.states.gradients_bytes if self.gradients_exist else above + passed * per_layer + own
                activations = below - (passed + 1) * stored + running - own + ends + self.constant + self.other_lanes
                yield self._estimate("backward", gradients, activations, buffers=waiting)
            length = ends_of_run[-1][0] + 1
            above, below = above + length * per_layer, below - length * stored

    def _runs(self, ends: int) -> Iterator[tuple[Segment, int, list[tuple[int, int]]]]:
        """Layers of one kind that follow each other, from the top: their segment, what each stores, and those of them
        that can be the peak, by their place in the run, with what the ends of the stage hold meanwhile.

        Along a run the bytes rise or fall evenly, so that its first or its last layer is the peak.

        Args:
            ends: what they hold when the topmost layer is played.
        """
        later = 0 if self.part.head else 2 * self.hidden_bytes
        at = 0
        for _, run in groupby(
            zip(reversed(self.segments), reversed(self.stored), strict=True), lambda pair: id(pair[0])
        ):
            alike = list(run)
            places = sorted({0, min(1, len(alike) - 1), len(alike) - 1})
            yield *alike[0], [(place, ends if at + place == 0 else later) for place in places]
            at += len(alike)

    def _forward(self) -> MemoryEstimate:
        """The topmost layer's forward pass: without a loss above it, that can be the peak."""
        below = sum(self.stored) - self.stored[-1]
        embedded = self.hidden_bytes if self.part.embedding and not self.checkpointed else 0
        gradients = self.states.gradients_bytes if self.gradients_exist else 0
        running = self.stored[-1] if self.checkpointed else self.segments[-1].forward_bytes
        mask = 0 if self.checkpointed else self._mask_bytes()
        activations = below + running + embedded + mask + self.constant + self.other_lanes
        return self._estimate("backward", gradients, activations)

    def _embedding(self) -> MemoryEstimate:
        """The embedding's gradient is dense, and a tied one is added to the head's before it is added to anything."""
        tables = table_bytes(self.facts, self.settings, self.part)
        extra = tables.embedding_gradient_bytes
        if tables.shared:
            extra *= 3 if self.gradients_exist else 2
        elif not self.gradients_exist:
            extra = 0
        activations = self.constant + self.hidden_bytes + self.other_lanes
        return self._estimate("backward", self.states.gradients_bytes, activations, buffers=extra)

    def table_hole_bytes(self, peak_bytes: int) -> int:
        """Room for a trained embedding's gradient, and for its sum with a tied head's, beside all else.

        Another lane's activations lie scattered among those that are freed: nothing as large fits between them. In
        three runs on two H200s the allocator held so much and 0.1 to 0.2 GiB.
        """
        tables = table_bytes(self.facts, self.settings, self.part)
        if self.arrangement.lanes == 1 or self.arrangement.captured or not tables.embedding_gradient_bytes:
            return 0
        layers_peak = max(moment.allocated_bytes for moment in self._layers())
        tensors = 2 if tables.shared else 1
        return max(0, layers_peak + tensors * tables.embedding_gradient_bytes - peak_bytes)

    def _optimizer(self) -> MemoryEstimate:
        temporaries = self.states.optimizer_temporaries_bytes
        moment = self._estimate("optimizer", self.states.gradients_bytes, 0, buffers=temporaries)
        if self.settings.method != "full":
            return moment
        lent = lent_parameters(self.facts, self.part) * self.settings.weight_bytes
        return replace(moment, weights_bytes=moment.weights_bytes - lent)

    def _estimate(
        self, phase: str, gradients: int, activations: int, cross_entropy: int = 0, buffers: int = 0
    ) -> MemoryEstimate:
        if self.arrangement.captured:
            buffers += GRADIENT_COPIES * self.states.gradients_bytes
        buffers += unpacked_weight_bytes(self.facts, self.settings)
        return MemoryEstimate(
            weights_bytes=self.states.weights_bytes,
            adapters_bytes=self.states.adapters_bytes,
            gradients_bytes=gradients,
            optimizer_bytes=self.states.optimizer_bytes,
            activations_bytes=activations,
            cross_entropy_bytes=cross_entropy,
            buffers_bytes=buffers,
            phase=phase,
        )

    def _segments(self) -> list[Segment]:
        """Of each layer; those of one kind share theirs."""
        representatives = _representatives(self.facts)[self.part.first_layer : self.part.last_layer + 1]
        kinds = {layer: self._segment(layer, True) for layer in set(representatives)}
        segments = [kinds[layer] for layer in representatives]
        if self.layers[0] == 0 and self.part.embedding and self.settings.method == "lora" and not self.checkpointed:
            segments[0] = self._segment(0, False)
        return segments

    def _segment(self, layer: int, input_needs_gradient: bool) -> Segment:
        micro_batch = self.arrangement.micro_batch
        return layer_segment(self.facts, self.settings, layer, micro_batch, input_needs_gradient, self.gradients_exist)

    def _stored(self, segment: Segment) -> int:
        if not self.checkpointed:
            return segment.stored_bytes
        return self.hidden_bytes if self.arrangement.gradient_checkpointing == "full" else 0

    def _constant_bytes(self) -> int:
        """Tensors of a micro-batch that no layer owns: ids, positions, rotary tables, masks, a stage's input."""
        facts, settings, part = self.facts, self.settings, self.part
        tokens = self.arrangement.micro_batch * settings.sequence_length
        indices = INDEX_BYTES * (settings.sequence_length + tokens * (part.embedding + 2 * part.head))
        kinds = 2 if facts.model_type.startswith("gemma3") else 1
        # Joined rows have a place in the tables each, padded ones share theirs.
        places = tokens if settings.packed else settings.sequence_length
        rotary = kinds * 2 * places * facts.head_dim * settings.compute_bytes
        incoming = self.hidden_bytes if not part.embedding and not self.checkpointed else 0
        # Recomputation needs the mask again; without it only the layers' biases made of it remain.
        offload = OFFLOADED_HIDDEN * self.hidden_bytes if self.arrangement.gradient_checkpointing == "unsloth" else 0
        return indices + rotary + incoming + offload + (self._mask_bytes() if self.checkpointed else 0)

    def _mask_bytes(self) -> int:
        """A square of each row's tokens, where any layer is masked: of booleans, or for eager attention of numbers."""
        length = self.settings.sequence_length
        windowed = any(layer in self.facts.windowed_layers for layer in self.layers) and (
            length >= self.facts.sliding_window
        )
        micro_batch = self.arrangement.micro_batch
        masked = (windowed and not self.settings.packed) or self.settings.masked(micro_batch)
        element = self.settings.compute_bytes if self.settings.eager_attention else 1
        return element * micro_batch * length * self.settings.mask_width(micro_batch) if masked else 0


@lru_cache(maxsize=64)
def _representatives(facts: ModelFacts) -> tuple[int, ...]:
    """For each layer the first of its kind, so that each kind is played once."""
    first: dict[tuple[bool, bool], int] = {}
    return tuple(
        first.setdefault((layer in facts.windowed_layers, facts.is_mixture(layer)), layer)
        for layer in range(facts.num_layers)
    )
