"""A decoder layer, the head and their losses as tapes, and what their memory comes to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from parallel_tune.memory import operations as ops
from parallel_tune.memory.compiled_tape import compiled_layer
from parallel_tune.memory.eager_attention import eager_scores
from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.feed_forward import dense_feed_forward, mixture
from parallel_tune.memory.operations import Scene
from parallel_tune.memory.parameters import attention_linears, mlp_linears
from parallel_tune.memory.settings import TrainingSettings
from parallel_tune.memory.tape import Tape, Value
from parallel_tune.memory.unsloth_tape import unsloth_layer


@dataclass(frozen=True)
class Segment:
    """Memory of a layer, or of the head, for one micro-batch.

    Attributes:
        stored_bytes: what waits for its backward pass.
        forward_bytes: its forward pass at its peak, input included.
        backward_bytes: its backward pass at its peak, stored tensors and incoming gradient included.
        backward_weight_gradient_bytes: the share of it that are its own weights' gradients.
        checkpointed_bytes: its backward pass at its peak when it is recomputed first; input included.
        checkpointed_weight_gradient_bytes: likewise.
    """

    stored_bytes: int
    forward_bytes: int
    backward_bytes: int
    backward_weight_gradient_bytes: int
    checkpointed_bytes: int
    checkpointed_weight_gradient_bytes: int


@lru_cache(maxsize=4096)
def layer_segment(
    facts: ModelFacts,
    settings: TrainingSettings,
    layer: int,
    micro_batch: int,
    input_needs_gradient: bool,
    gradients_exist: bool,
) -> Segment:
    """Memory of one decoder layer.

    Args:
        layer: stands for every layer of its kind (windowed or not, dense or a mixture).
        input_needs_gradient: False where nothing below is trained (the first layer beside a frozen embedding).
        gradients_exist: an earlier micro-batch has left gradients, or buckets hold them.
    """
    scene = Scene(settings, micro_batch * settings.sequence_length)
    tape = Tape(gradients_exist=gradients_exist)
    source = tape.value(scene.bytes_of(facts.hidden_size), input_needs_gradient)
    output = _decoder_layer(tape, scene, facts, layer, micro_batch, source)
    forward, recompute = tape.peak_bytes, tape.peak_when_last_saved_bytes
    tape.drop(source)
    # The next layer keeps what it needs of the output; its gradient arrives in its place.
    tape.drop(output)
    stored = tape.live_bytes
    # A checkpoint holds the layer's input; unless it is one of the kept tensors, it lies beside them.
    held = 0 if source.buffer.references else source.size_bytes
    tape.reset_peak()
    tape.backward(output)
    backward, own = tape.peak_bytes, tape.peak_weight_gradient_bytes
    recompute += tape.live_before_saved_bytes - stored
    checkpointed = max(recompute, backward + held)
    return Segment(stored, forward, backward, own, checkpointed, own if checkpointed > recompute else 0)


def _decoder_layer(tape: Tape, scene: Scene, facts: ModelFacts, layer: int, micro_batch: int, source: Value) -> Value:
    """LlamaDecoderLayer.forward and its relatives: two blocks, each normalised before and added to its own input.

    Unsloth's own functions know no DoRA: such a layer goes through peft's, which is what is counted.
    """
    if scene.settings.engine == "unsloth" and scene.settings.method == "lora" and not scene.settings.use_dora:
        return unsloth_layer(tape, scene, facts, layer, micro_batch, source)
    if scene.settings.engine == "unsloth" and scene.settings.method == "full" and not facts.is_mixture(layer):
        return compiled_layer(tape, scene, facts, layer, micro_batch, source)
    normed = _norm(tape, scene, facts, source)
    inner = _attention(tape, scene, facts, layer, micro_batch, normed)
    tape.drop(normed)
    middle = _add_residual(tape, scene, facts, source, inner)
    normed = _norm(tape, scene, facts, middle)
    inner = _feed_forward(tape, scene, facts, layer, normed)
    tape.drop(normed)
    result = _add_residual(tape, scene, facts, middle, inner)
    tape.drop(middle)
    return result


def _norm(tape: Tape, scene: Scene, facts: ModelFacts, source: Value) -> Value:
    return ops.rms_norm(tape, scene, source, facts.hidden_size, 1, facts.offset_norm)


def _add_residual(tape: Tape, scene: Scene, facts: ModelFacts, residual: Value, inner: Value) -> Value:
    """Gemma 2 and 3 normalise a block's output before they add it."""
    if facts.norms_per_layer == 4:
        normed = _norm(tape, scene, facts, inner)
        tape.drop(inner)
        inner = normed
    result = ops.add(tape, residual, inner)
    tape.drop(inner)
    return result


def _attention(tape: Tape, scene: Scene, facts: ModelFacts, layer: int, micro_batch: int, source: Value) -> Value:
    """LlamaAttention.forward over scaled_dot_product_attention."""
    *inputs, output = attention_linears(facts)
    products = [ops.linear(tape, scene, source, shape) for shape in inputs]
    if facts.fused_projections:  # q, k and v are slices of one product, and each gradient is padded to its width
        query, key, value = (tape.view(products[0], products[0].size_bytes) for _ in range(3))
        query_bytes, key_bytes = scene.bytes_of(facts.query_size), scene.bytes_of(facts.kv_size)
    else:
        query, key, value = products
        query_bytes, key_bytes = query.size_bytes, key.size_bytes
        products = []
    if facts.qk_norm:
        raw = (query, key)
        query = ops.rms_norm(tape, scene, query, facts.query_size, facts.num_heads, facts.offset_norm)
        tape.drop(raw[0])
        key = ops.rms_norm(tape, scene, key, facts.kv_size, facts.num_kv_heads, facts.offset_norm)
        tape.drop(raw[1])
    rotated = (ops.rotate(tape, query, query_bytes), ops.rotate(tape, key, key_bytes))
    tape.drop(query, key)
    joined = _scores(tape, scene, facts, layer, micro_batch, (*rotated, value))
    tape.drop(*products)
    if facts.fused_projections:
        # Attention's result has the layout of its queries; Phi-3's rotation leaves another than the output needs.
        copy = tape.operation(joined.size_bytes, ((joined, None),))
        tape.drop(joined)
        joined = copy
    result = ops.linear(tape, scene, joined, output)
    tape.drop(joined)
    return result


def _scores(
    tape: Tape,
    scene: Scene,
    facts: ModelFacts,
    layer: int,
    micro_batch: int,
    states: tuple[Value, Value, Value],
) -> Value:
    """Flash attention keeps q, k, v, its output and a float32 per head and token. With a mask there is no kernel for
    grouped heads: keys and values are repeated, and the mask becomes a bias that the derivative keeps."""
    query, key, value = states
    settings = scene.settings
    windowed = layer in facts.windowed_layers and settings.sequence_length >= facts.sliding_window
    masked = settings.masked(micro_batch) or (windowed and not settings.packed)
    query_bytes, key_bytes = scene.bytes_of(facts.query_size), scene.bytes_of(facts.kv_size)
    bias = tape.hold(0)
    if (masked or settings.repeats_heads) and facts.num_heads != facts.num_kv_heads:
        # A single head is repeated by a view.
        repeated_bytes = query_bytes if facts.num_kv_heads > 1 else 0
        repeated = [ops.repeat(tape, state, repeated_bytes, key_bytes) for state in (key, value)]
        tape.drop(key, value)
        key, value = repeated
        key_bytes = query_bytes
    if settings.eager_attention:
        tape.release(bias)
        return eager_scores(tape, scene, facts, micro_batch, (query, key, value))
    if masked:
        tape.release(bias)
        bias = tape.hold(scene.tokens * settings.mask_width(micro_batch) * scene.element_bytes)
    statistic = tape.hold(scene.tokens * facts.num_heads * ops.FLOAT32_BYTES)
    joined = tape.operation(
        query_bytes,
        ((query, query_bytes), (key, key_bytes), (value, key_bytes)),
        (query, key, value, statistic, bias),
        save_output=True,
    )
    tape.release(statistic)
    tape.release(bias)
    tape.drop(query, key, value)
    return joined


def _feed_forward(tape: Tape, scene: Scene, facts: ModelFacts, layer: int, source: Value) -> Value:
    """LlamaMLP.forward, Phi3MLP.forward, or a mixture's block."""
    if facts.is_mixture(layer):
        return mixture(tape, scene, facts, layer, source)
    return dense_feed_forward(tape, scene, mlp_linears(facts, layer), source, facts.fused_projections)


def head_segment_tape(tape: Tape, scene: Scene, facts: ModelFacts, source: Value) -> Value:
    """The final norm, the head, and transformers' ForCausalLMLoss over float32 logits."""
    normed = _norm(tape, scene, facts, source)
    tape.drop(source)
    logits_bytes = scene.bytes_of(facts.vocab_size)
    table = facts.vocab_size * facts.hidden_size * scene.settings.weight_bytes
    logits = tape.operation(
        logits_bytes,
        ((normed, normed.size_bytes),),
        (normed,) if scene.trained else (),
        (table,) if scene.trained else (),
    )
    tape.drop(normed)
    if facts.final_softcap:
        logits = ops.softcap(tape, logits)
    wide_bytes = scene.tokens * facts.vocab_size * ops.FLOAT32_BYTES
    wide = ops.cast(tape, logits, wide_bytes)
    probabilities = tape.operation(wide_bytes, ((wide, wide_bytes),), save_output=True)
    loss = tape.operation(0, ((probabilities, wide_bytes),))
    tape.drop(wide, probabilities)
    if wide_bytes != logits_bytes:  # accelerate casts the logits that the outputs hold once more
        tape.release(tape.hold(wide_bytes))
    tape.drop(logits)
    return loss


@lru_cache(maxsize=1024)
def head_segment(facts: ModelFacts, settings: TrainingSettings, micro_batch: int, gradients_exist: bool) -> Segment:
    """Memory of the final norm, head and plain cross-entropy."""
    scene = Scene(settings, micro_batch * settings.sequence_length)
    tape = Tape(gradients_exist=gradients_exist)
    source = tape.value(scene.bytes_of(facts.hidden_size), True)
    loss = head_segment_tape(tape, scene, facts, source)
    forward, stored = tape.peak_bytes, tape.live_bytes
    tape.reset_peak()
    tape.backward(loss)
    return Segment(stored, forward, tape.peak_bytes, tape.peak_weight_gradient_bytes, tape.peak_bytes, 0)
