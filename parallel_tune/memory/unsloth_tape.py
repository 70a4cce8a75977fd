"""A decoder layer of Unsloth's LoRA path: compiled as one region, with derivatives that keep little.

Two sources. What the autograd functions of unsloth/kernels (release 2026.10, Apache-2.0) save: the norm its input and a
float32 per token; the q, k, v product its input; the feed-forward block its input and the two products before the
activation. And what torch's min-cut partitioner adds when the layer is one region, seen by running it over a replica
of the layer: attention's result a second time where it does not lie as the output projection reads it, the adapters
cast to the compute dtype, and room for the gradients of their second halves. Products, kernels and attention are not
recomputed.

Measured on an H200 (torch 2.11), not read: llama-1b's rows show that attention's result is kept twice; with
llama-3b's checkpointed row beside them, FEED_FORWARD_HIDDEN and OFFLOAD_BYTES; and llama-3b's 4-bit row that k's and
v's weights stay unpacked, though why only those is not known. llama-8b's row determined nothing.
"""

from __future__ import annotations

from parallel_tune.memory import operations as ops
from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.feed_forward import mixture
from parallel_tune.memory.operations import Scene
from parallel_tune.memory.parameters import Linear, adapter_shapes, attention_linears
from parallel_tune.memory.tape import Buffer, Tape, Value


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
OFFLOAD_BYTES = 64 << 20
"""What checkpoints in host memory cost the device, whatever the model: measured, of unknown parts."""
FEED_FORWARD_HIDDEN = 3
"""Hidden states that the compiled backward of a feed-forward block holds beside its three inner ones."""


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


def _cast_adapters(tape: Tape, facts: ModelFacts, scene: Scene, layer: int, names: tuple[str, ...]) -> Buffer:
    """Both halves in the compute dtype, and the second half's gradient, which the region allocates beforehand."""
    shapes = _adapters(facts, scene, layer, names)
    elements = sum(rows * columns for rows, columns in shapes)
    elements += sum(rows * columns for rows, columns in shapes if columns == scene.settings.lora_rank)
    return tape.hold(elements * scene.element_bytes)


def _attention(tape: Tape, scene: Scene, facts: ModelFacts, layer: int, micro_batch: int, source: Value) -> Value:
    *inputs, output = attention_linears(facts)
    normed = _norm(tape, scene, source)
    width = scene.bytes_of(facts.query_size + 2 * facts.kv_size)
    names = tuple(shape.name for shape in inputs)
    gradients = _adapter_gradients(facts, scene, layer, names)
    casts = _cast_adapters(tape, facts, scene, layer, names)
    unpacked = tape.hold(_unpacked_bytes(facts, scene))
    states = tape.operation(width, ((normed, normed.size_bytes),), (normed, casts, unpacked), gradients)
    tape.release(casts)
    tape.release(unpacked)
    tape.drop(normed)
    if facts.qk_norm:  # keeps queries and keys as they were before the norm
        turned = tape.operation(scene.bytes_of(facts.query_size + facts.kv_size), ((states, width),), (states,))
        kept: tuple[Value, ...] = (turned, states)
    else:
        kept = (states,)
    statistic = tape.hold(scene.tokens * facts.num_heads * ops.FLOAT32_BYTES)
    square = scene.tokens * scene.settings.mask_width(micro_batch) * scene.element_bytes
    bias = tape.hold(square if scene.settings.masked(micro_batch) else 0)
    repeated_bytes = 2 * scene.bytes_of(facts.query_size - facts.kv_size) if scene.settings.repeats_heads else 0
    repeated = tape.hold(repeated_bytes)
    joined = tape.operation(
        scene.bytes_of(facts.query_size),
        ((kept[0], kept[0].size_bytes),),
        (*kept, statistic, bias, repeated),
        save_output=True,
    )
    tape.release(repeated)
    tape.release(statistic)
    tape.release(bias)
    tape.drop(*kept)
    if facts.model_type in KERNEL_FAMILIES:
        copied = tape.operation(joined.size_bytes, ((joined, None),))
        tape.drop(joined)
        joined = copied
    return _output(tape, scene, facts, layer, joined, output)


def _feed_forward_scratch(facts: ModelFacts, scene: Scene, inner: int, hidden: int) -> int:
    """What the block's derivative holds while it runs: the compiled one writes its three inner products anew; beside
    packed weights, which no compiler follows, it is Unsloth's own, which works in place, with a hidden state and one
    unpacked weight beside it."""
    if scene.settings.load_in_4bit:
        return inner + hidden + facts.intermediate_size * facts.hidden_size * scene.element_bytes
    return 3 * inner + FEED_FORWARD_HIDDEN * hidden


def _unpacked_bytes(facts: ModelFacts, scene: Scene) -> int:
    return 2 * facts.kv_size * facts.hidden_size * scene.element_bytes if scene.settings.load_in_4bit else 0


def _output(tape: Tape, scene: Scene, facts: ModelFacts, layer: int, joined: Value, shape: Linear) -> Value:
    gradients = _adapter_gradients(facts, scene, layer, (shape.name,))
    casts = _cast_adapters(tape, facts, scene, layer, (shape.name,))
    result = tape.operation(scene.bytes_of(shape.outputs), ((joined, joined.size_bytes),), (joined, casts), gradients)
    tape.release(casts)
    tape.drop(joined)
    return result


def _feed_forward(tape: Tape, scene: Scene, facts: ModelFacts, layer: int, source: Value) -> Value:
    normed = _norm(tape, scene, source)
    if facts.is_mixture(layer):
        result = mixture(tape, scene, facts, layer, normed)
    else:
        inner = scene.bytes_of(facts.intermediate_size)
        products = tape.hold((2 if facts.model_type in KERNEL_FAMILIES else 3) * inner)
        names = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
        casts = _cast_adapters(tape, facts, scene, layer, names)
        result = tape.operation(
            normed.size_bytes,
            ((normed, normed.size_bytes),),
            (normed, products, casts),
            _adapter_gradients(facts, scene, layer, names),
            scratch_bytes=inner,
            backward_scratch_bytes=_feed_forward_scratch(facts, scene, inner, normed.size_bytes),
        )
        tape.release(casts)
        tape.release(products)
    tape.drop(normed)
    return result
