"""One gradient in every interleaving; failures and interrupts end all lanes and leave nothing behind."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from typing import Any

import pytest
import torch
from lane_steps import (
    CPU,
    CUTS,
    assert_at_rest,
    assert_same,
    batches,
    checkpointing,
    gradients,
    in_lanes,
    loss_of,
    naive,
    tiny,
)
from torch import Tensor, nn

from strategies.board import Board
from strategies.pipeline import Lanes
from strategies.stages import dissect, split


def overlaps(lanes: Lanes) -> bool:
    """Whether two lanes were in different stages at once."""
    segments = lanes.timeline()
    return any(
        a.stage != b.stage and a.micro_batch != b.micro_batch and a.start < b.end and b.start < a.end
        for a in segments
        for b in segments
    )


def test_two_lanes_are_in_different_stages_at_once() -> None:
    model = tiny()
    stages = split(model, CUTS[2], [CPU] * 2)
    layers = dissect(model).layers
    meeting = threading.Barrier(2)
    calls = {0: 0, 2: 0}

    def meet(layer: int, from_call: int) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            calls[layer] += 1
            if from_call <= calls[layer] < from_call + 3:
                meeting.wait(timeout=30)  # only passes when another lane stands at the other hook

        return hook

    with Lanes(stages, 2) as lanes:
        expected = in_lanes(lanes, model, batches(4))
        # Micro-batch i at stage 0 meets micro-batch i-1 at stage 1.
        handles = [layers[0].register_forward_pre_hook(meet(0, 2)), layers[2].register_forward_pre_hook(meet(2, 1))]
        assert_same(expected, in_lanes(lanes, model, batches(4)))
        assert overlaps(lanes)
        for handle in handles:
            handle.remove()
    with Lanes(stages, 1) as serial:
        assert_same(expected, in_lanes(serial, model, batches(4)))
        assert not overlaps(serial)
        done = [(s.stage, s.micro_batch, s.direction) for s in serial.timeline()]
    assert done == [
        step for i in range(4) for step in [(0, i, "forward"), (1, i, "forward+backward"), (0, i, "backward")]
    ]


def test_one_gradient_in_every_interleaving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random delays before each request for a token and before each hand-over. More by the environment variable."""
    chance = random.Random(11)
    acquire, release = Board.acquire, Board.release

    def pause() -> None:
        time.sleep(chance.choice([0, 0, 1e-5, 2e-4, 1e-3]))

    def slow_acquire(self: Board, segment: int, micro_batch: int, backward: bool) -> None:
        pause()
        acquire(self, segment, micro_batch, backward)

    def slow_release(self: Board, segment: int, micro_batch: int, backward: bool) -> None:
        pause()
        release(self, segment, micro_batch, backward)

    monkeypatch.setattr(Board, "acquire", slow_acquire)
    monkeypatch.setattr(Board, "release", slow_release)
    runs = int(os.environ.get("PARALLEL_TUNE_INTERLEAVINGS", "200")) // 4
    orders = set()
    for kind, count, mode in [("full", 3, "off"), ("tied", 4, "off"), ("lora", 2, "reentrant"), ("tied", 3, "off")]:
        model = tiny(kind, dropout=0.3 if (kind, count) == ("tied", 3) else 0.0)
        checkpointing(model, mode)
        stages = split(model, CUTS[count], [CPU] * count)
        with Lanes(stages, 1) as serial:
            model.zero_grad(set_to_none=True)
            expected = serial.run(batches(5), loss_of(model), key=1), gradients(model)
        for num_lanes in (2, 4):
            with Lanes(stages, num_lanes) as lanes:
                for _ in range((runs + 1) // 2):
                    model.zero_grad(set_to_none=True)
                    found = lanes.run(batches(5), loss_of(model), key=1), gradients(model)
                    assert_same(expected, found)
                    orders.add(tuple((s.stage, s.micro_batch, s.direction) for s in lanes.timeline()))
    assert len(orders) > runs / 2  # the schedules did differ


class InjectedError(Exception):
    """Raised on purpose."""


def test_a_hundred_failures_each_end_all_lanes_with_that_error_and_leave_nothing_behind() -> None:
    model = tiny("lora")
    checkpointing(model, "non-reentrant")
    expected = naive(model, batches(5))
    stages = split(model, CUTS[3], [CPU] * 3)
    chance = random.Random(5)
    countdown = [0]
    kinds = [InjectedError, KeyboardInterrupt, SystemExit, torch.OutOfMemoryError]
    raised: list[BaseException] = []

    def fail_at_last(*_: Any) -> None:
        countdown[0] -= 1
        if countdown[0] == 0:
            raised.append(chance.choice(kinds)("injected"))
            raise raised[-1]

    def fail_in_backward(_m: nn.Module, _i: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(fail_at_last)

    boards: list[Board] = []
    with Lanes(stages, 3) as lanes:
        assert_same(expected, in_lanes(lanes, model, batches(5)))
        for layer in dissect(model).layers:
            # Forward and its recomputation; and the backward pass itself.
            layer.mlp.register_forward_pre_hook(fail_at_last)
            layer.mlp.register_forward_hook(fail_in_backward)
        threads = threading.active_count()
        taken = Board.take

        def remember(board: Board) -> int | None:
            boards.append(board)
            return taken(board)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Board, "take", remember)
            for _ in range(100):
                countdown[0] = chance.randint(1, 50)
                with pytest.raises(BaseException) as caught:
                    in_lanes(lanes, model, batches(5))
                assert caught.value is raised[-1]
                assert boards[-1].held == {}
                assert_at_rest(lanes)
                assert threading.active_count() == threads
                countdown[0] = 0
        for _ in range(3):
            assert_same(expected, in_lanes(lanes, model, batches(5)))
    assert len(raised) == 100
    assert {type(error) for error in raised} == set(kinds)


def test_each_failure_is_followed_by_a_right_step() -> None:
    model = tiny("tied")
    expected = naive(model, batches(4))
    stages = split(model, CUTS[2], [CPU] * 2)
    for failing in range(4):
        with Lanes(stages, 2) as lanes:

            def forward(index: int, batch: Any, failing: int = failing) -> Tensor:
                loss: Tensor = model(**batch, use_cache=False).loss
                if index == failing and threading.current_thread() is not threading.main_thread():
                    raise InjectedError(index)
                return loss

            with pytest.raises(InjectedError, match=str(failing)):
                lanes.run(batches(4), forward)
            assert_same(expected, in_lanes(lanes, model, batches(4)))


def test_an_interrupt_of_the_main_thread_ends_the_lanes() -> None:
    model = tiny()
    expected = naive(model, batches(4))
    with Lanes(split(model, CUTS[2], [CPU] * 2), 2) as lanes:
        assert_same(expected, in_lanes(lanes, model, batches(4)))
        interrupted = threading.Event()

        def forward(index: int, batch: Any) -> Tensor:
            if index == 1:
                signal.raise_signal(signal.SIGINT)
                while not lanes._job or lanes._job.course.board.error is None:
                    time.sleep(0.001)
                interrupted.set()
            loss: Tensor = model(**batch, use_cache=False).loss
            return loss

        with pytest.raises(KeyboardInterrupt):
            lanes.run(batches(4), forward)
        assert interrupted.is_set()
        assert_at_rest(lanes)
        assert_same(expected, in_lanes(lanes, model, batches(4)))
