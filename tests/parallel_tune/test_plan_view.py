"""A plan reads well at 80 columns and needs neither colour nor a terminal."""

from __future__ import annotations

import dataclasses

import pytest

from parallel_tune.plan_view import headline, memory_bar, render_plan, short_name
from strategies.contracts import DevicePlan, MemoryEstimate, Plan, Rejection, Suggestion

GIB = 2**30
MEMORY = MemoryEstimate(
    weights_bytes=40 * GIB,
    adapters_bytes=1 * GIB,
    gradients_bytes=1 * GIB,
    optimizer_bytes=2 * GIB,
    activations_bytes=10 * GIB,
    cross_entropy_bytes=4 * GIB,
    context_bytes=GIB,
    reserve_bytes=GIB,
    phase="cross_entropy",
)


def device(index: int, layers: tuple[int, int], memory: MemoryEstimate = MEMORY, capacity_gib: int = 80) -> DevicePlan:
    return DevicePlan(
        index=index,
        name="NVIDIA H100 80GB HBM3",
        kind="cuda",
        capacity_bytes=capacity_gib * GIB,
        free_bytes=(capacity_gib - 1) * GIB,
        predicted_allocated_bytes=memory.allocated_bytes,
        predicted_peak_bytes=memory.peak_bytes,
        layers=layers,
        memory=memory,
    )


PLAN = Plan(
    strategy="model_parallel",
    fits=True,
    engine="unsloth",
    processes=1,
    devices=(device(0, (0, 39)), device(1, (40, 79))),
    device_map={},
    micro_batch=2,
    gradient_accumulation_steps=4,
    global_batch=8,
    gradient_checkpointing="full",
    predicted_tokens_per_second=1234.5,
    reasons=("split over 2 cards the model needs 120.0 GiB in all at micro-batch 2 with checkpointing",),
    rejected=(Rejection("ddp", "does not fit: a replica needs 118.0 GiB a card at micro-batch 1 with checkpointing"),),
    launch=("python", "-m", "parallel_tune.worker", "a run"),
)


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_too_long_and_nothing_is_missing(width: int) -> None:
    text = render_plan(PLAN, width)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    for said in (
        "model_parallel with unsloth: 1 process, one model over 2 devices",
        "0 H100 80GB HBM3 emb 0-39 60.0 76.6 80.0",
        "1 H100 80GB HBM3 40-79 head 60.0 76.6 80.0",
        "at its peak in the cross-entropy phase",
        "W weights 40.0, L adapters 1.0, G gradients 1.0, O optimizer 2.0, A activations 10.0, C cross-entropy 4.0",
        "X context 1.0, R reserve 1.0",
        "global batch 8 = 1 process x micro-batch 2 x 4 accumulation steps",
        "checkpointing full",
        "about 1,200 tokens/s",
        "Why - split over 2 cards",
        "Not taken - ddp: does not fit: a replica needs 118.0 GiB a card",
        "Command python -m parallel_tune.worker 'a run'",
    ):
        assert said in words
    assert "buffers" not in words


def test_the_command_stays_on_one_line() -> None:
    launch = ("python", "-m", "torch.distributed.run", *(f"--option-{i}=1" for i in range(20)))
    last = render_plan(dataclasses.replace(PLAN, launch=launch), 80).splitlines()[-1]
    assert last.split() == list(launch)


def test_a_plan_that_does_not_fit_says_so_first_and_what_would() -> None:
    large = dataclasses.replace(MEMORY, weights_bytes=80 * GIB)
    plan = dataclasses.replace(
        PLAN,
        fits=False,
        devices=(device(0, (0, 39), large), device(1, (40, 79), large)),
        suggestions=(Suggestion("--load_in_4bit", "ddp", 45 * GIB),),
    )
    text = render_plan(plan, 80)
    assert text.startswith("DOES NOT FIT. Closest: model_parallel")
    assert "--load_in_4bit: ddp, 45.0 GiB on the fullest device" in text


def test_replicas_and_a_batch_that_does_not_divide() -> None:
    plan = dataclasses.replace(PLAN, strategy="ddp", processes=2, global_batch=15, gradient_checkpointing="none")
    text = render_plan(plan, 100)
    assert "2 processes, a whole model on each device" in text
    assert "emb" not in text
    assert "global batch   15, in 16 places, some left empty = 2 processes x micro-batch 2 x 4" in text
    assert "GiB on each device" in text


def test_stages_on_one_device_are_not_counted_as_devices() -> None:
    devices = (device(0, (0, 39)), device(0, (40, 59)), device(1, (60, 79)))
    said = headline(dataclasses.replace(PLAN, devices=devices))
    assert "one model in 3 stages over 2 devices" in said
    assert "one model in 2 stages on 1 device" in headline(dataclasses.replace(PLAN, devices=devices[:2]))


def test_bar_is_drawn_to_scale() -> None:
    bar = memory_bar(device(0, (0, 1)), 80 * GIB, 80)
    assert bar == "W" * 40 + "L" + "G" + "OO" + "A" * 10 + "CCCC" + "X" + "R" + "." * 17 + "|" + " " * 2
    half = memory_bar(device(0, (0, 1), capacity_gib=80), 160 * GIB, 80)
    assert half.index("|") == 38
    assert half.count("W") == 20


def test_what_does_not_fit_lies_behind_the_mark() -> None:
    bar = memory_bar(device(0, (0, 1), dataclasses.replace(MEMORY, weights_bytes=90 * GIB)), 110 * GIB, 110)
    assert len(bar) == 110
    before, _, behind = bar.partition("|")
    assert set(before) == {"W"}
    assert behind.startswith("WWW")
    assert "R" in behind


def test_narrow_terminals_and_many_devices_still_work() -> None:
    plan = dataclasses.replace(PLAN, devices=tuple(device(i, (i, i)) for i in range(8)))
    text = render_plan(plan, 20)
    assert max(map(len, text.splitlines()[:-2])) <= 60


@pytest.mark.parametrize(
    ("name", "short"),
    [("NVIDIA GeForce RTX 3090", "RTX 3090"), ("Tesla T4", "T4"), ("CPU", "CPU"), ("NVIDIA", "NVIDIA")],
)
def test_short_names(name: str, short: str) -> None:
    assert short_name(name) == short
