"""What one micro-batch keeps on a device between its forward and its backward pass."""

from __future__ import annotations

from dataclasses import dataclass

from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.settings import TrainingSettings
from strategies.contracts import Checkpointing


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one layer for one micro-batch.

    Attributes:
        stored_bytes: what waits for this layer's backward pass.
        backward_bytes: what the layer's backward holds on top: recomputed activations and gradients.
    """

    stored_bytes: int
    backward_bytes: int


def layer_activations(
    facts: ModelFacts, settings: TrainingSettings, layer: int, tokens: int, checkpointing: Checkpointing
) -> LayerActivations:
    """Activations of one layer; coefficients of FACTS, Memory, until the derived ones replace them."""
    hidden, kv = facts.hidden_size, facts.kv_size
    inner = facts.intermediate_size
    if facts.is_mixture(layer):
        inner = facts.experts_per_token * facts.moe_intermediate_size + facts.shared_expert_intermediate_size
    scale = settings.compute_bytes / 2
    if checkpointing == "none":
        h, i, k = (28.6, 8.44, 1.6) if settings.method == "lora" else (24.6, 8.4, 1.5)
        stored = h * hidden + i * inner + k * kv
        return LayerActivations(int(stored * scale * tokens), int(4 * (hidden + inner) * scale * tokens))
    stored = 2 * hidden if checkpointing == "full" else 0
    return LayerActivations(
        int(stored * scale * tokens), int((40.9 * hidden + 14.7 * inner + 2.4 * kv) * scale * tokens)
    )
