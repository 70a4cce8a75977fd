"""`model_parallel` plans: one model over the cards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from strategies.contracts import Hardware, Plan
from strategies.errors import ConfigError
from strategies.model_parallel import ModelParallel, step_seconds

Make = Callable[..., Any]


def plan(made: Any, hardware: Hardware, lanes_available: bool = False) -> Plan:
    workload, estimate = made
    return ModelParallel(lanes_available).plan(workload, hardware, estimate)


def test_70b_over_two_cards(model: Make, cards: Make) -> None:
    p = plan(model("70b"), cards("H100", "H100"))
    assert p.fits
    assert (p.strategy, p.processes, p.lanes, p.micro_batch, p.global_batch) == ("model_parallel", 1, 1, 1, 8)
    first, last = p.devices
    assert first.layers[0] == 0
    assert last.layers == (first.layers[1] + 1, 79)
    assert "split over 2 cards the model needs 144.0 GiB in all at micro-batch 1 with checkpointing" in p.reasons[0]


def test_device_map_names_every_module(model: Make, cards: Make) -> None:
    p = plan(model("8b"), cards("H100", "H100"))
    cut = p.devices[0].layers[1]
    layers = {f"model.layers.{i}": 0 if i <= cut else 1 for i in range(32)}
    ends = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    assert p.device_map == layers | ends


def test_tied_head_is_loaded_with_the_embedding(model: Make, cards: Make) -> None:
    p = plan(model("8b", tied_embeddings=True), cards("H100", "H100"))
    assert (p.device_map["model.norm"], p.device_map["lm_head"]) == (1, 0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_virtual_devices_are_all_used(model: Make, cpus: Make, count: int) -> None:
    p = plan(model("1b"), cpus(count))
    assert p.fits
    assert [d.index for d in p.devices] == list(range(count))
    assert set(p.device_map.values()) == set(range(count))


def test_no_more_stages_than_layers(model: Make, cpus: Make) -> None:
    p = plan(model("1b"), cpus(20))
    assert len(p.devices) == 16


def test_uneven_cards_get_uneven_shares(model: Make, cards: Make) -> None:
    p = plan(model("70b", four_bit=True), cards("A100-40GB", "RTX3090"))
    assert p.fits
    layers = {d.name: d.layers[1] - d.layers[0] + 1 for d in p.devices}
    assert layers["A100-40GB"] > 1.4 * layers["RTX3090"]


def test_a_card_too_small_for_one_layer_is_dropped(model: Make, cards: Make) -> None:
    # A layer of 405B with its working memory is beyond a T4.
    made = model("405b", four_bit=True, micro_batch=1)
    p = plan(made, cards("T4", *["H100"] * 6))
    assert p.fits
    assert [d.index for d in p.devices] == [1, 2, 3, 4, 5, 6]
    assert any("device 0 (T4" in r and "left out" in r for r in p.reasons)


def test_a_slow_card_that_is_not_needed_is_dropped(model: Make, cards: Make) -> None:
    p = plan(model("8b"), cards("T4", "H100"))
    assert [d.index for d in p.devices] == [1]
    assert any("with it 4,962 tokens/s are predicted, without it 19,988" in r for r in p.reasons)


def test_equal_cards_are_all_used_though_one_would_do(model: Make, cards: Make) -> None:
    assert len(plan(model("8b"), cards("H100", "H100")).devices) == 2


def test_closest_when_nothing_fits(model: Make, cards: Make) -> None:
    p = plan(model("405b"), cards("H100", "H100"))
    assert not p.fits
    assert p.micro_batch == 1
    assert len(p.devices) == 2


def test_lanes_are_planned_only_where_they_exist_and_help(model: Make, cards: Make, cpus: Make) -> None:
    workload, estimate = model("8b", micro_batch=1, gradient_accumulation_steps=12)
    assert plan((workload, estimate), cards("H100", "H100"), lanes_available=True).lanes == 1  # the host is the limit
    made = workload, dataclasses.replace(estimate, host=0.02)
    assert plan(made, cards("H100", "H100")).lanes == 1
    pipelined = plan(made, cards("H100", "H100"), lanes_available=True)
    assert pipelined.lanes == 2
    assert "1.85x is the bound for 12 micro-batches on 2 equal stages" in pipelined.reasons[1]
    assert plan(model("8b", pipeline=False), cards("H100", "H100"), lanes_available=True).lanes == 1
    assert plan(made, cards("H100"), lanes_available=True).lanes == 1
    assert plan(model("1b"), cpus(2), lanes_available=True).lanes == 1
    one_micro_batch = model("8b", micro_batch=1, gradient_accumulation_steps=1)
    assert plan(one_micro_batch, cards("H100", "H100"), lanes_available=True).lanes == 1


def test_lanes_keep_layer_inputs_on_the_card_where_offloading_was_asked_for(model: Make, cards: Make) -> None:
    made = model("8b", engine="unsloth", gradient_checkpointing="unsloth")
    pipelined = plan(made, cards("H100", "H100"), lanes_available=True)
    assert (pipelined.lanes, pipelined.gradient_checkpointing) == (2, "full")
    assert any("checkpointing full in place of unsloth" in reason for reason in pipelined.reasons)
    off = plan(
        model("8b", engine="unsloth", gradient_checkpointing="unsloth", pipeline=False), cards("H100", "H100"), True
    )
    assert (off.lanes, off.gradient_checkpointing) == (1, "unsloth")


def test_offloading_without_lanes_where_their_activations_do_not_fit(model: Make, cards: Make) -> None:
    """Two micro-batches' layer inputs are too much for these cards, one's offloaded is not."""
    made = model("70b", engine="unsloth", gradient_checkpointing="unsloth", sequence_length=2048, micro_batch=1)
    workload, estimate = made
    estimate = dataclasses.replace(estimate, host=0.001, bytes_per_weight=2.1)
    chosen = plan((workload, estimate), cards("H100", "H100"), lanes_available=True)
    assert chosen.fits
    assert (chosen.lanes, chosen.gradient_checkpointing) == (1, "unsloth")
    (why,) = [reason for reason in chosen.reasons if reason.startswith("no lanes")]
    assert "the activations of 2 micro-batches at once do not fit: at micro-batch 1 with checkpointing device" in why


@pytest.mark.parametrize(
    ("changes", "devices", "why"),
    [
        ({"pipeline": False}, 2, "--pipeline off"),
        ({"lanes": 1}, 2, "--lanes 1"),
        ({"global_batch": 1}, 2, "an optimizer step is a single micro-batch"),
        ({"force_lanes": True, "global_batch": 1}, 2, "an optimizer step is a single micro-batch"),
        ({"stages": 2}, 1, "all stages share one device"),
        ({"micro_batch": 1, "gradient_accumulation_steps": 12}, 2, "the host that issues the work"),
    ],
)
def test_a_split_without_lanes_says_why(
    model: Make, cards: Make, changes: dict[str, Any], devices: int, why: str
) -> None:
    chosen = plan(model("8b", **changes), cards(*["H100"] * devices), lanes_available=True)
    assert chosen.lanes == 1
    assert [reason for reason in chosen.reasons if reason.startswith("no lanes") and why in reason]
    assert [reason for reason in chosen.reasons if reason.startswith("busy share expected: ")]


def test_virtual_devices_say_why_they_take_turns(model: Make, cpus: Make) -> None:
    chosen = plan(model("1b"), cpus(2), lanes_available=True)
    assert [reason for reason in chosen.reasons if "virtual devices share one CPU" in reason]
    forced = plan(model("1b", force_lanes=True), cpus(2), lanes_available=True)
    assert forced.lanes == 2
    assert any("2 lanes, as was asked for; the stages share one device" in reason for reason in forced.reasons)
    refused = plan(model("1b", force_lanes=True), cpus(1), lanes_available=True)
    assert any("one device holds the whole model" in reason for reason in refused.reasons)
    alone = plan(model("1b"), cpus(1), lanes_available=True)
    assert not [reason for reason in alone.reasons if "lanes" in reason]


def test_step_seconds_reach_the_bound_for_equal_stages(model: Make, cards: Make) -> None:
    from strategies.contracts import Arrangement, Part
    from strategies.placement import Stage

    _, estimate = model("8b")
    first, second = cards("H100", "H100").devices
    part = Part(0, 15, True, False)
    memory = estimate.memory(part, Arrangement(1, 1, 12, "full"), first)
    stages = (Stage(first, part, memory, 2.0), Stage(second, part, memory, 2.0))
    naive = step_seconds(stages, host_seconds=0.0, micro_batches=12, lanes=1)
    assert naive == 48.0
    assert naive / step_seconds(stages, host_seconds=0.0, micro_batches=12, lanes=2) == pytest.approx(2 * 12 / 13)
    assert step_seconds(stages, host_seconds=5.0, micro_batches=12, lanes=2) == 60.0
    assert step_seconds(stages, host_seconds=5.0, micro_batches=12, lanes=1) == 60.0
    # Two stages of one card cannot work at once, and two lanes keep no more than two of four stages at work.
    shared = (Stage(first, part, memory, 2.0), Stage(first, part, memory, 2.0))
    assert step_seconds(shared, host_seconds=0.0, micro_batches=12, lanes=2) == 48.0
    four = tuple(Stage(device, part, memory, 1.0) for device in cards(*["H100"] * 4).devices)
    assert step_seconds(four, host_seconds=0.0, micro_batches=12, lanes=2) == 24.0
    assert step_seconds(four, host_seconds=0.0, micro_batches=12, lanes=4) == 15.0


def test_stages_share_devices_and_lanes_are_forced_only_when_asked_for(model: Make, cards: Make, cpus: Make) -> None:
    made = model("1b", stages=3, micro_batch=1, gradient_accumulation_steps=4)
    assert [d.index for d in plan(made, cards("H100", "H100")).devices] == [0, 0, 1]
    assert plan(made, cards("H100", "H100")).ordinals == (0, 0, 1)
    on_one = plan(model("1b", stages=2, max_devices=1), cards("H100", "H100"))
    assert [d.index for d in on_one.devices] == [0, 0]
    assert plan(made, cards("H100"), lanes_available=True).lanes == 1
    forced = plan(model("1b", force_lanes=True, lanes=2, stages=3), cpus(1), lanes_available=True)
    assert (forced.lanes, len(forced.devices), forced.visible) == (2, 3, (0,))
    assert forced.gradient_accumulation_steps > 1
    with pytest.raises(ConfigError, match="cannot be made"):
        plan(model("1b", stages=99), cpus(1))


def test_stages_that_share_a_device_are_not_counted_as_devices(model: Make, cards: Make) -> None:
    """Three stages on two cards were "3 cards", with a bound of 2.25x that two cards cannot reach."""
    made = model("8b", stages=3, micro_batch=1, gradient_accumulation_steps=6, force_lanes=True)
    p = plan(made, cards("H100", "H100"), lanes_available=True)
    assert p.lanes == 3 and "split in 3 stages over 2 cards" in p.reasons[0]
    assert "predicted" in p.reasons[1] and "bound" not in p.reasons[1]
    assert p.reasons[2].count("of device 0") == p.reasons[2].count("of device 1") == 1
    assert "each stage's" not in p.reasons[2]


def test_the_busy_share_of_each_device_is_stated(model: Make, cards: Make) -> None:
    workload, estimate = model("8b", micro_batch=1, gradient_accumulation_steps=12)
    made = workload, dataclasses.replace(estimate, host=0.02)
    (share,) = [reason for reason in plan(made, cards("H100", "H100"), True).reasons if "busy share" in reason]
    assert "12/13 = 92% would be each stage's" in share
