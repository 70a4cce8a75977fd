"""A cross-entropy that goes through the logits chunk by chunk, gradient included."""

from __future__ import annotations

from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.settings import TrainingSettings

FUSED_CHUNK_BYTES = 1 << 30
"""What one chunk of a fused loss may hold. An assumption on the safe side: Unsloth sizes its chunks by the memory
that is free when the loss runs (FACTS, Unsloth), so on a card that is nearly full they are smaller."""


def fused_loss_bytes(facts: ModelFacts, settings: TrainingSettings, micro_batch: int) -> int:
    """The hidden states and their gradient, one chunk, and the head's own gradient where it is trained."""
    tokens = micro_batch * settings.sequence_length
    hidden = 2 * tokens * facts.hidden_size * settings.compute_bytes
    head = facts.vocab_size * facts.hidden_size * settings.weight_bytes if settings.method == "full" else 0
    return hidden + head + FUSED_CHUNK_BYTES
