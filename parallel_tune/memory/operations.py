"""The operations of a decoder layer as the tape sees them: result, saved tensors, gradients, scratch.

Each function stands for the lines of transformers or peft that its docstring names. Sizes are of one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel_tune.memory.parameters import ALL_LINEAR, Linear
from parallel_tune.memory.settings import TrainingSettings
from parallel_tune.memory.tape import Buffer, Tape, Value

FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Scene:
    """What every operation of a micro-batch needs to know.

    Attributes:
        tokens: rows x length.
        element_bytes: of an activation.
        trained: the base weights get gradients.
    """

    settings: TrainingSettings
    tokens: int

    @property
    def element_bytes(self) -> int:
        return self.settings.compute_bytes

    @property
    def trained(self) -> bool:
        return self.settings.method == "full"

    def bytes_of(self, width: int) -> int:
        """Bytes of an activation of this width."""
        return self.tokens * width * self.element_bytes


def cast(tape: Tape, source: Value, size_bytes: int) -> Value:
    """`tensor.to(dtype)`: nothing at all when the dtype is the same already."""
    if size_bytes == source.size_bytes:
        source.buffer.references += 1
        return source
    return tape.operation(size_bytes, ((source, source.size_bytes),))


def rms_norm(tape: Tape, scene: Scene, source: Value, width: int, groups: int, offset: bool) -> Value:
    """RMSNorm in float32 over `groups` vectors per token (LlamaRMSNorm.forward; Gemma's multiplies by 1 + weight)."""
    wide = scene.tokens * width * FLOAT32_BYTES
    narrow = scene.bytes_of(width)
    statistic = scene.tokens * groups * FLOAT32_BYTES
    weight = (width // groups * scene.settings.weight_bytes,) if scene.trained else ()
    source32 = cast(tape, source, wide)
    # pow's derivative computes x to the first, doubles it and multiplies it by the gradient.
    square = tape.operation(wide, ((source32, wide),), (source32,), backward_scratch_bytes=2 * wide)
    mean = tape.operation(statistic, ((square, wide),))
    tape.drop(square)
    scale = tape.operation(statistic, ((mean, statistic),), save_output=True)
    # The scale's gradient is a product as large as the input before it is summed.
    normed = tape.operation(
        wide, ((source32, wide), (scale, statistic)), (source32, scale), backward_scratch_bytes=wide
    )
    tape.drop(source32, mean, scale)
    if offset:
        result32 = tape.operation(
            wide, ((normed, wide),), (normed,) if weight else (), weight, backward_scratch_bytes=wide if weight else 0
        )
        tape.drop(normed)
        result = cast(tape, result32, narrow)
        tape.drop(result32)
        return result
    normed16 = cast(tape, normed, narrow)
    tape.drop(normed)
    result = tape.operation(
        narrow,
        ((normed16, narrow),),
        (normed16,) if weight else (),
        weight,
        backward_scratch_bytes=narrow if weight else 0,
    )
    tape.drop(normed16)
    return result


def linear(tape: Tape, scene: Scene, source: Value, shape: Linear) -> Value:
    """A linear of the layer, adapted when LoRA targets its name. The caller keeps its own reference to `source`."""
    settings = scene.settings
    targets = settings.lora_targets
    adapted = settings.method == "lora" and (ALL_LINEAR in targets or shape.name in targets)
    quantised = settings.load_in_4bit
    # bitsandbytes unpacks the whole weight for a product and frees it after (functional.dequantize_4bit).
    unpacked = shape.weight_parameters * scene.element_bytes if quantised else 0
    weights: tuple[int, ...] = (shape.weight_parameters * settings.weight_bytes,) if scene.trained else ()
    if scene.trained and shape.bias:
        weights += (shape.outputs * settings.weight_bytes,)
    result = tape.operation(
        scene.bytes_of(shape.outputs),
        ((source, scene.bytes_of(shape.inputs)),),
        (source,) if scene.trained else (),
        weights,
        scratch_bytes=unpacked,
        backward_scratch_bytes=unpacked,
    )
    if not adapted:
        return result
    if quantised:  # peft clones a 4-bit product before it adds to it
        copy = tape.operation(result.size_bytes, ((result, None),))
        tape.drop(result)
        result = copy
    return _adapted(tape, scene, source, result, shape)


def _adapted(tape: Tape, scene: Scene, source: Value, result: Value, shape: Linear) -> Value:
    """`result + lora_B(lora_A(dropout(x))) * scaling` (peft.tuners.lora.layer.Linear.forward, bnb.Linear4bit.forward).

    Beside unquantised weights peft first casts x to the adapter's dtype, and autocast casts it back for the product:
    each adapted linear keeps a copy of its own. Dropout keeps a byte per element, as CUDA's kernel does; a CPU's keeps
    its mask in the input's dtype.
    """
    settings = scene.settings
    rank = settings.lora_rank
    wide = source
    if not settings.load_in_4bit:
        wide = cast(tape, source, scene.tokens * shape.inputs * settings.adapter_bytes)
    else:
        wide.buffer.references += 1
    dropped = wide
    if settings.lora_dropout > 0:
        mask = tape.hold(scene.tokens * shape.inputs)
        dropped = tape.operation(wide.size_bytes, ((wide, wide.size_bytes),), (mask,))
        tape.release(mask)
    else:
        dropped.buffer.references += 1
    kept = dora_weights(tape, scene, shape) if settings.use_dora else tape.hold(0)
    narrow = cast(tape, dropped, scene.bytes_of(shape.inputs))
    down = _adapter_matrix(tape, scene, narrow, rank, shape.inputs, rank)
    tape.drop(narrow)
    up = _adapter_matrix(tape, scene, down, shape.outputs, rank, shape.outputs)
    tape.drop(down)
    if settings.use_dora:
        total = dora_sum(tape, scene, result, dropped, up, shape)
        tape.release(kept)
        tape.drop(dropped, wide)
        return total
    tape.drop(dropped)
    scaled = tape.operation(up.size_bytes, ((up, up.size_bytes),))
    tape.drop(up)
    total = tape.operation(result.size_bytes, ((result, None), (scaled, None)))
    tape.drop(result, scaled, wide)
    return total


def _adapter_matrix(tape: Tape, scene: Scene, source: Value, rows: int, columns: int, width: int) -> Value:
    """One of LoRA's two products, its weight cast to the compute dtype by autocast and kept for the derivative."""
    settings = scene.settings
    elements = settings.lora_rank * (columns if rows == settings.lora_rank else rows)
    weight = tape.hold(elements * scene.element_bytes if settings.adapter_bytes != scene.element_bytes else 0)
    result = tape.operation(
        scene.bytes_of(width),
        ((source, source.size_bytes),),
        (source, weight) if source.needs_gradient else (source,),
        (elements * settings.adapter_bytes,),
    )
    tape.release(weight)
    return result


def dora_weights(tape: Tape, scene: Scene, shape: Linear) -> Buffer:
    """Tensors as large as the weight, for its norm (peft.tuners.lora.dora.DoraLinearLayer.forward): B A as a product
    with an identity matrix, the base weight in the input's dtype, and for a moment their scaled sum. Returns those that
    live until the layer's product is done."""
    settings, elements = scene.settings, shape.weight_parameters
    wide_bytes = scene.element_bytes if settings.load_in_4bit else settings.adapter_bytes
    is_cast = wide_bytes != scene.element_bytes
    identity, rank = shape.inputs * shape.inputs, settings.lora_rank
    is_recast = settings.adapter_bytes != scene.element_bytes
    tape.release(tape.hold(identity * (settings.adapter_bytes + (scene.element_bytes if is_recast else 0))))
    graph = identity + shape.inputs * rank + (rank * (shape.inputs + shape.outputs) if is_recast else 0)
    kept = (graph + elements) * scene.element_bytes
    if is_cast:
        kept += 2 * elements * wide_bytes
    elif settings.load_in_4bit:
        kept += elements * scene.element_bytes
    buffer = tape.hold(kept)
    tape.release(tape.hold(2 * elements * wide_bytes))
    return buffer


def dora_sum(tape: Tape, scene: Scene, result: Value, source: Value, up: Value, shape: Linear) -> Value:
    """`x W + (m - 1) x W + m B A x`, where the magnitude m is float32 and so is whatever it is multiplied with."""
    settings = scene.settings
    wide_bytes = scene.tokens * shape.outputs * settings.adapter_bytes
    base = result
    if (
        settings.lora_dropout > 0
    ):  # the base's product anew, from the dropped input; it keeps its own copy of the weight
        weight = tape.hold(shape.weight_parameters * scene.element_bytes)
        base = tape.operation(result.size_bytes, ((source, source.size_bytes),), (weight,))
        tape.release(weight)
    magnitude = (shape.outputs * settings.adapter_bytes,)
    resized = tape.operation(
        wide_bytes, ((base, base.size_bytes),), (base,), magnitude, backward_scratch_bytes=wide_bytes
    )
    if base is not result:
        tape.drop(base)
    product = tape.operation(wide_bytes, ((up, up.size_bytes),), (up,), magnitude, backward_scratch_bytes=wide_bytes)
    tape.drop(up)
    scaled = tape.operation(wide_bytes, ((product, wide_bytes),))
    tape.drop(product)
    both = add(tape, resized, scaled)
    tape.drop(resized, scaled)
    total = tape.operation(wide_bytes, ((result, result.size_bytes), (both, None)))
    tape.drop(result, both)
    if wide_bytes == scene.bytes_of(shape.outputs):
        return total
    narrow = cast(tape, total, scene.bytes_of(shape.outputs))
    tape.drop(total)
    return narrow


def add(tape: Tape, left: Value, right: Value) -> Value:
    """A sum: both sides get the same gradient, and it is not copied."""
    return tape.operation(left.size_bytes, ((left, None), (right, None)))


def multiply(tape: Tape, left: Value, right: Value) -> Value:
    """A product of two activations: each is kept for the other's gradient."""
    return tape.operation(left.size_bytes, ((left, left.size_bytes), (right, right.size_bytes)), (left, right))


def activation(tape: Tape, source: Value) -> Value:
    """SiLU or GELU: its input is kept."""
    return tape.operation(source.size_bytes, ((source, source.size_bytes),), (source,))


def rotate(tape: Tape, source: Value, size_bytes: int) -> Value:
    """`q * cos + rotate_half(q) * sin`: cos and sin are the same for all layers, so no layer keeps a thing."""
    return tape.operation(
        size_bytes, ((source, size_bytes),), scratch_bytes=2 * size_bytes, backward_scratch_bytes=3 * size_bytes
    )


def repeat(tape: Tape, source: Value, size_bytes: int, gradient_bytes: int) -> Value:
    """Keys or values once for each head (repeat_kv); of no bytes where it is a view."""
    if not size_bytes:
        return tape.view(source, gradient_bytes)
    return tape.operation(size_bytes, ((source, gradient_bytes),))


def softcap(tape: Tape, source: Value) -> Value:
    """`tanh(x / cap) * cap`, in place of its source: tanh keeps its result."""
    size = source.size_bytes
    scaled = tape.operation(size, ((source, size),))
    tape.drop(source)
    bounded = tape.operation(size, ((scaled, size),), save_output=True)
    tape.drop(scaled)
    result = tape.operation(size, ((bounded, size),))
    tape.drop(bounded)
    return result
