"""A cross-entropy that goes through the logits chunk by chunk, gradient included."""

from __future__ import annotations

from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.operations import FLOAT32_BYTES
from parallel_tune.memory.settings import TrainingSettings
from parallel_tune.memory.unsloth_tape import KERNEL_FAMILIES

FUSED_CHUNK_ROWS = 512
"""Tokens of one chunk of the transformers engine's fused loss (parallel_tune/chunked_loss.py); of Unsloth's for layers
that it only compiles, so many whose float32 logits it holds (one row of gemma3-1b)."""

UNSLOTH_TILE_BYTES = 256 << 20
"""The most that Unsloth's loss holds of the logits at once (unsloth_zoo/fused_losses/fused_linear.py); less on a card
with little free memory."""
UNSLOTH_CHUNK_ROWS = 4096
"""Tokens of a chunk of it, whose hidden states and their gradient it holds in 16 and in 32 bits."""


def fused_loss_bytes(facts: ModelFacts, settings: TrainingSettings, micro_batch: int) -> int:
    """The hidden states and their gradient, one chunk, and the head's own gradient where it is trained."""
    tokens = micro_batch * settings.sequence_length
    hidden = tokens * facts.hidden_size * settings.compute_bytes
    head = facts.vocab_size * facts.hidden_size * settings.weight_bytes if settings.method == "full" else 0
    if settings.engine == "unsloth" and facts.model_type in KERNEL_FAMILIES:
        rows = min(tokens, UNSLOTH_CHUNK_ROWS)
        chunk = rows * facts.hidden_size * (settings.compute_bytes + FLOAT32_BYTES)
        return 3 * hidden + head + chunk + min(tokens * facts.vocab_size * FLOAT32_BYTES, UNSLOTH_TILE_BYTES)
    chunk = chunk_bytes(facts, settings, micro_batch)
    if settings.engine == "unsloth":
        return 2 * hidden + head + chunk
    if settings.method == "full" and settings.weight_bytes != settings.compute_bytes:
        head += 2 * facts.vocab_size * facts.hidden_size * settings.compute_bytes  # the cast weight, a product to cast
    normed = tokens * facts.hidden_size * FLOAT32_BYTES  # what the final norm keeps
    return normed + 2 * hidden + head + chunk


def chunk_bytes(facts: ModelFacts, settings: TrainingSettings, micro_batch: int) -> int:
    """A chunk's float32 logits; with the transformers engine beside them its 16-bit products, and its caps' slopes."""
    logits = min(micro_batch * settings.sequence_length, FUSED_CHUNK_ROWS) * facts.vocab_size
    if settings.engine == "unsloth":
        return logits * FLOAT32_BYTES
    products = settings.compute_bytes if settings.compute_bytes < FLOAT32_BYTES else 0
    slopes = FLOAT32_BYTES if facts.final_softcap else 0
    return logits * (FLOAT32_BYTES + products + slopes)
