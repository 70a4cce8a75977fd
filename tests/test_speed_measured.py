"""Seconds of captured micro-batches as measured, against the formula: bf16 LoRA of rank 16, all activations kept."""

from __future__ import annotations

from typing import Literal

import pytest
from test_memory_measured import shapes

from parallel_tune.hardware import parse_hardware
from parallel_tune.memory import TrainingSettings
from parallel_tune.memory.closed_form import ClosedFormEstimator
from parallel_tune.memory.facts import facts_from_config
from parallel_tune.memory.parameters import whole
from strategies.contracts import Arrangement

Row = tuple[str, str, Literal["transformers", "unsloth"], bool, int, float, float]
ROWS: list[Row] = [
    # card, shape, engine, whether in 4 bit, tokens of a micro-batch, seconds of its replay, how far the formula is off
    ("1xH100-80GB", "llama-8b", "transformers", False, 112, 0.033, -0.03),
    ("1xH100-80GB", "llama-8b", "transformers", False, 448, 0.057, 0.03),
    ("1xH100-80GB", "llama-8b", "transformers", False, 2048, 0.201, 0.0),
    ("1xH200-141GB", "llama-8b", "transformers", False, 2048, 0.195, 0.03),
    ("1xH200-141GB", "llama-8b", "unsloth", False, 2048, 0.1373, 0.02),
    ("1xH200-141GB", "llama-34b", "unsloth", False, 1024, 0.2536, -0.02),
    ("1xH200-141GB", "llama-70b", "unsloth", True, 512, 0.3527, -0.04),
    # with the optimizer's step and the host's part
    ("1xH200-141GB", "qwen3-8b", "unsloth", False, 536, 0.0448, -0.15),
    ("1xH200-141GB", "qwen3-8b", "unsloth", True, 536, 0.0551, -0.13),
    ("1xH200-141GB", "qwen3-1b", "unsloth", False, 448, 0.0253, -0.34),
    ("1xH200-141GB", "qwen3-1b", "transformers", False, 448, 0.0404, -0.31),
]
"""On the H200 the sum of both stages of a split, one after the other (examples/benchmarks/split_speed.py), single cards
of ddp_speed.py, and step_profile.py."""


@pytest.mark.parametrize(("card", "times"), [("1xH100-80GB", 7), ("1xT4-16GB", 3), ("1xRTX3090-24GB", 1)])
def test_float32_takes_what_its_products_take(card: str, times: int) -> None:
    """Datasheets have it 15, 8 and 2 times slower; where that is little, what is no product hides it."""
    model_type, sizes = shapes()["llama-8b"]
    facts = facts_from_config({"model_type": model_type, **sizes})
    (device,) = parse_hardware(card).devices
    arrangement = Arrangement(1, 1, 16, "none")
    half, single = (
        ClosedFormEstimator(facts, TrainingSettings(engine="transformers", compute_dtype=dtype)).micro_batch_seconds(
            whole(facts), arrangement, device
        )
        for dtype in ("float16", "float32")
    )
    assert single >= times * half
    old = not device.supports_bf16
    bfloat = ClosedFormEstimator(facts, TrainingSettings(engine="transformers")).micro_batch_seconds(
        whole(facts), arrangement, device
    )
    assert bfloat == (single if old else half), "cards without bfloat16 compute it in float32"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row[:5])))
def test_a_replayed_micro_batch_takes_about_as_long_as_planned(row: Row) -> None:
    card, shape, engine, in_4bit, tokens, measured, off = row
    model_type, sizes = shapes()[shape]
    facts = facts_from_config({"model_type": model_type, **sizes})
    settings = TrainingSettings(
        sequence_length=tokens, engine=engine, load_in_4bit=in_4bit, packed=True, attention_mask=False
    )
    (device,) = parse_hardware(card).devices
    arrangement = Arrangement(1, 1, 16, "none", captured=True)
    seconds = ClosedFormEstimator(facts, settings).micro_batch_seconds(whole(facts), arrangement, device)
    assert seconds / measured - 1 == pytest.approx(off, abs=0.02)
