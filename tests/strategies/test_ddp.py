"""`ddp` plans: a replica on every card that holds one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from strategies.contracts import Hardware, Plan
from strategies.ddp import DDP
from strategies.errors import ConfigError

Make = Callable[..., Any]


def plan(made: Any, hardware: Hardware) -> Plan:
    workload, estimate = made
    return DDP().plan(workload, hardware, estimate)


def test_all_cards_where_a_replica_fits_each(model: Make, cards: Make) -> None:
    p = plan(model("8b"), cards("H100", "H100"))
    assert p.fits
    assert (p.strategy, p.processes, [d.index for d in p.devices]) == ("ddp", 2, [0, 1])
    assert p.device_map == {"": "local_rank"}
    assert p.gradient_checkpointing == "none"
    assert p.global_batch == 16
    assert p.processes * p.micro_batch * p.gradient_accumulation_steps == 16
    assert p.devices[0].layers == (0, 31)
    assert p.devices[0].predicted_peak_bytes == p.devices[0].memory.peak_bytes
    assert "a replica needs 51.5 GiB a card at micro-batch 2 without checkpointing" in p.reasons[0]


def test_two_of_three_when_one_is_too_small(model: Make, cards: Make) -> None:
    p = plan(model("8b"), cards("H100", "T4", "H100"))
    assert p.fits
    assert [d.index for d in p.devices] == [0, 2]
    assert any("device 1 (T4, 14.1 GiB usable) is left out: its share would need 20.5 GiB" in r for r in p.reasons)


def test_the_one_card_that_holds_a_replica(model: Make, cards: Make) -> None:
    p = plan(model("8b"), cards("T4", "H100"))
    assert p.fits
    assert (p.processes, [d.index for d in p.devices]) == (1, [1])


def test_a_slow_card_works_too_and_the_plan_says_what_it_costs(model: Make, cards: Make) -> None:
    p = plan(model("8b"), cards("A100-40GB", "RTX3090"))
    assert p.processes == 2
    assert any("device 1 (RTX3090) holds the others back" in r and "--max_devices 1" in r for r in p.reasons)
    workload, estimate = model("8b", max_devices=1)
    assert [d.name for d in DDP().plan(workload, cards("RTX3090", "A100-40GB"), estimate).devices] == ["A100-40GB"]


def test_nothing_fits_is_said_with_numbers(model: Make, cards: Make) -> None:
    workload, estimate = model("70b")
    p = DDP().plan(workload, cards("H100", "H100"), estimate)
    assert not p.fits
    assert p.reasons[0] == (
        "a replica needs 142.7 GiB a card at micro-batch 1 with checkpointing; the largest card, device 0 (H100), "
        "has 79.1 GiB free, 76.8 GiB of it usable"
    )
    verdict = DDP().assess(workload, cards("H100", "H100"), estimate)
    assert (verdict.fits, verdict.reason) == (False, p.reasons[0])


def test_four_bit_makes_it_fit(model: Make, cards: Make) -> None:
    p = plan(model("70b", four_bit=True), cards("H100", "H100"))
    assert (p.fits, p.processes) == (True, 2)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_global_batch_is_held_for_any_number_of_processes(model: Make, cpus: Make, count: int) -> None:
    p = plan(model("1b", global_batch=12), cpus(count, gib_each=64))
    assert (p.global_batch, p.processes) == (12, count)
    assert p.micro_batch * p.gradient_accumulation_steps * count == 12


def test_what_the_user_gave_is_kept(model: Make, cards: Make) -> None:
    given = {"micro_batch": 1, "gradient_accumulation_steps": 3, "gradient_checkpointing": "full"}
    p = plan(model("8b", **given), cards("H100", "H100"))
    assert (p.micro_batch, p.gradient_accumulation_steps, p.gradient_checkpointing) == (1, 3, "full")
    assert p.global_batch == 6


def test_offloaded_checkpointing_is_only_for_unsloth(model: Make, cards: Make) -> None:
    # Too long for no checkpointing; offloading spares memory and, in this estimator, costs no time.
    made = model("8b", engine="unsloth", sequence_length=16_384)
    assert plan(made, cards("H100")).gradient_checkpointing == "unsloth"
    made = model("8b", engine="transformers", sequence_length=16_384)
    assert plan(made, cards("H100")).gradient_checkpointing == "full"


def test_numbers_that_disagree_are_refused_only_where_a_replica_would_fit(model: Make, cards: Make) -> None:
    numbers = {"global_batch": 8, "micro_batch": 2, "gradient_accumulation_steps": 4}
    with pytest.raises(ConfigError, match=r"global_batch is 8, but 2 .* make 16"):
        plan(model("8b", **numbers), cards("H100", "H100"))
    p = plan(model("70b", **numbers), cards("H100", "H100"))
    assert not p.fits
    assert "a replica needs" in p.reasons[0]


def test_the_fastest_micro_batch_wins_where_the_host_is_slow(model: Make, cards: Make) -> None:
    workload, estimate = model("1b", sequence_length=128)
    hardware = cards("H100")
    slow_host = dataclasses.replace(estimate, host=1.0)
    assert DDP().plan(workload, hardware, slow_host).micro_batch == 8
    fast_host = dataclasses.replace(estimate, host=0.0)
    # Micro-batches of equal speed: the emptier card is preferred.
    assert DDP().plan(workload, hardware, fast_host).micro_batch == 1


def test_no_device_and_no_allowed_device_are_refused(model: Make, cards: Make) -> None:
    with pytest.raises(ConfigError, match="no device"):
        plan(model("1b"), Hardware(()))
    with pytest.raises(ConfigError, match="max_devices must be at least 1, not 0"):
        plan(model("1b", max_devices=0), cards("H100"))


def test_plan_survives_json(model: Make, cards: Make) -> None:
    p = plan(model("8b"), cards("H100", "H100"))
    assert Plan.from_json(p.to_json()) == p


def test_processes_without_a_row_are_named(model: Make, cards: Make) -> None:
    p = plan(model("1b", global_batch=2), cards("H100", "H100", "H100"))
    assert p.processes == 3
    said = next(r for r in p.reasons if "3 processes for a global batch of 2: 1 without a row" in r)
    assert "--max_devices 2" in said
    p = plan(model("1b", global_batch=3), cards("H100", "H100", "H100"))
    assert not any("without a row" in r for r in p.reasons)
