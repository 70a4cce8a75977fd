"""More of anything never costs less memory, whatever phase holds the peak."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parallel_tune.memory import ClosedFormEstimator, TrainingSettings, load_model_facts
from strategies.contracts import Arrangement, Checkpointing, Device, Part

GPU = Device(0, "H100", "cuda", 80 << 30, 80 << 30)
TOKENS = (1, 2, 64, 127, 128, 129, 255, 256, 257, 500, 1000, 1024, 2000, 2048, 4096, 6000)


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.2-1B", "google/gemma-2-2b"])
@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
@pytest.mark.parametrize(
    ("method", "loss", "checkpointing", "accumulation"),
    [
        ("full", "plain", "full", 1),
        ("full", "plain", "none", 4),
        ("full", "fused", "full", 1),
        ("lora", "plain", "full", 4),
        ("lora", "fused", "none", 1),
    ],
)
def test_more_tokens_rows_and_layers_never_cost_less(
    model: str, engine: str, method: str, loss: str, checkpointing: Checkpointing, accumulation: int
) -> None:
    facts = load_model_facts(model)
    settings = TrainingSettings(
        method=method, engine=engine, cross_entropy=loss, packed=True, attention_mask=False, sequence_length=1000
    )  # type: ignore[arg-type]

    def peak(part: Part, tokens: int = 1000, rows: int = 2) -> int:
        estimator = ClosedFormEstimator(facts, replace(settings, sequence_length=tokens))
        return estimator.memory(part, Arrangement(1, rows, accumulation, checkpointing), GPU).peak_bytes

    last = facts.num_layers - 1
    whole = Part(0, last, True, True)
    by_tokens = [peak(whole, tokens) for tokens in TOKENS]
    assert by_tokens == sorted(by_tokens)
    by_rows = [peak(whole, 400, rows) for rows in (1, 2, 3, 4, 8, 16)]
    assert by_rows == sorted(by_rows)
    with_head = [peak(Part(first, last, False, True)) for first in range(last, -1, -1)]
    assert with_head == sorted(with_head)
    without = [peak(Part(0, layer, True, False)) for layer in range(last)]
    assert without == sorted(without)
