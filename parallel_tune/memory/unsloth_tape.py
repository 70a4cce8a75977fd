"""A decoder layer of Unsloth's LoRA path, whose derivatives keep little.

What the autograd functions of unsloth/kernels (release 2026.10, Apache-2.0) save: the norm its input and a float32 per
token; the q, k, v product its input; the feed-forward block its input and the two products before the activation, in
which its derivative works in place. Attention goes through torch's cuDNN kernel on recent cards, and Unsloth fills
every row up for it (unsloth/utils/attention_dispatch.py): queries, keys, values and the result are kept filled up, and
the result once more as the output projection reads it.

Read, and then held against every allocation of seven runs on an H100 (torch 2.11): Qwen2, Qwen3, Mistral, Llama; joined
and padded, captured, recomputed, offloaded; 16 and 4 bits. So these are no test of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from parallel_tune.memory import operations as ops
from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.feed_forward import mixture
from parallel_tune.memory.operations import Scene
from parallel_tune.memory.parameters import Linear, adapter_shapes, attention_linears, layer_linears
from parallel_tune.memory.settings import TrainingSettings
from parallel_tune.memory.tape import Tape, Value


def unsloth_layer(tape: Tape, scene: Scene, facts: ModelFacts, layer: int, micro_batch: int, source: Value) -> Value:
    """LlamaDecoderLayer_fast_forward with fast_lora's functions."""
    middle = _residual(tape, scene, facts, source, _attention(tape, scene, facts, layer, micro_batch, source))
    result = _residual(tape, scene, facts, middle, _feed_forward(tape, scene, facts, layer, middle))
    tape.drop(middle)
    return result


KERNEL_FAMILIES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "cohere", "granite", "falcon_h1"}
)
"""Model types whose layers Unsloth has written itself. In others, which it only compiles, the feed-forward block keeps
its inner product as well, and attention's result lies as the projection reads it: settled by one row of gemma3-1b."""
OFFLOADED_HIDDEN = 3
"""Hidden states on the device beside checkpoints in host memory: two buffers for copies, and the last layer's own."""
OFFLOAD_CONTEXT_BYTES = 72 << 20
"""What they add to the context, outside the allocator: the stream of the copies, and pinned memory's mapping. Measured
on an H100: 70 to 80 MiB in four runs of three shapes, so these are no test of it."""
COMPILED_HIDDEN = 3
"""Hidden states that the compiled backward of a feed-forward block holds beside its three inner ones."""
ATTENTION_ROW = 128
"""Rows are filled up to a multiple of it, and by one whole multiple where they are one."""


def spare_tokens(row_tokens: int) -> int:
    """Tokens by which attention fills a row up."""
    return ATTENTION_ROW - row_tokens % ATTENTION_ROW


def mean_spare_tokens(lengths: Sequence[int]) -> int:
    """The same for rows of these lengths, on average."""
    return round(sum(map(spare_tokens, lengths)) / len(lengths))


def unpacked_weight_bytes(facts: ModelFacts, settings: TrainingSettings) -> int:
    """A 16-bit copy of the largest packed weight: Unsloth unpacks into one buffer, which it keeps."""
    if settings.engine != "unsloth" or not settings.load_in_4bit:
        return 0
    return _largest_linear(facts) * settings.compute_bytes


@lru_cache(maxsize=64)
def _largest_linear(facts: ModelFacts) -> int:
    return max(linear.weight_parameters for layer in range(facts.num_layers) for linear in layer_linears(facts, layer))


def _norm(tape: Tape, scene: Scene, source: Value) -> Value:
    statistic = tape.hold(scene.tokens * ops.FLOAT32_BYTES)
    result = tape.operation(source.size_bytes, ((source, source.size_bytes),), (source, statistic))
    tape.release(statistic)
    return result


def _residual(tape: Tape, scene: Scene, facts: ModelFacts, residual: Value, inner: Value) -> Value:
    if facts.norms_per_layer == 4:
        normed = _norm(tape, scene, inner)
        tape.drop(inner)
        inner = normed
    result = ops.add(tape, residual, inner)
    tape.drop(inner)
    return result


def _adapter_gradients(facts: ModelFacts, scene: Scene, layer: int, names: tuple[str, ...]) -> tuple[int, ...]:
    """Bytes of the gradients that one function leaves for the adapters of these linears."""
    settings = scene.settings
    return tuple(rows * columns * settings.adapter_bytes for rows, columns in _adapters(facts, scene, layer, names))


def _adapters(facts: ModelFacts, scene: Scene, layer: int, names: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    settings = scene.settings
    targets = tuple(name for name in names if name in settings.lora_targets or "all-linear" in settings.lora_targets)
    return tuple(adapter_shapes(facts, layer, settings.lora_rank, targets)) if targets and not facts.num_experts else ()


def _attention(tape: Tape, scene: Scene, facts: ModelFacts, layer: int, micro_batch: int, source: Value) -> Value:
    *inputs, output = attention_linears(facts)
    normed = _norm(tape, scene, source)
    width = scene.bytes_of(facts.query_size + 2 * facts.kv_size)
    gradients = _adapter_gradients(facts, scene, layer, tuple(shape.name for shape in inputs))
    # With a bias the three go through peft's own layer, each with a copy of the input in 16 bits.
    copies = tape.hold(2 * normed.size_bytes if facts.qkv_bias and gradients else 0)
    states = tape.operation(width, ((normed, normed.size_bytes),), (normed, copies), gradients)
    tape.release(copies)
    tape.drop(normed)
    if facts.qk_norm:  # keeps queries and keys as they were before the norm
        before = tape.hold(scene.bytes_of(facts.query_size + facts.kv_size))
        turned = tape.operation(width, ((states, width),), (before,))
        tape.release(before)
        tape.drop(states)
        states = turned
    own_kernels = facts.model_type in KERNEL_FAMILIES
    tokens = scene.tokens + (_spare_tokens(scene, micro_batch) if own_kernels else 0)
    heads = facts.num_heads if scene.settings.repeats_heads else facts.num_kv_heads
    filled_width = facts.query_size + 2 * facts.head_dim * heads
    filled = tape.operation(tokens * filled_width * scene.element_bytes, ((states, width),))
    tape.drop(states)
    statistic = tape.hold(tokens * facts.num_heads * ops.FLOAT32_BYTES)
    square = scene.tokens * scene.settings.mask_width(micro_batch) * scene.element_bytes
    bias = tape.hold(square if scene.settings.masked(micro_batch) else 0)
    joined = tape.operation(
        tokens * facts.query_size * scene.element_bytes,
        ((filled, filled.size_bytes),),
        (filled, statistic, bias),
        save_output=True,
    )
    tape.release(statistic)
    tape.release(bias)
    tape.drop(filled)
    if own_kernels:
        copied = tape.operation(scene.bytes_of(facts.query_size), ((joined, joined.size_bytes),))
        tape.drop(joined)
        joined = copied
    return _output(tape, scene, facts, layer, joined, output)


def _spare_tokens(scene: Scene, micro_batch: int) -> int:
    known = scene.settings.spare_tokens
    return micro_batch * spare_tokens(scene.settings.sequence_length) if known is None else known


def _output(tape: Tape, scene: Scene, facts: ModelFacts, layer: int, joined: Value, shape: Linear) -> Value:
    gradients = _adapter_gradients(facts, scene, layer, (shape.name,))
    result = tape.operation(scene.bytes_of(shape.outputs), ((joined, joined.size_bytes),), (joined,), gradients)
    tape.drop(joined)
    return result


def _feed_forward(tape: Tape, scene: Scene, facts: ModelFacts, layer: int, source: Value) -> Value:
    normed = _norm(tape, scene, source)
    if facts.is_mixture(layer):
        result = mixture(tape, scene, facts, layer, normed)
    else:
        inner = scene.bytes_of(facts.intermediate_size)
        own_kernels = facts.model_type in KERNEL_FAMILIES
        products = tape.hold((2 if own_kernels else 3) * inner)
        result = tape.operation(
            normed.size_bytes,
            ((normed, normed.size_bytes),),
            (normed, products),
            _adapter_gradients(facts, scene, layer, ("gate_proj", "up_proj", "down_proj", "gate_up_proj")),
            scratch_bytes=inner,
            backward_scratch_bytes=_feed_forward_scratch(facts, scene, inner, normed.size_bytes),
        )
        tape.release(products)
    tape.drop(normed)
    return result


def _feed_forward_scratch(facts: ModelFacts, scene: Scene, inner: int, hidden: int) -> int:
    """What the block's derivative holds while it runs. Unsloth's own works in place, beside one weight unpacked; over
    padded rows of 16-bit weights, the layer is compiled as one region, which writes the three inner products anew."""
    settings = scene.settings
    if facts.model_type in KERNEL_FAMILIES and (settings.packed or settings.load_in_4bit):
        return inner + unpacked_weight_bytes(facts, settings)
    return 3 * inner + COMPILED_HIDDEN * hidden
