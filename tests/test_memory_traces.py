"""The closed form against traces of the real training step: a new transformers or peft that moves it is seen here."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from parallel_tune.memory import ClosedFormEstimator, TrainingSettings, load_model_facts
from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.parameters import whole
from strategies.contracts import Arrangement, Checkpointing, Part

DORA = {"method": "lora", "use_dora": True}
FUSED = {"cross_entropy": "fused", "method": "lora"}
EAGER = {"method": "lora", "eager_attention": True}
LORA_4BIT = {"method": "lora", "load_in_4bit": True}
ATTENTION = {"method": "lora", "lora_targets": ("q_proj", "k_proj", "v_proj", "o_proj")}
ROWS: list[tuple[str, dict[str, Any], Checkpointing, int]] = [
    ("meta-llama/Llama-3.2-1B", {"method": "full"}, "none", 1),
    ("meta-llama/Llama-3.2-1B", {"method": "full"}, "full", 2),
    ("meta-llama/Llama-3.1-8B", {"method": "lora"}, "none", 1),
    ("meta-llama/Llama-3.1-8B", {"method": "lora"}, "full", 2),
    ("meta-llama/Llama-3.1-8B", LORA_4BIT, "none", 1),
    ("Qwen/Qwen3-8B", LORA_4BIT, "full", 1),
    ("Qwen/Qwen3-8B", {"method": "lora", "attention_mask": True}, "none", 1),
    ("meta-llama/Llama-3.2-1B", DORA, "none", 2),
    ("Qwen/Qwen3-8B", DORA, "full", 1),
    ("Qwen/Qwen2.5-7B", {"method": "lora", "bias": "all"}, "none", 1),
    ("Qwen/Qwen2.5-7B", {"method": "full"}, "none", 1),
    ("google/gemma-2-2b", {"method": "lora", "sequence_length": 6144}, "none", 1),
    ("google/gemma-3-1b-pt", {"method": "lora"}, "full", 1),
    ("meta-llama/Llama-3.2-1B", EAGER, "none", 2),
    ("google/gemma-2-2b", {**EAGER, "compute_dtype": "float32"}, "none", 1),
    ("mistralai/Mistral-7B-v0.1", {"method": "lora", "sequence_length": 6144}, "none", 1),
    ("microsoft/Phi-3-mini-4k-instruct", LORA_4BIT, "none", 1),
    ("Qwen/Qwen3-30B-A3B", ATTENTION, "none", 1),
    ("Qwen/Qwen3-30B-A3B", {"method": "lora", "lora_rank": 256, "sequence_length": 512}, "none", 1),
    ("Qwen/Qwen3-30B-A3B", {"method": "lora", "lora_rank": 64, "sequence_length": 512}, "full", 2),
    ("mistralai/Mixtral-8x7B-v0.1", {"method": "full"}, "full", 1),
    ("Qwen/Qwen3-30B-A3B", {"method": "lora", "lora_targets": ("down_proj",), "sequence_length": 512}, "none", 1),
    ("meta-llama/Llama-3.2-1B", {**FUSED, "sequence_length": 2048}, "none", 1),
    ("meta-llama/Llama-3.2-1B", {**FUSED, "compute_dtype": "float32"}, "none", 1),
    ("meta-llama/Llama-3.2-1B", {**FUSED, "method": "full"}, "none", 2),
    ("google/gemma-2-2b", FUSED, "none", 1),
    ("google/gemma-2-2b", {**FUSED, "method": "full", "sequence_length": 2048}, "full", 2),
    ("meta-llama/Llama-3.1-8B", {**FUSED, "load_in_4bit": True, "sequence_length": 16384}, "full", 1),
]


def compare(facts: ModelFacts, options: dict[str, Any], part: Part, arrangement: Arrangement) -> float:
    from parallel_tune.memory.trace import trace_peak

    defaults = {"optimizer": "adamw_torch_fused", "sequence_length": 1024, "attention_mask": False}
    settings = TrainingSettings(**{**defaults, **options})
    predicted = max(p.allocated_bytes for p in ClosedFormEstimator(facts, settings).phases(part, arrangement))
    return predicted / trace_peak(facts, settings, part, arrangement) - 1


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0].split('/')[1]}-{row[1]['method']}-{row[2]}")
@pytest.mark.filterwarnings("ignore")
def test_whole_models_agree_with_their_traces(row: tuple[str, dict[str, Any], Checkpointing, int]) -> None:
    name, options, checkpointing, accumulation = row
    facts = load_model_facts(name)
    error = compare(facts, options, whole(facts), Arrangement(1, 1, accumulation, checkpointing))
    assert abs(error) < 0.01


@pytest.mark.parametrize(
    ("name", "options", "checkpointing", "micro_batch"),
    [
        ("meta-llama/Llama-3.2-1B", EAGER, "none", 1),
        ("meta-llama/Llama-3.2-1B", {**EAGER, "sequence_length": 4096}, "none", 2),
        ("meta-llama/Llama-3.2-1B", {**EAGER, "compute_dtype": "float32"}, "none", 2),
        ("meta-llama/Llama-3.1-8B", {**EAGER, "method": "full"}, "full", 1),
        ("Qwen/Qwen3-8B", {**EAGER, "load_in_4bit": True}, "full", 2),
        ("google/gemma-2-2b", EAGER, "none", 1),
        ("google/gemma-3-1b-pt", EAGER, "none", 2),
        ("microsoft/Phi-3-mini-4k-instruct", EAGER, "none", 1),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_eager_attention_keeps_the_scores_of_all_pairs(
    name: str, options: dict[str, Any], checkpointing: Checkpointing, micro_batch: int
) -> None:
    facts = load_model_facts(name)
    arrangement = Arrangement(1, micro_batch, 1, checkpointing)
    assert abs(compare(facts, options, whole(facts), arrangement)) < 0.01
    kernels = {**options, "eager_attention": False}
    eager, flash = (
        max(
            phase.allocated_bytes
            for phase in ClosedFormEstimator(facts, TrainingSettings(**each)).phases(whole(facts), arrangement)
        )
        for each in (options, kernels)
    )
    assert eager > flash


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only", "use_dora": True, "lora_targets": ("q_proj", "o_proj")},
    ],
)
@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-7B", "meta-llama/Llama-3.2-1B", "google/gemma-2-2b"])
def test_adapters_have_as_many_bytes_as_pefts(name: str, options: dict[str, Any]) -> None:
    import torch

    from parallel_tune.memory.fake_model import build_model, cut_to

    facts = cut_to(load_model_facts(name), (0, 1))
    settings = TrainingSettings(**options)
    model = build_model(facts, settings, whole(facts), torch.device("meta"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    phase = ClosedFormEstimator(facts, settings).phases(whole(facts), Arrangement(1, 1, 1, "none"))[0]
    assert phase.adapters_bytes == 4 * trained > 0
    assert phase.optimizer_bytes == 8 * trained


@pytest.mark.parametrize("options", [{"method": "full"}, {"method": "lora"}, LORA_4BIT], ids=["full", "lora", "4bit"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.filterwarnings("ignore")
def test_stages_agree_with_their_traces(options: dict[str, Any], checkpointing: Checkpointing, stage: int) -> None:
    facts = load_model_facts("meta-llama/Llama-3.1-8B")
    part = Part(8 * stage, 8 * stage + 7, embedding=stage == 0, head=stage == 3)
    assert abs(compare(facts, options, part, Arrangement(1, 1, 1, checkpointing, stages=4))) < 0.01


@pytest.mark.filterwarnings("ignore")
def test_a_stage_whose_ends_have_no_window() -> None:
    """The two layers that its trace begins with are none of the windowed ones."""
    facts = load_model_facts("google/gemma-2-27b")
    part = Part(15, 29, embedding=False, head=False)
    options = {"method": "lora", "sequence_length": 4097}
    # Half a percent is the trace's: it takes the window's mask for a cost of each windowed layer.
    assert abs(compare(facts, options, part, Arrangement(1, 1, 1, "full", stages=3))) < 0.006


@pytest.mark.filterwarnings("ignore")
def test_buckets_and_foreach_temporaries_are_in_the_trace_too() -> None:
    facts = load_model_facts("meta-llama/Llama-3.2-1B")
    replicated = Arrangement(2, 1, 1, "full")
    assert abs(compare(facts, {"method": "full"}, whole(facts), replicated)) < 0.01
    alone = Arrangement(1, 1, 1, "full")
    foreach = {"method": "full", "optimizer": "adamw_torch", "sequence_length": 128}
    assert abs(compare(facts, foreach, whole(facts), alone)) < 0.01


@pytest.mark.parametrize("model_type", ["granite", "olmo2"])
@pytest.mark.filterwarnings("ignore")
def test_an_architecture_that_the_closed_form_does_not_know_is_traced(model_type: str) -> None:
    from parallel_tune.memory.facts import facts_from_config
    from parallel_tune.memory.trace import trace_peak

    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 8}
    config = {"model_type": model_type, **shape, "num_key_value_heads": 4, "vocab_size": 4096}
    facts = facts_from_config(config)
    assert not facts.closed_form_known
    settings = TrainingSettings(sequence_length=512, attention_mask=False)
    arrangement = Arrangement(1, 1, 1, "none")
    few, many = (
        trace_peak(dataclasses.replace(facts, num_layers=n), settings, Part(0, n - 1, True, True), arrangement, config)
        for n in (6, 12)
    )
    assert 1.5 * few < many < 2 * few


EVALUATED: list[tuple[str, dict[str, Any], int]] = [
    ("meta-llama/Llama-3.2-1B", {"method": "lora"}, 1),
    ("meta-llama/Llama-3.2-1B", {"method": "lora"}, 4),
    ("meta-llama/Llama-3.1-8B", LORA_4BIT, 1),
    ("meta-llama/Llama-3.2-1B", {"method": "full"}, 1),
    ("google/gemma-2-2b", {"method": "lora"}, 2),
    ("mistralai/Mistral-7B-v0.3", {"method": "lora"}, 1),
    ("Qwen/Qwen3-30B-A3B", ATTENTION, 1),
]


@pytest.mark.parametrize("row", EVALUATED, ids=lambda row: f"{row[0].split('/')[1]}-{row[1]['method']}-{row[2]}")
@pytest.mark.filterwarnings("ignore")
def test_evaluating_as_many_tokens_is_never_the_peak(row: tuple[str, dict[str, Any], int]) -> None:
    """Beside training at its leanest: one micro-batch, all layers recomputed."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from parallel_tune.memory.fake_model import cut_to
    from parallel_tune.memory.training_step import TrainingStep, as_on_a_gpu

    name, options, micro_batch = row
    facts = cut_to(load_model_facts(name), (0, 1, 2))
    settings = TrainingSettings(**{"optimizer": "adamw_torch_fused", "sequence_length": 1024, **options})
    with FakeTensorMode(allow_non_fake_inputs=True), as_on_a_gpu():
        step = TrainingStep(facts, settings, whole(facts), Arrangement(1, micro_batch, 1, "full"))
        training = max(step.peaks_bytes().values())
        shape = (micro_batch, 1024)
        with step.tracker, torch.no_grad():
            step.model.eval()
            step.tracker.reset()
            tokens, count = torch.zeros(shape, dtype=torch.long), torch.ones(())
            step.model(input_ids=tokens, labels=tokens.clone(), num_items_in_batch=count, use_cache=False)
        evaluation = max(step.tracker.peaks_bytes.values())
    logits = micro_batch * 1024 * facts.vocab_size
    assert step.tracker.live_bytes + 4 * logits < evaluation < training
