"""What a layer costs for each token, regenerated from traces: states and the head cannot hide a change.

Three layers beside a vocabulary of a few words: what is left when the states are taken off is what the layers store
and recompute. A new transformers or peft that moves that by more than a hundredth fails here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from parallel_tune.memory import ClosedFormEstimator, TrainingSettings, load_model_facts
from parallel_tune.memory.fake_model import cut_to
from parallel_tune.memory.parameters import whole
from parallel_tune.memory.trace import trace_layers
from strategies.contracts import Arrangement, Checkpointing

pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = 0.01
ROWS: list[tuple[str, dict[str, Any], Checkpointing]] = [
    ("meta-llama/Llama-3.1-8B", {}, "none"),
    ("meta-llama/Llama-3.1-8B", {}, "full"),
    ("meta-llama/Llama-3.1-8B", {"method": "full"}, "none"),
    ("Qwen/Qwen3-8B", {"load_in_4bit": True}, "full"),
    ("Qwen/Qwen2.5-7B", {"method": "full"}, "full"),
    ("google/gemma-3-4b-pt", {}, "none"),
    ("microsoft/Phi-3-mini-4k-instruct", {}, "full"),
    ("mistralai/Mixtral-8x7B-v0.1", {"lora_targets": ("q_proj", "v_proj")}, "none"),
]


def change(name: str, options: dict[str, Any], checkpointing: Checkpointing) -> float:
    """By what share the activations of a trace differ from those of the closed form."""
    facts = dataclasses.replace(cut_to(load_model_facts(name), (0, 1, 2)), vocab_size=64, extra_parameters=0)
    settings = TrainingSettings(
        **{"optimizer": "adamw_torch_fused", "sequence_length": 1024, "attention_mask": False, **options}
    )
    arrangement = Arrangement(1, 1, 1, checkpointing)
    phases = ClosedFormEstimator(facts, settings).phases(whole(facts), arrangement)
    peak = max(phases, key=lambda phase: phase.allocated_bytes)
    assert peak.phase == "backward"
    traced = max(trace_layers(facts, settings, whole(facts), arrangement).phases.values())
    states = peak.allocated_bytes - peak.activations_bytes
    return (traced - states) / peak.activations_bytes - 1


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0].split('/')[1]}-{'-'.join(row[1])}-{row[2]}")
def test_layers_cost_what_the_closed_form_says(row: tuple[str, dict[str, Any], Checkpointing]) -> None:
    assert abs(change(*row)) < TOLERANCE


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_layer_that_keeps_one_tensor_more_is_noticed(
    checkpointing: Checkpointing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a new transformers might: a second hidden state of all that a layer holds."""
    from transformers.models.llama import modeling_llama

    forward = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: forward(self, x.sigmoid()))
    assert change("meta-llama/Llama-3.1-8B", {}, checkpointing) > TOLERANCE
