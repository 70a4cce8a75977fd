"""A decoder layer of Unsloth's LoRA path: few, large derivatives that keep their inputs and little else.

Read off what each of unsloth/kernels' autograd functions saves (release 2026.10, Apache-2.0): the norm its input and a
float32 per token; the q, k, v product its input; the rotation nothing, it works in place; the feed-forward block its
input and the two products before the activation. Not traced, since the kernels need a GPU.
"""

from __future__ import annotations

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


def largest_weight_bytes(facts: ModelFacts, settings: TrainingSettings) -> int:
    """The buffer into which each 4-bit weight is unpacked in turn; it stays allocated."""
    return max(linear.weight_parameters for linear in layer_linears(facts, 0)) * settings.compute_bytes


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
    targets = tuple(name for name in names if name in settings.lora_targets or "all-linear" in settings.lora_targets)
    shapes = adapter_shapes(facts, layer, settings.lora_rank, targets) if targets and not facts.num_experts else ()
    return tuple(rows * columns * settings.adapter_bytes for rows, columns in shapes)


def _attention(tape: Tape, scene: Scene, facts: ModelFacts, layer: int, micro_batch: int, source: Value) -> Value:
    *inputs, output = attention_linears(facts)
    normed = _norm(tape, scene, source)
    width = scene.bytes_of(facts.query_size + 2 * facts.kv_size)
    names = tuple(shape.name for shape in inputs)
    gradients = _adapter_gradients(facts, scene, layer, names)
    states = tape.operation(width, ((normed, normed.size_bytes),), (normed,), gradients)
    tape.drop(normed)
    if facts.qk_norm:  # keeps queries and keys as they were before the norm
        turned = tape.operation(scene.bytes_of(facts.query_size + facts.kv_size), ((states, width),), (states,))
        kept: tuple[Value, ...] = (turned, states)
    else:
        kept = (states,)
    statistic = tape.hold(scene.tokens * facts.num_heads * ops.FLOAT32_BYTES)
    square = scene.tokens * scene.settings.sequence_length * scene.element_bytes
    bias = tape.hold(square if scene.settings.masked(micro_batch) else 0)
    joined = tape.operation(
        scene.bytes_of(facts.query_size), ((kept[0], kept[0].size_bytes),), (*kept, statistic, bias), save_output=True
    )
    tape.release(statistic)
    tape.release(bias)
    tape.drop(*kept)
    return _output(tape, scene, facts, layer, joined, output)


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
        products = tape.hold(2 * inner)
        names = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
        result = tape.operation(
            normed.size_bytes,
            ((normed, normed.size_bytes),),
            (normed, products),
            _adapter_gradients(facts, scene, layer, names),
            scratch_bytes=inner,
            backward_scratch_bytes=inner,
        )
        tape.release(products)
    tape.drop(normed)
    return result
