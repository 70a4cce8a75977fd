"""What an allocator holds beyond live tensors at the peak: freed blocks that no later tensor fits into."""

from __future__ import annotations

from dataclasses import dataclass

from parallel_tune.memory.captured import CAPTURED_RESERVE_BESIDE_BYTES, CAPTURED_RESERVE_BYTES
from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.fused_loss import chunk_bytes
from parallel_tune.memory.settings import MachineConstants, TrainingSettings
from strategies.contracts import Arrangement, MemoryEstimate, Part


@dataclass(frozen=True)
class Products:
    """So many of a micro-batch's inner products of a feed-forward block, and of its hidden states."""

    inner: float
    hidden: float


KEPT = Products(2.7, 8)
KEPT_4BIT = Products(1.2, 1.5)
RECOMPUTED = Products(0.5, 4)
"""Beside one copy of the logits, which the loss cannot help: it takes two tensors of twice their size where logits and
one such tensor have been freed, and the rest stays a hole. By playing whole traced steps, tensor by tensor, through the
rules of torch's allocator (c10/cuda/CUDACachingAllocator.cpp, segments that grow): 46 of seven shapes.
tests/test_memory_reserve.py plays some anew. The same rules met three recorded runs on an H100 to the MiB."""
FUSED_SHARE = 0.01
FUSED_LEAST_BYTES = 128 << 20
"""Behind a loss that never holds all logits. Chosen by 21 runs of Unsloth on two kinds of cards: 14 to 375 MiB, most of
it where most is allocated; so these are no test of it."""
FULL_RECOMPUTED_LOGITS = 2.0
"""Copies of the logits likewise, where layers are recomputed beside trained weights and the loss is the peak: their
gradients then lie among the freed logits."""


def reserve_bytes(
    peak: MemoryEstimate,
    above_loss_bytes: int,
    facts: ModelFacts,
    settings: TrainingSettings,
    constants: MachineConstants,
    part: Part,
    arrangement: Arrangement,
) -> int:
    """Bytes that the allocator holds beyond `peak` on the device of `part`; recordings aside.

    Args:
        above_loss_bytes: by how much the peak's live tensors exceed those of the loss.
    """
    if constants.heap_share:
        return int(constants.heap_share * (peak.activations_bytes + peak.cross_entropy_bytes))
    reserve = max(int(peak.allocated_bytes * constants.reserve_fraction), constants.segment_bytes)
    if not part.head or not constants.reserve_fraction:
        return reserve
    fused = settings.cross_entropy == "fused"
    logits = _logits_bytes(facts, settings, arrangement)
    if not settings.segments_grow:
        return reserve if fused else max(reserve, _fixed_segments_bytes(logits, constants, arrangement))
    if fused:
        # The transformers engine's chunk is the largest tensor that is freed at the loss: it can stay a hole.
        hole = chunk_bytes(facts, settings, arrangement.micro_batch) if settings.engine == "transformers" else 0
        return max(int(peak.allocated_bytes * FUSED_SHARE), FUSED_LEAST_BYTES, hole)
    recomputed = arrangement.gradient_checkpointing != "none"
    if settings.method == "full":
        copies = FULL_RECOMPUTED_LOGITS if recomputed else 1.0
        # A higher peak in another phase fills the hole first: what was held at the loss stays held.
        return max(reserve, int(copies * logits) - above_loss_bytes)
    products = RECOMPUTED if recomputed else KEPT_4BIT if settings.load_in_4bit else KEPT
    widths = products.inner * facts.intermediate_size + products.hidden * facts.hidden_size
    tokens = arrangement.micro_batch * settings.sequence_length
    return max(constants.segment_bytes, logits + int(tokens * widths) * settings.compute_bytes)


def _logits_bytes(facts: ModelFacts, settings: TrainingSettings, arrangement: Arrangement) -> int:
    """One copy of a micro-batch's logits, as the head gives them."""
    return arrangement.micro_batch * settings.sequence_length * facts.vocab_size * settings.compute_bytes


def _fixed_segments_bytes(logits: int, constants: MachineConstants, arrangement: Arrangement) -> int:
    reserve = int(logits * constants.loss_reserve_logits)
    if arrangement.gradient_checkpointing != "none":
        # The loss holds six times the logits of a 16-bit forward.
        reserve = max(reserve, min(3 * logits, constants.checkpointed_loss_reserve_bytes))
    return reserve


def recordings_reserve_bytes(
    a_pass: int, facts: ModelFacts, settings: TrainingSettings, part: Part, arrangement: Arrangement
) -> int:
    """What lies idle in a captured run's recordings, the eager pass of another size aside.

    Args:
        a_pass: bytes of the activations and the loss of a micro-batch, which are the most that it can be.
    """
    if not settings.segments_grow:
        return min(a_pass, CAPTURED_RESERVE_BYTES)
    works_in_place = settings.engine == "unsloth"  # its loss
    logits = _logits_bytes(facts, settings, arrangement) if part.head and not works_in_place else 0
    if logits or not (part.embedding and part.head):
        return min(a_pass, logits + CAPTURED_RESERVE_BESIDE_BYTES)
    return 0
