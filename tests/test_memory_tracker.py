"""The tracker against real tensors: what is alive is what it says, fake or not."""

from __future__ import annotations

import pytest

from parallel_tune.memory.facts import ModelFacts, facts_from_config
from parallel_tune.memory.settings import TrainingSettings
from strategies.contracts import Arrangement, Part

torch = pytest.importorskip("torch")
SMALL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


def small() -> ModelFacts:
    return facts_from_config(SMALL)


def test_live_bytes_follow_birth_views_and_death() -> None:
    from parallel_tune.memory.tracker import LiveBytes

    with LiveBytes() as tracker:
        first = torch.zeros(256)
        view = first.view(16, 16)
        assert tracker.live_bytes == 1024
        second = first * 2
        assert tracker.live_bytes == 2048
        del first
        assert tracker.live_bytes == 2048
        del view, second
        assert tracker.live_bytes == 0
    assert tracker.peaks_bytes[""] == 2048


def test_saved_tensors_live_until_backward() -> None:
    from parallel_tune.memory.tracker import LiveBytes

    leaf = torch.ones(256, requires_grad=True)
    with LiveBytes() as tracker:
        result = (leaf * 2).exp().sum()
        assert tracker.live_bytes >= 1024
        result.backward()
        del result
        assert tracker.live_bytes == 1024  # the gradient alone


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_fake_and_real_tensors_count_the_same(method: str, checkpointing: str) -> None:
    from parallel_tune.memory.trace import trace_layers
    from parallel_tune.memory.training_step import TrainingStep

    settings = TrainingSettings(
        method="full" if method == "full" else "lora",
        lora_rank=4,
        compute_dtype="float32",
        optimizer="adamw_torch_fused",
        sequence_length=32,
        attention_mask=False,
    )
    part = Part(0, 1, embedding=True, head=True)
    arrangement = Arrangement(1, 2, 1, "none" if checkpointing == "none" else "full")
    real = TrainingStep(small(), settings, part, arrangement).peaks_bytes()
    fake = trace_layers(small(), settings, part, arrangement).phases
    assert real.keys() == fake.keys()
    for phase, peak in fake.items():
        assert peak == pytest.approx(real[phase], rel=0.002), phase
