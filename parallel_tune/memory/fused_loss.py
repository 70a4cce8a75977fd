"""A cross-entropy that goes through the logits chunk by chunk, gradient included."""

from __future__ import annotations

from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.operations import FLOAT32_BYTES
from parallel_tune.memory.settings import TrainingSettings

FUSED_CHUNK_ROWS = 512
"""Tokens whose float32 logits one chunk of Unsloth's fused loss holds. Measured beside llama-1b on a card with much
free memory (H200); where little is free its chunks are smaller, never larger (FACTS, Unsloth)."""


def fused_loss_bytes(facts: ModelFacts, settings: TrainingSettings, micro_batch: int) -> int:
    """The hidden states and their gradient, one chunk, and the head's own gradient where it is trained."""
    tokens = micro_batch * settings.sequence_length
    hidden = 2 * tokens * facts.hidden_size * settings.compute_bytes
    head = facts.vocab_size * facts.hidden_size * settings.weight_bytes if settings.method == "full" else 0
    return hidden + head + min(tokens, FUSED_CHUNK_ROWS) * facts.vocab_size * FLOAT32_BYTES
