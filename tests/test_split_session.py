"""The session of a split: its schedule, under a gradient scaler and after errors, and what it reports."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lane_steps import batches, gradients, loss_of, tiny

from strategies.contracts import DevicePlan, MemoryEstimate, Plan
from strategies.sessions import SplitSession, open_split

LAYERS = [(0, 0), (1, 2), (3, 3)]


def plan_of(lanes: int) -> Plan:
    memory = MemoryEstimate(1, 1, 1, 1, 1, 1)
    devices = tuple(
        DevicePlan(index, "CPU", "cpu", 1 << 30, 1 << 30, 6, 6, layers, memory) for index, layers in enumerate(LAYERS)
    )
    return Plan("model_parallel", True, "transformers", 1, devices, {}, 1, 4, 4, "none", 1.0, lanes=lanes)


def session_of(model: Any, lanes: int) -> SplitSession:
    session = open_split(plan_of(lanes))
    session.place(model)
    return session


def step(session: SplitSession, model: Any, backward: Callable[[Any], None] = torch.Tensor.backward) -> Any:
    model.zero_grad(set_to_none=True)
    assert session.schedule is not None
    losses = session.schedule.run(batches(4), loss_of(model), backward=backward)
    return losses, gradients(model)


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_a_scaled_loss_gives_scaled_gradients_and_an_overflow_is_skipped(lanes: int) -> None:
    """As a Trainer in float16 does: scale, backward, unscale, clip, and no step where some gradient overflowed."""

    def train(scale: float, backward_in: int) -> tuple[dict[str, torch.Tensor], float, float]:
        model = tiny("lora")
        session = session_of(model, backward_in)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        try:
            for _ in range(2):
                step(session, model, lambda loss: scaler.scale(loss).backward())
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                scaler.step(optimizer)
                scaler.update()
        finally:
            session.close()
        weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        return weights, float(norm), scaler.get_scale()

    expected, norm, scale = train(1024.0, 1)
    found, same_norm, same_scale = train(1024.0, lanes)
    assert (norm, scale) == (same_norm, same_scale) and scale == 1024.0
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    start = {name: p.detach().clone() for name, p in tiny("lora").named_parameters() if p.requires_grad}
    overflown, _, halved = train(3e38, lanes)
    assert halved == pytest.approx(3e38 / 4)
    assert all(torch.equal(start[name], overflown[name]) for name in start)


@pytest.mark.parametrize("lanes", [1, 2])
def test_after_an_error_the_next_step_is_right_and_nothing_is_left_running(lanes: int) -> None:
    before = threading.active_count()
    model = tiny()
    session = session_of(model, lanes)
    assert session.schedule is not None
    try:
        losses, expected = step(session, model)
        kept = {name: gradient.clone() for name, gradient in expected.items() if gradient is not None}

        def broken(index: int, batch: Any) -> torch.Tensor:
            if index == 2:
                raise ZeroDivisionError("in a forward")
            return loss_of(model)(index, batch)  # type: ignore[no-any-return]

        for error in (ZeroDivisionError, KeyboardInterrupt):
            with pytest.raises(error):
                if error is ZeroDivisionError:
                    session.schedule.run(batches(4), broken, backward=torch.Tensor.backward)
                else:
                    session.schedule.run(batches(4), loss_of(model), backward=_interrupted)
            assert session.schedule.timeline() == []
        again, found = step(session, model)
        assert all(torch.equal(a, b) for a, b in zip(losses, again, strict=True))
        assert all(torch.equal(kept[name], found[name]) for name in kept)
    finally:
        session.close()
    assert threading.active_count() == before


def _interrupted(_: torch.Tensor) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("lanes", [1, 3])
def test_the_report_tells_busy_shares_and_stage_seconds(lanes: int) -> None:
    model = tiny()
    session = session_of(model, lanes)
    try:
        for _ in range(5):
            step(session, model)
        told = session.report()
    finally:
        session.close()
    assert (told["lanes"], told["lanes_reason"]) == (lanes, None)
    assert [0 < stage["busy_share"] < 1 for stage in told["stages"]] == [True] * 3
    assert len(told["timeline"]) == 4 * 5
    assert told["stage_seconds"]["steps"] == 3
    assert all(seconds > 0 for seconds in told["stage_seconds"]["seconds"])
    assert open_split(plan_of(lanes)).report() == {}
