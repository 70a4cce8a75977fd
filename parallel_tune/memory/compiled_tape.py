"""A decoder layer that Unsloth has compiled as one region, as it does for full fine-tuning.

torch's partitioner (torch/_functorch/partitioners.py, min_cut_rematerialization_partition) keeps what its derivative
cannot cheaply make again: every input of a matrix product whose weight is trained, the products before the activation,
what attention needs, and the sum between the two blocks. Norms, rotations, casts and residual sums are made anew. Seen
by tracing a layer with torch 2.13; held against one run of qwen2-1.5b on an H100 (torch 2.11), which keeps
`UNEXPLAINED_HIDDEN` more. So that run is no test of it.
"""

from __future__ import annotations

from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.operations import FLOAT32_BYTES, Scene
from parallel_tune.memory.parameters import layer_linears
from parallel_tune.memory.tape import Tape, Value

UNEXPLAINED_HIDDEN = 2
"""Hidden states a layer that the run kept beyond the trace, to the thousandth."""
BACKWARD_HIDDEN = 3
"""Hidden states that the derivative holds beside the three inner products, as in the compiled feed-forward block."""


def compiled_layer(tape: Tape, scene: Scene, facts: ModelFacts, layer: int, micro_batch: int, source: Value) -> Value:
    """A dense layer whose weights are all trained, as one operation."""
    hidden, inner = source.size_bytes, scene.bytes_of(facts.intermediate_size)
    kept = [
        *[hidden] * 3,  # what the two norms leave, and the sum between the blocks
        *[hidden] * (facts.norms_per_layer - 2),
        *[hidden] * UNEXPLAINED_HIDDEN,
        *_attention(scene, facts, micro_batch),
        *[inner] * 3,
    ]
    buffers = [tape.hold(size_bytes) for size_bytes in kept]
    weights = tuple(
        elements * scene.settings.weight_bytes
        for linear in layer_linears(facts, layer)
        for elements in (linear.weight_parameters, linear.outputs if linear.bias else 0)
    )
    output = tape.operation(
        hidden,
        ((source, hidden),),
        (source, *buffers),
        weights,
        backward_scratch_bytes=3 * inner + BACKWARD_HIDDEN * hidden,
    )
    for buffer in buffers:
        tape.release(buffer)
    return output


def _attention(scene: Scene, facts: ModelFacts, micro_batch: int) -> list[int]:
    """Queries, keys and values after the rotation (and before a norm of their own), the result, and a float32 per head
    and token; with a mask keys and values for every head, and the mask as a bias."""
    settings = scene.settings
    query, key = scene.bytes_of(facts.query_size), scene.bytes_of(facts.kv_size)
    masked = settings.masked(micro_batch)
    repeated = query if masked or settings.repeats_heads else key
    before_norm = [query, key] if facts.qk_norm else []
    bias = scene.tokens * settings.mask_width(micro_batch) * scene.element_bytes if masked else 0
    return [query, query, repeated, repeated, *before_norm, scene.tokens * facts.num_heads * FLOAT32_BYTES, bias]
