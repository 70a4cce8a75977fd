"""The board admits in index order, prefers backwards, never deadlocks, and ends at the first error."""

from __future__ import annotations

import os
import random
import threading
import time

import pytest

from strategies.board import Aborted, Board


def play(tokens: list[int], num_micro_batches: int, num_lanes: int, seed: int) -> list[tuple[int, int, bool]]:
    """Run the schedule with threads and random pauses; returns (segment, micro-batch, backward) as entered."""
    board = Board(tokens, num_micro_batches, num_lanes)
    entered: list[tuple[int, int, bool]] = []
    inside: list[int] = []
    chance = random.Random(seed)
    pauses = [chance.choice([0, 0, 0, 1e-5, 1e-4]) for _ in range(64)]

    def stay(segment: int, index: int, backward: bool, hold: bool = False) -> None:
        time.sleep(pauses[(7 * segment + 3 * index + backward) % 64])
        board.acquire(segment, index, backward)
        assert tokens[segment] not in inside
        inside.append(tokens[segment])
        entered.append((segment, index, backward))
        time.sleep(pauses[(5 * segment + 11 * index + backward) % 64])
        inside.remove(tokens[segment])
        board.release(segment, index, backward)

    def lane() -> None:
        try:
            while (index := board.take()) is not None:
                for segment in range(len(tokens)):
                    stay(segment, index, False)
                for segment in reversed(range(len(tokens) - 1)):
                    stay(segment, index, True)
        except BaseException as error:
            board.fail(error)

    threads = [threading.Thread(target=lane, daemon=True) for _ in range(num_lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "deadlock"
    if board.error is not None:
        raise board.error
    assert board.held == {}
    return entered


def test_every_segment_is_entered_in_index_order_in_every_interleaving() -> None:
    for seed in range(int(os.environ.get("PARALLEL_TUNE_INTERLEAVINGS", "400"))):
        chance = random.Random(seed)
        stages, lanes, count = chance.randint(1, 4), chance.randint(1, 5), chance.randint(1, 9)
        tokens = list(range(stages)) if chance.random() < 0.7 else [chance.randrange(stages) for _ in range(stages)]
        entered = play(tokens, count, lanes, seed)
        for segment in range(stages):
            assert [index for s, index, backward in entered if s == segment and not backward] == list(range(count))
        for segment in range(stages - 1):
            assert [index for s, index, backward in entered if s == segment and backward] == list(range(count))


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("lanes", [2, 3, 4])
def test_a_stage_hands_on_the_next_forward_before_it_goes_back_once_more(lanes: int, stages: int) -> None:
    """Threads run ahead of GPUs, which work in the order of issue: a backward that waits for the next GPU must not be
    issued before a forward that the next GPU waits for."""
    count = 8
    for seed in range(40):
        entered = play(list(range(stages)), count, lanes, seed)
        for stage in range(stages - 1):
            order = [(index, backward) for s, index, backward in entered if s == stage]
            ahead = min(lanes, stages - stage) - 1
            for index in range(count):
                assert order.index((min(index + ahead, count - 1), False)) < order.index((index, True))


def test_two_lanes_on_two_stages_have_one_order() -> None:
    for seed in range(60):
        entered = play([0, 1], 5, 2, seed)
        first = [f"{'B' if backward else 'F'}{index}" for s, index, backward in entered if s == 0]
        assert first == ["F0", "F1", "B0", "F2", "B1", "F3", "B2", "F4", "B3", "B4"]


def test_a_backward_whose_turn_it_is_goes_before_a_forward() -> None:
    board = Board([0, 1], 3, 2)
    board.acquire(0, 0, False)
    board.release(0, 0, False)
    board.acquire(0, 1, False)  # micro-batch 1 works at stage 0
    order: list[str] = []

    def enter(name: str, index: int, backward: bool) -> None:
        board.acquire(0, index, backward)
        order.append(name)
        board.release(0, index, backward)

    forward = threading.Thread(target=enter, args=("forward", 2, False))
    backward = threading.Thread(target=enter, args=("backward", 0, True))
    backward.start()
    while not board._backwards_waiting:
        time.sleep(0.001)
    forward.start()
    board.release(0, 1, False)
    forward.join()
    backward.join()
    assert order == ["backward", "forward"]


def test_a_backward_whose_turn_has_not_come_keeps_nobody_waiting() -> None:
    board = Board([0, 1], 2, 2)

    def wait() -> None:
        with pytest.raises(Aborted):
            board.acquire(0, 1, True)

    late = threading.Thread(target=wait)
    late.start()
    while not board._backwards_waiting:
        time.sleep(0.001)
    board.acquire(0, 0, False)
    board.fail(RuntimeError())
    late.join()


def test_a_failure_ends_all_who_wait_and_the_first_error_stays() -> None:
    board = Board([0, 1], 9, 4)
    board.acquire(0, 0, False)
    caught: list[BaseException] = []

    def wait(index: int) -> None:
        try:
            board.acquire(0, index, False)
        except Aborted as error:
            caught.append(error)

    threads = [threading.Thread(target=wait, args=(index,)) for index in (1, 2, 3)]
    for thread in threads:
        thread.start()
    first = RuntimeError("first")
    board.fail(first)
    board.fail(RuntimeError("second"))
    for thread in threads:
        thread.join()
    assert len(caught) == 3
    assert board.error is first
    assert board.take() is None
    assert board.held == {0: 0}
    board.drop(0)
    assert board.held == {}
