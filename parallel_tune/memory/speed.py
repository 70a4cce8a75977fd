"""Seconds of one micro-batch: what the device computes, and what the host spends issuing it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.parameters import part_parameters
from parallel_tune.memory.settings import TrainingSettings
from strategies.contracts import Arrangement, Device, Part

WIDTH = 4096
"""Of an 8B Llama, at which most steps were measured (tests/test_speed_measured.py)."""

MATMUL_EFFICIENCY = {"transformers": 0.56, "unsloth": 0.74}
"""Share of the device's sustained matrix rate that a step of that width reaches, beside what each pass costs anyway.
Llama-8B LoRA at 2,048 tokens in a captured step takes 201 ms with transformers on an H100, of which 23 a pass costs.
Unsloth's fused kernels take 137 ms on an H200, which is no faster in products."""

NO_PRODUCT_SHARE = {"transformers": 0.53, "unsloth": 0.39}
"""Share of such a step that is no matrix product: norms, rotations, activations, adapters. A token's products grow with
the square of a model's width, the others with the width itself. Unsloth's by a 34B, twice as wide, at 1,024 tokens;
that of transformers by what its step takes longer, as the products are the same ones."""

PASS_COSTS_TOKENS = {"transformers": 256, "unsloth": 64}
"""What a pass costs however short, in tokens: reading all weights, and kernels too small to fill the device. Captured
steps of an 8B model: 33 ms for 112 tokens, 57 ms for 448, 201 ms for 2,048 with transformers on an H100; some 36 ms for
536, 62 for 1,018 and 137 for 2,048 with Unsloth on an H200."""

UNPACKING_COSTS_TOKENS = 150
"""What unpacking 4-bit weights costs, forward and backward, in tokens: 9 to 10 ms of an 8B's and 74 ms of a 70B's pass
on an H200, the time in which its memory takes 2.5 bytes a weight twice."""

LEAST_LAYER_SECONDS = {"transformers": 1e-3, "unsloth": 0.6e-3}
"""What a layer takes forward and backward however small it is: kernels of some microseconds each. A 135M model's 30
layers take 28 and 17 ms of a captured step on an H200, the optimizer's step and the host's part included."""

HOST_SECONDS_PER_LAYER = {"transformers": 0.216 / 32, "unsloth": 0.43 / 36 * 0.47 / 0.68}
"""Host time of one layer's forward and backward without checkpointing, on the slow hosts of FACTS, Speed:
transformers + peft, 32 layers, 216 ms; Unsloth, 36 layers, 430 ms with checkpointing, which costs it 0.68 / 0.47."""

CHECKPOINT_HOST_FACTOR = 0.68 / 0.47
"""Host time with checkpointing against without (FACTS, Speed: the same step of Unsloth)."""

REPLAY_HOST_SECONDS = 1e-3
"""Host time of replaying a captured micro-batch, its inputs copied: 0.2 ms for the replay alone on an H200's host."""


def micro_batch_flops(facts: ModelFacts, settings: TrainingSettings, part: Part, arrangement: Arrangement) -> float:
    """Floating-point operations of one micro-batch through a part, forward and backward.

    Each weight costs 2 FLOP per token forward, 2 for its input's gradient and 2 for its own (Kaplan et al. 2020);
    a frozen weight has no gradient of its own. A query meets half the keys before it, or a window of them.
    """
    forward, attention = _row_forward_flops(facts, part, settings.sequence_length)
    forward, attention = arrangement.micro_batch * forward, arrangement.micro_batch * attention
    recomputed = 0 if arrangement.gradient_checkpointing == "none" else 1
    passes = 1 + recomputed + (2 if settings.method == "full" else 1)
    # Attention's backward is twice its forward, and half as much again where its scores are recomputed.
    return forward * passes + attention * (1 + recomputed + 2.5)


def model_flops(facts: ModelFacts, settings: TrainingSettings, row_lengths: Sequence[int]) -> float:
    """Floating-point operations that forward and backward of these rows need, whatever a run recomputes or pads.

    As Chowdhery et al. 2022 (PaLM, appendix B) count for the utilisation of a machine, with what is not trained left
    out: 2 FLOP a weight and token forward, 2 for its input's gradient, and 2 for its own where all weights train;
    attention's backward is twice its forward. The adapters' own products, 1% or so, are not counted.

    Args:
        row_lengths: tokens of each row; rows attend to themselves alone.
    """
    whole = Part(0, facts.num_layers - 1, embedding=True, head=True)
    passes = 3 if settings.method == "full" else 2
    total = 0.0
    for length, times in Counter(row_lengths).items():
        forward, attention = _row_forward_flops(facts, whole, length)
        total += times * (forward * passes + attention * 3)
    return total


def _row_forward_flops(facts: ModelFacts, part: Part, tokens: int) -> tuple[float, float]:
    """Forward operations of one row: those of the weights' products, and those of attention."""
    counts = part_parameters(facts, part)
    active_experts = counts.expert * facts.experts_per_token / facts.num_experts if facts.num_experts else 0.0
    table = facts.vocab_size * facts.hidden_size
    # A tied head computes although it holds no parameters of its own.
    weights = 2.0 * tokens * (counts.linear + active_experts + (table if part.head else 0))
    attention = sum(
        4.0 * tokens * _keys_per_query(facts, tokens, layer) * facts.query_size
        for layer in range(part.first_layer, part.last_layer + 1)
    )
    return weights, attention


def micro_batch_seconds(
    facts: ModelFacts, settings: TrainingSettings, part: Part, arrangement: Arrangement, device: Device
) -> float:
    """Device seconds of one micro-batch: a roofline of matrix work, and on a GPU what comes with it."""
    flops = micro_batch_flops(facts, settings, part, arrangement)
    seconds = flops / (device.matmul_flops_per_second * MATMUL_EFFICIENCY[settings.engine])
    if device.kind != "cuda":
        return seconds
    costs = PASS_COSTS_TOKENS[settings.engine] + (UNPACKING_COSTS_TOKENS if settings.load_in_4bit else 0)
    seconds *= 1 + costs / (arrangement.micro_batch * settings.sequence_length)
    seconds *= 1 + NO_PRODUCT_SHARE[settings.engine] * (WIDTH / facts.hidden_size - 1)
    no_half = settings.compute_dtype == "float32" or (settings.compute_dtype == "bfloat16" and not device.supports_bf16)
    if no_half and device.float32_flops_per_second:
        seconds = max(seconds, flops / device.float32_flops_per_second)  # the products alone
    return max(seconds, LEAST_LAYER_SECONDS[settings.engine] * part.num_layers)


def host_seconds(settings: TrainingSettings, part: Part, arrangement: Arrangement) -> float:
    """Host seconds of issuing one micro-batch, which do not depend on its length."""
    if arrangement.captured:
        return REPLAY_HOST_SECONDS
    factor = 1.0 if arrangement.gradient_checkpointing == "none" else CHECKPOINT_HOST_FACTOR
    return HOST_SECONDS_PER_LAYER[settings.engine] * factor * part.num_layers


def _keys_per_query(facts: ModelFacts, tokens: int, layer: int) -> float:
    """On average: half the tokens, or a window, which the first queries have not whole before them."""
    window = facts.sliding_window
    if layer not in facts.windowed_layers or tokens <= window:
        return tokens / 2
    return window - window * window / (2 * tokens)
