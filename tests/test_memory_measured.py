"""The closed form against runs on an NVIDIA H200 (torch 2.11, transformers 5.17, unsloth 2026.10.9).

Each row is a run of examples/benchmarks/prediction.py: one process, three steps, gradient accumulation 2, all rows of
full length. All rows were in view when the allocator's reserve was corrected, so agreement here guards against
regressions; it is no forecast of the error on other runs. Unsloth's layers were later read anew, from every allocation
of runs on an H100, and no number of theirs was chosen by these.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from parallel_tune.memory import ClosedFormEstimator, TrainingSettings
from parallel_tune.memory.facts import facts_from_config
from parallel_tune.memory.parameters import whole
from strategies.contracts import Arrangement, Checkpointing, Device, MemoryEstimate

H200 = Device(0, "NVIDIA H200", "cuda", 150 << 30, 150 << 30)
CONTEXT_BYTES = 767 << 20
"""Device use beyond the allocator's reserve, the same in every run."""

Row = tuple[str, str, str, int, int, Checkpointing, int, int]
ROWS: list[Row] = [
    # shape, engine, method, tokens, rows, checkpointing, allocated bytes, reserved bytes
    ("llama-1b", "transformers", "lora", 2048, 1, "none", 9732055552, 10393485312),
    ("llama-1b", "transformers", "lora", 1024, 4, "full", 9326461440, 10808721408),
    ("llama-1b", "transformers", "4bit", 2048, 2, "none", 14203397632, 15378415616),
    ("llama-1b", "transformers", "full", 2048, 1, "full", 13276082688, 15586033664),
    ("qwen3-1b", "transformers", "lora", 2048, 2, "none", 24489722368, 25975324672),
    ("qwen3-1b", "transformers", "4bit", 1024, 2, "full", 5685884416, 7742685184),
    ("gemma3-1b", "transformers", "lora", 1024, 2, "none", 14168936960, 15521021952),
    ("llama-3b", "transformers", "lora", 4096, 1, "full", 13943319040, 15785263104),
    ("llama-3b", "transformers", "4bit", 512, 8, "none", 22713363968, 23976738816),
    ("llama-8b", "transformers", "lora", 2048, 2, "none", 51688681984, 53330575360),
    ("llama-8b", "transformers", "lora", 4096, 1, "full", 24245760512, 26543652864),
    ("llama-1b", "unsloth", "lora", 2048, 1, "none", 5124131840, 5177868288),
    ("llama-1b", "unsloth", "lora", 1024, 4, "unsloth", 3338250240, 3414163456),
    ("llama-1b", "unsloth", "4bit", 2048, 2, "none", 5811525632, 5964300288),
    ("llama-1b", "unsloth", "full", 2048, 1, "full", 12425661440, 12440305664),
    ("qwen3-1b", "unsloth", "lora", 2048, 2, "none", 11565329408, 11653873664),
    ("qwen3-1b", "unsloth", "4bit", 1024, 2, "unsloth", 2093293568, 2172649472),
    ("gemma3-1b", "unsloth", "lora", 1024, 2, "none", 6215528960, 6241124352),
    ("llama-3b", "unsloth", "lora", 4096, 1, "unsloth", 7608082432, 7746879488),
    ("llama-3b", "unsloth", "4bit", 512, 8, "none", 12698918912, 12928942080),
    ("llama-8b", "unsloth", "lora", 2048, 2, "none", 33059615744, 33223081984),
]


def predict(row: Row) -> MemoryEstimate:
    shape, engine, method, tokens, rows, checkpointing, _, _ = row
    model_type, sizes = shapes()[shape]
    settings = TrainingSettings(
        method="full" if method == "full" else "lora",
        load_in_4bit=method == "4bit",
        engine="unsloth" if engine == "unsloth" else "transformers",
        cross_entropy="fused" if engine == "unsloth" else "plain",
        sequence_length=tokens,
        attention_mask=False,
        optimizer="adamw_torch",
        # Unsloth sets the allocator up by itself; transformers ran before parallel-tune did.
        segments_grow=engine == "unsloth",
    )
    facts = facts_from_config({"model_type": model_type, **sizes})
    return ClosedFormEstimator(facts, settings).memory(whole(facts), Arrangement(1, rows, 2, checkpointing), H200)


def shapes() -> dict[str, tuple[str, dict[str, Any]]]:
    path = Path(__file__).parents[1] / "examples" / "benchmarks" / "shapes.py"
    spec = importlib.util.spec_from_file_location("benchmark_shapes", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, tuple[str, dict[str, Any]]] = module.SHAPES
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row[:6])))
def test_tensors_agree_with_the_measured_peak(row: Row) -> None:
    shape, engine, measured = row[0], row[1], row[6]
    # Gemma 3's windowed layers keep 4 MiB more each on a GPU than in a trace; why is not known.
    tolerance = 0.015 if engine == "unsloth" else 0.01 if shape == "gemma3-1b" else 0.001
    assert predict(row).allocated_bytes == pytest.approx(measured, rel=tolerance)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row[:6])))
def test_the_device_holds_about_what_was_planned(row: Row) -> None:
    used = row[7] + CONTEXT_BYTES
    assert -0.05 < predict(row).peak_bytes / used - 1 < 0.05
