"""Rows as long as the card that is there just holds, by the plan, and one that it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from prediction_rows import HF, UNSLOTH, Row
from shapes import SHAPES

from parallel_tune.config import make_config
from parallel_tune.memory.facts import ModelFacts, facts_from_config
from parallel_tune.planning import make_plan
from strategies.contracts import Device, DevicePlan, Hardware
from strategies.registry import load_registry

STEP_TOKENS = 128
LARGER_CARD = "1xB200-180GB"
"""What a run is planned for that the plan for the card that is there refuses."""
TOO_MUCH = 1.03
"""By what factor tensors and context alone are above the whole card: what the allocator holds idle it can give back."""

FITTING = (
    Row("mistral-7b as long as fits", "mistral-7b", HF, "lora", 0, 1, "none"),
    Row("mistral-7b unsloth as long as fits", "mistral-7b", UNSLOTH, "lora", 0, 1, "none"),
)
TOO_LONG = replace(FITTING[0], name="mistral-7b refused and run all the same", on=LARGER_CARD, may_fail=True)


def edge_rows(device: Device) -> list[Row]:
    """The rows for this card."""
    # A step less: the constants that the first run measures on the card may be a little above those built in.
    fitting = [replace(row, tokens=longest(partial(_fits, row, device)) - STEP_TOKENS) for row in FITTING]
    too_long = longest(partial(_held, TOO_LONG, device)) + STEP_TOKENS
    return [fitting[0], replace(TOO_LONG, tokens=too_long), fitting[1]]


def longest(holds: Callable[[int], bool]) -> int:
    """The largest multiple of `STEP_TOKENS` that `holds` says yes to; it must do so for the first."""
    low, high = 1, 2
    while holds(high * STEP_TOKENS):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle * STEP_TOKENS) else (low, middle)
    return low * STEP_TOKENS


def _fits(row: Row, device: Device, tokens: int) -> bool:
    return _planned(row, device, tokens)[0]


def _held(row: Row, device: Device, tokens: int) -> bool:
    memory = _planned(row, device, tokens)[1].memory
    return memory.allocated_bytes + memory.context_bytes < TOO_MUCH * device.capacity_bytes


def _planned(row: Row, device: Device, tokens: int) -> tuple[bool, DevicePlan]:
    config = make_config(
        {
            "model": row.shape,
            "engine": row.engine,
            "strategy": "ddp",
            "max_seq_length": tokens,
            "per_device_train_batch_size": row.rows,
            "gradient_accumulation_steps": row.accumulation,
            "use_gradient_checkpointing": row.checkpointing,
            "capture": "off",
        }
    )
    plan = make_plan(config, facts_of(row.shape), row.engine, Hardware((device,)), load_registry())
    return plan.fits, plan.devices[0]


def facts_of(shape: str) -> ModelFacts:
    """What the plan knows of a shape."""
    kind, sizes = SHAPES[shape]
    return facts_from_config({"model_type": kind, **sizes})
