"""Feed-forward blocks as tapes: dense ones, and mixtures of experts."""

from __future__ import annotations

from parallel_tune.memory import operations as ops
from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.operations import Scene
from parallel_tune.memory.parameters import (
    Linear,
    adapted_experts,
    expert_adapter_shapes,
    expert_parameters,
    mlp_linears,
)
from parallel_tune.memory.tape import Tape, Value

INDEX_BYTES = 8


def dense_feed_forward(tape: Tape, scene: Scene, shapes: tuple[Linear, ...], source: Value, fused: bool) -> Value:
    """`down(act(gate(x)) * up(x))` (LlamaMLP.forward); fused, gate and up are halves of one product (Phi3MLP)."""
    if fused:
        both = ops.linear(tape, scene, source, shapes[0])
        gate, up = (tape.view(both, both.size_bytes) for _ in range(2))
        half = both.size_bytes // 2
        active = tape.operation(half, ((gate, half),), (gate,))
        inner = tape.operation(half, ((up, half), (active, half)), (up, active))
        tape.drop(active, up, gate, both)
        result = ops.linear(tape, scene, inner, shapes[1])
    else:
        gate = ops.linear(tape, scene, source, shapes[0])
        active = ops.activation(tape, gate)
        tape.drop(gate)
        up = ops.linear(tape, scene, source, shapes[1])
        inner = ops.multiply(tape, active, up)
        tape.drop(active, up)
        result = ops.linear(tape, scene, inner, shapes[2])
    tape.drop(inner)
    return result


def mixture(tape: Tape, scene: Scene, facts: ModelFacts, layer: int, source: Value) -> Value:
    """A router and its experts by grouped products (transformers.integrations.moe.grouped_mm_experts_forward): every
    token is copied once for each expert that it goes to."""
    settings, hidden, inner = scene.settings, facts.hidden_size, facts.moe_intermediate_size
    pairs = facts.experts_per_token
    trained = scene.trained
    # Of gates and ups, and of downs.
    adapted = adapted_experts(facts, layer, settings.lora_targets) if settings.method == "lora" else (False, False)
    whole = expert_parameters(facts, layer) * settings.weight_bytes
    weights = [size if trained or each else 0 for size, each in zip((whole * 2 // 3, whole // 3), adapted, strict=True)]
    # peft adds an adapter to a stacked weight as a whole: the sum, as large as the weight, is the product's operand.
    sums = 0 if trained else sum(weights)
    if any(adapted) and settings.adapter_bytes != scene.element_bytes:
        # Autocast's copies of both matrices, which their product's derivative wants.
        shapes = expert_adapter_shapes(facts, layer, settings.lora_rank, settings.lora_targets)
        sums += sum(rows * columns for rows, columns in shapes) * scene.element_bytes
    rows, wide, half = (scene.bytes_of(pairs * width) for width in (hidden, 2 * inner, inner))
    extra = tape.hold(sums + scene.tokens * (pairs * 3 * INDEX_BYTES + 2 * facts.num_experts * ops.FLOAT32_BYTES))
    chosen = tape.operation(rows, ((source, source.size_bytes),), (extra,), backward_scratch_bytes=rows)
    both = tape.operation(
        wide,
        ((chosen, rows),),
        (chosen, extra) if weights[0] else (),
        (weights[0],) if trained else (),
        backward_scratch_bytes=0 if trained else weights[0],
    )
    tape.drop(chosen)
    # Rows beyond the last expert are zeroed in a copy, here and after the second product.
    filled = tape.operation(wide, ((both, wide),))
    tape.drop(both)
    gate, up = (tape.view(filled, wide) for _ in range(2))
    active = tape.operation(half, ((gate, half),), (gate,))
    product = tape.operation(half, ((active, half), (up, half)), (active, up))
    tape.drop(active, gate, up, filled)
    down = tape.operation(
        rows,
        ((product, half),),
        (product,) if weights[1] else (),
        (weights[1],) if trained else (),
        backward_scratch_bytes=0 if trained else weights[1],
    )
    tape.drop(product)
    masked = tape.operation(rows, ((down, rows),))
    tape.drop(down)
    # The routing weights stay in float32, and so does the weighted sum.
    weighted = tape.operation(rows, ((masked, rows),), (masked,), backward_scratch_bytes=rows)
    tape.drop(masked)
    restored = tape.operation(rows, ((weighted, rows),))
    tape.drop(weighted)
    result = tape.operation(scene.bytes_of(hidden), ((restored, rows),))
    tape.drop(restored)
    tape.release(extra)
    shared = mlp_linears(facts, layer)
    if shared:
        beside = dense_feed_forward(tape, scene, shared, source, fused=False)
        total = ops.add(tape, result, beside)
        tape.drop(result, beside)
        return total
    return result
