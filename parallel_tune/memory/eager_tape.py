"""Eager attention as a tape: the scores of each head are a matrix of the tokens, kept for the backward pass."""

from __future__ import annotations

from parallel_tune.memory import operations as ops
from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.operations import Scene
from parallel_tune.memory.tape import Tape, Value


def eager_scores(
    tape: Tape, scene: Scene, facts: ModelFacts, micro_batch: int, states: tuple[Value, Value, Value]
) -> Value:
    """`softmax(cap(query @ key * scale) + mask) @ value` (eager_attention_forward of transformers' models): kept are
    the shares in float32 and in the compute dtype, and what a cap makes of the scores."""
    query, key, value = states
    query_bytes, key_bytes = scene.bytes_of(facts.query_size), scene.bytes_of(facts.kv_size)
    if facts.num_heads != facts.num_kv_heads:
        repeated_bytes = query_bytes if facts.num_kv_heads > 1 else 0
        repeated = [ops.repeat(tape, state, repeated_bytes, key_bytes) for state in (key, value)]
        tape.drop(key, value)
        key, value = repeated
    elements = scene.tokens * scene.settings.mask_width(micro_batch) * facts.num_heads
    narrow, wide = elements * scene.element_bytes, elements * ops.FLOAT32_BYTES
    product = tape.operation(narrow, ((query, query_bytes), (key, query_bytes)), (query, key))
    scores = tape.operation(narrow, ((product, narrow),))
    tape.drop(product, query, key)
    if facts.attention_softcap:
        scores = ops.softcap(tape, scores)
    masked = tape.operation(narrow, ((scores, None),))
    tape.drop(scores)
    # The name is bound anew only when the last of these is made.
    scores32 = ops.cast(tape, masked, wide)
    shares32 = tape.operation(wide, ((scores32, wide),), save_output=True)
    tape.drop(scores32)
    shares = ops.cast(tape, shares32, narrow)
    tape.drop(shares32, masked)
    joined = tape.operation(query_bytes, ((shares, narrow), (value, query_bytes)), (shares, value))
    turned = tape.operation(query_bytes, ((joined, None),))
    tape.drop(joined, shares, value)
    return turned
