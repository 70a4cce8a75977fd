"""What each setting does to the estimate, and the promises that strategies rely on."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_tune.memory import ClosedFormEstimator, MachineConstants, TrainingSettings, load_model_facts
from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.parameters import adapter_parameters, part_parameters, whole
from parallel_tune.memory.settings import CPU_DEFAULTS
from parallel_tune.memory.split import SPLIT_CONTEXT_BYTES
from parallel_tune.memory.states import state_bytes
from parallel_tune.memory.unsloth_tape import OFFLOADED_HIDDEN, unpacked_weight_bytes
from strategies.contracts import Arrangement, Checkpointing, Device, MemoryEstimate, Part
from strategies.errors import ConfigError

LLAMA = load_model_facts("meta-llama/Llama-3.1-8B")
GPU = Device(0, "H100", "cuda", 80 << 30, 80 << 30, True, 6.5e14)
CPU = Device(0, "cpu", "cpu", 8 << 30, 8 << 30)


def estimate(
    facts: ModelFacts = LLAMA,
    *,
    part: Part | None = None,
    checkpointing: Checkpointing = "full",
    processes: int = 1,
    micro_batch: int = 1,
    accumulation: int = 1,
    lanes: int = 1,
    device: Device = GPU,
    **options: Any,
) -> MemoryEstimate:
    arrangement = Arrangement(processes, micro_batch, accumulation, checkpointing, lanes=lanes)
    estimator = ClosedFormEstimator(facts, TrainingSettings(**options))
    return estimator.memory(part or whole(facts), arrangement, device)


def test_the_parts_of_the_estimate_are_what_they_say() -> None:
    result = estimate()
    assert result.weights_bytes == 2 * part_parameters(LLAMA, whole(LLAMA)).total
    adapters = adapter_parameters(LLAMA, whole(LLAMA), 16)
    assert result.adapters_bytes == 4 * adapters
    assert result.optimizer_bytes == 8 * adapters
    assert result.phase == "cross_entropy"
    assert result.cross_entropy_bytes == pytest.approx(12 * 128256 * 2048, rel=0.03)


def test_facts_already_paid_for() -> None:
    """FACTS, Memory: 8B LoRA r16, 2,048 tokens, checkpointed, plain loss: 18.90 GiB of tensors."""
    tensors = dataclasses.replace(estimate(attention_mask=False), buffers_bytes=0)
    assert tensors.allocated_bytes / 2**30 == pytest.approx(18.90, rel=0.004)


def test_measured_on_an_h200() -> None:
    """max_memory_allocated of real steps, torch 2.11 + transformers 5.17 + peft 0.21, cuBLAS workspaces included."""
    rows = [
        ("meta-llama/Llama-3.2-1B", "lora", "none", 2048, 1, 9687078912),
        ("meta-llama/Llama-3.2-1B", "lora", "full", 8192, 1, 15889422848),
        ("meta-llama/Llama-3.2-1B", "full", "none", 2048, 1, 14230486016),
        ("meta-llama/Llama-3.2-1B", "full", "full", 2048, 1, 11006471168),
        ("meta-llama/Llama-3.1-8B", "lora", "none", 4096, 1, 51522185216),
        ("Qwen/Qwen3-8B", "lora", "none", 2048, 2, 57222248448),
    ]
    for name, method, checkpointing, length, micro_batch, measured in rows:
        result = estimate(
            load_model_facts(name),
            checkpointing="none" if checkpointing == "none" else "full",
            method=method,
            sequence_length=length,
            micro_batch=micro_batch,
            attention_mask=False,
            optimizer="adamw_torch_fused",
        )
        assert result.allocated_bytes == pytest.approx(measured, rel=0.002), name


def test_four_bits_shrink_only_the_linears() -> None:
    counts = part_parameters(LLAMA, whole(LLAMA))
    result = estimate(load_in_4bit=True)
    expected = 0.5159 * counts.linear + 2 * (counts.total - counts.linear)
    assert result.weights_bytes == pytest.approx(expected, rel=1e-4)


def test_offloaded_checkpoints_leave_the_card() -> None:
    hidden = 2 * 4096 * 2048
    stored = 32 * hidden
    offloaded = estimate(checkpointing="unsloth").activations_bytes - OFFLOADED_HIDDEN * hidden
    assert estimate().activations_bytes - offloaded == stored


def test_on_a_cpu_offloaded_checkpoints_take_the_same_memory() -> None:
    offloaded, kept = (estimate(checkpointing=mode, engine="unsloth", device=CPU) for mode in ("unsloth", "full"))
    assert offloaded == kept
    assert offloaded.context_bytes == CPU_DEFAULTS.context_bytes


def test_unsloths_buffer_holds_the_largest_packed_weight() -> None:
    packed = TrainingSettings(load_in_4bit=True, engine="unsloth")
    phi = load_model_facts("microsoft/Phi-3-mini-4k-instruct")
    mixture = load_model_facts("Qwen/Qwen3-30B-A3B")
    assert unpacked_weight_bytes(LLAMA, packed) == 2 * 4096 * 14336
    assert unpacked_weight_bytes(phi, packed) == 2 * 3072 * 2 * 8192  # gate and up in one
    assert unpacked_weight_bytes(mixture, packed) == 2 * 2048 * 4096  # its experts are not packed
    assert unpacked_weight_bytes(LLAMA, TrainingSettings(engine="unsloth")) == 0


def test_unsloths_kernels_keep_less_than_plain_autograd() -> None:
    plain = estimate(checkpointing="none", attention_mask=False)
    kernels = estimate(checkpointing="none", engine="unsloth")
    assert 0.4 * plain.activations_bytes < kernels.activations_bytes < 0.8 * plain.activations_bytes


def test_a_fused_loss_is_bounded_and_never_worse() -> None:
    short, long = (estimate(cross_entropy="fused", sequence_length=n) for n in (256, 16384))
    assert short.allocated_bytes <= estimate(cross_entropy="plain", sequence_length=256).allocated_bytes
    assert long.allocated_bytes < estimate(cross_entropy="plain", sequence_length=16384).allocated_bytes / 1.5


def test_packed_rows_cost_a_mask_that_kernels_do_without() -> None:
    packed = estimate(packed=True, sequence_length=4096, checkpointing="none")
    bare = estimate(attention_mask=False, sequence_length=4096, checkpointing="none")
    unsloth = estimate(packed=True, sequence_length=4096, checkpointing="none", engine="unsloth")
    biases = 32 * 2 * 4096**2
    assert packed.activations_bytes - bare.activations_bytes > biases
    assert unsloth.activations_bytes < bare.activations_bytes


def test_buckets_hold_every_gradient_once() -> None:
    alone, replicated = estimate(method="full"), estimate(method="full", processes=2)
    assert replicated.gradients_bytes == 2 * part_parameters(LLAMA, whole(LLAMA)).total
    assert alone.gradients_bytes <= replicated.gradients_bytes
    assert replicated.context_bytes > alone.context_bytes


def test_eight_bit_adamw_keeps_a_quarter_of_float32_moments() -> None:
    adapters = adapter_parameters(LLAMA, whole(LLAMA), 16)
    small = state_bytes(LLAMA, TrainingSettings(optimizer="adamw_8bit"), whole(LLAMA))
    assert small.optimizer_bytes / adapters == pytest.approx(2.03, rel=0.01)
    assert state_bytes(LLAMA, TrainingSettings(optimizer="paged_adamw_8bit"), whole(LLAMA)).optimizer_bytes == 0
    with pytest.raises(ConfigError, match="lamb"):
        estimate(optimizer="lamb")


def test_windows_and_experts_and_biases_count() -> None:
    mistral = load_model_facts("mistralai/Mistral-7B-v0.1")
    wide = dataclasses.replace(mistral, windowed_layers=(), sliding_window=0)
    options: dict[str, Any] = {"sequence_length": 8192, "checkpointing": "none", "attention_mask": False}
    assert estimate(mistral, **options).allocated_bytes > estimate(wide, **options).allocated_bytes
    assert estimate(mistral, **{**options, "sequence_length": 2048}) == estimate(
        wide, **{**options, "sequence_length": 2048}
    )
    mixture = load_model_facts("Qwen/Qwen3-30B-A3B")
    assert estimate(mixture, load_in_4bit=True).weights_bytes > 0.9 * 2 * 28.9e9
    fewer = dataclasses.replace(mixture, experts_per_token=2)
    none: dict[str, Any] = {"checkpointing": "none", "lora_targets": ("q_proj",)}
    assert estimate(fewer, **none).activations_bytes < estimate(mixture, **none).activations_bytes
    qwen = load_model_facts("Qwen/Qwen2.5-7B")
    bare = dataclasses.replace(qwen, qkv_bias=False)
    assert estimate(qwen).weights_bytes - estimate(bare).weights_bytes == 2 * 28 * (3584 + 2 * 512)


def test_lanes_multiply_what_waits_before_the_last_stage() -> None:
    middle: dict[str, Any] = {"part": Part(8, 15, embedding=False, head=False), "checkpointing": "none"}
    one, two = estimate(**middle), estimate(**middle, lanes=2)
    # All but what one layer's backward holds while it runs: lanes take turns at that.
    assert 1.9 * one.activations_bytes < two.activations_bytes < 2 * one.activations_bytes
    assert two.gradients_bytes > 0
    last: dict[str, Any] = {"part": Part(24, 31, embedding=False, head=True), "checkpointing": "none"}
    assert estimate(**last, lanes=2).activations_bytes == estimate(**last).activations_bytes


def test_machine_constants_take_the_place_of_defaults() -> None:
    constants = MachineConstants(context_bytes=7, nccl_bytes=11, reserve_fraction=0.5, workspace_bytes=13)
    estimator = ClosedFormEstimator(LLAMA, TrainingSettings(), constants)
    result = estimator.memory(dataclasses.replace(whole(LLAMA), head=False), Arrangement(2, 1, 1, "full"), GPU)
    assert (result.context_bytes, result.buffers_bytes) == (SPLIT_CONTEXT_BYTES + 18, 13)
    assert result.reserve_bytes == result.allocated_bytes // 2
    assert estimate(device=CPU).context_bytes > 0


@settings(max_examples=60, deadline=None)
@given(
    first=st.integers(0, 31),
    more=st.integers(0, 31),
    method=st.sampled_from(["full", "lora"]),
    checkpointing=st.sampled_from(["none", "full", "unsloth"]),
    ends=st.tuples(st.booleans(), st.booleans()),
    lanes=st.integers(1, 3),
)
def test_more_layers_never_cost_less(
    first: int, more: int, method: str, checkpointing: Checkpointing, ends: tuple[bool, bool], lanes: int
) -> None:
    last = min(31, first + more)
    options: dict[str, Any] = {"method": method, "checkpointing": checkpointing, "lanes": lanes}
    small = estimate(part=Part(first, last, *ends), **options)
    if last < 31:
        assert estimate(part=Part(first, last + 1, *ends), **options).peak_bytes >= small.peak_bytes
    if first > 0:
        assert estimate(part=Part(first - 1, last, *ends), **options).peak_bytes >= small.peak_bytes


def test_time_follows_work() -> None:
    estimator = ClosedFormEstimator(LLAMA, TrainingSettings())
    plain, checkpointed = Arrangement(1, 1, 1, "none"), Arrangement(1, 1, 1, "full")
    half = Part(0, 15, embedding=True, head=False)
    assert estimator.micro_batch_seconds(whole(LLAMA), plain, GPU) == pytest.approx(0.201, rel=0.15)  # FACTS, Speed
    assert estimator.micro_batch_seconds(half, plain, GPU) < estimator.micro_batch_seconds(whole(LLAMA), plain, GPU) / 2
    assert estimator.micro_batch_seconds(half, checkpointed, GPU) > estimator.micro_batch_seconds(half, plain, GPU)
    assert estimator.host_seconds(whole(LLAMA), plain) == pytest.approx(0.216)


@pytest.mark.parametrize(
    "options",
    [{"method": "full", "load_in_4bit": True}, {"lora_rank": 0}, {"sequence_length": 0}, {"compute_dtype": "int8"}],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        TrainingSettings(**options)
