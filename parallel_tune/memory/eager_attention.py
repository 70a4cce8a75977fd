"""Eager attention as a tape: unlike the kernels it makes the scores of all pairs of tokens, and keeps them."""

from __future__ import annotations

from parallel_tune.memory import operations as ops
from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.operations import Scene
from parallel_tune.memory.tape import Tape, Value


def eager_scores(
    tape: Tape, scene: Scene, facts: ModelFacts, micro_batch: int, states: tuple[Value, Value, Value]
) -> Value:
    """eager_attention_forward of transformers: the softmax in float32, and Gemma 2's soft cap of the scores.

    Args:
        states: queries, and keys and values of every head.
    """
    query, key, value = states
    pairs = scene.tokens * facts.num_heads * scene.settings.mask_width(micro_batch)
    narrow, wide = pairs * scene.element_bytes, pairs * ops.FLOAT32_BYTES
    # Several rows' heads lie apart in memory, and a product of them takes copies.
    copied = micro_batch > 1 and not scene.settings.packed
    if copied:
        query, key, value = (tape.operation(query.size_bytes, ((factor, query.size_bytes),)) for factor in states)
        tape.drop(*states)
    product = tape.operation(narrow, ((query, query.size_bytes), (key, key.size_bytes)), (query, key))
    scores = tape.operation(narrow, ((product, narrow),))
    tape.drop(product)
    if facts.attention_softcap:
        scores = ops.softcap(tape, scores)
    masked = tape.operation(narrow, ((scores, None),))
    tape.drop(scores)
    upcast = ops.cast(tape, masked, wide)
    shares = tape.operation(wide, ((upcast, wide),), save_output=True)
    tape.drop(upcast)
    weights = ops.cast(tape, shares, narrow)
    tape.drop(shares, masked)
    joined = tape.operation(query.size_bytes, ((weights, narrow), (value, value.size_bytes)), (weights, value))
    tape.drop(weights, query, key, value)
    result = tape.operation(joined.size_bytes, ((joined, None),))
    tape.drop(joined)
    return result
