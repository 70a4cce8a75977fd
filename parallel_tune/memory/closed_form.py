"""The closed form: memory and time of a part of a model, in microseconds and without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from parallel_tune.memory import speed
from parallel_tune.memory.activations import layer_activations
from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.settings import CPU_DEFAULTS, CUDA_DEFAULTS, MachineConstants, TrainingSettings
from parallel_tune.memory.states import state_bytes
from strategies.contracts import Arrangement, Device, MemoryEstimate, Part

FUSED_CHUNK_LOGITS_BYTES = 1 << 30
"""Float32 logits that a fused cross-entropy holds at once, at most."""


@dataclass(frozen=True)
class ClosedFormEstimator:
    """`strategies.base.Estimator` for one model and its settings.

    Attributes:
        constants: the machine's own; None for the documented defaults of the device's kind.
    """

    facts: ModelFacts
    settings: TrainingSettings
    constants: MachineConstants | None = None

    def memory(self, part: Part, arrangement: Arrangement, device: Device) -> MemoryEstimate:
        """Bytes at the peak on the device that holds `part`: the largest of the three phases."""
        phases = self.phases(part, arrangement)
        peak = max(phases, key=lambda phase: phase.allocated_bytes)
        constants = self.constants or (CUDA_DEFAULTS if device.kind == "cuda" else CPU_DEFAULTS)
        context = constants.context_bytes + (constants.nccl_bytes if arrangement.processes > 1 else 0)
        scratch = constants.nf4_scratch_bytes if self.settings.load_in_4bit else 0
        return replace(
            peak,
            context_bytes=context + scratch,
            reserve_bytes=int(peak.allocated_bytes * constants.reserve_fraction),
        )

    def phases(self, part: Part, arrangement: Arrangement) -> tuple[MemoryEstimate, ...]:
        """Live tensors at cross-entropy, at a layer's backward and at the optimizer step."""
        facts, settings = self.facts, self.settings
        tokens = arrangement.micro_batch * settings.sequence_length
        states = state_bytes(facts, settings, part)
        layers = [
            layer_activations(facts, settings, layer, tokens, arrangement.gradient_checkpointing)
            for layer in range(part.first_layer, part.last_layer + 1)
        ]
        stored = sum(layer.stored_bytes for layer in layers) * arrangement.lanes
        logits = 12 * facts.vocab_size * tokens if part.head else 0
        if settings.cross_entropy == "fused":
            logits = min(logits, 3 * FUSED_CHUNK_LOGITS_BYTES)
        accumulating = arrangement.gradient_accumulation_steps > 1 or arrangement.lanes > 1
        common = {
            "weights_bytes": states.weights_bytes,
            "adapters_bytes": states.adapters_bytes,
            "optimizer_bytes": states.optimizer_bytes,
        }
        return (
            MemoryEstimate(
                **common,
                gradients_bytes=states.gradients_bytes if accumulating else 0,
                activations_bytes=stored,
                cross_entropy_bytes=logits,
                phase="cross_entropy",
            ),
            MemoryEstimate(
                **common,
                gradients_bytes=states.gradients_bytes,
                activations_bytes=stored + max((layer.backward_bytes for layer in layers), default=0),
                cross_entropy_bytes=0,
                phase="backward",
            ),
            MemoryEstimate(
                **common,
                gradients_bytes=states.gradients_bytes,
                activations_bytes=0,
                cross_entropy_bytes=0,
                buffers_bytes=states.optimizer_temporaries_bytes,
                phase="optimizer",
            ),
        )

    def micro_batch_seconds(self, part: Part, arrangement: Arrangement, device: Device) -> float:
        """Device seconds of one micro-batch, forward and backward, through `part`."""
        return speed.micro_batch_seconds(self.facts, self.settings, part, arrangement, device)

    def host_seconds(self, part: Part, arrangement: Arrangement) -> float:
        """Host seconds that issuing one micro-batch through `part` takes, device aside."""
        return speed.host_seconds(self.settings, part, arrangement)
