"""A captured step's gradients are the eager ones, what cannot be captured is run eagerly and said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from strategies.gradients import FlatGradients
from strategies.replay import Replay


class Again:
    """What a CUDA graph does, on a CPU: the work is not done when recorded, and later repeated on the same tensors."""

    def __init__(self) -> None:
        self.recorded = 0
        self.done: list[str] = []

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        self.done.append("record")
        result = torch.zeros(())

        def replay() -> None:
            result.copy_(work())

        return replay, result

    def make_room(self) -> None:
        self.done.append("make room")

    def forget(self) -> None:
        self.forgotten = True


class Constant(Again):
    """Records the host's values, as a model that reads a tensor while it is captured does."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        gradients = [parameter.grad for parameter in self.parameters]
        before = [gradient.clone() for gradient in gradients]
        result = work()
        found = [gradient - old for gradient, old in zip(gradients, before, strict=True)]
        for gradient, old in zip(gradients, before, strict=True):
            gradient.copy_(old)

        def replay() -> None:
            for gradient, one in zip(gradients, found, strict=True):
                gradient.add_(one)

        return replay, result

    def __init__(self, parameters: list[Any]) -> None:
        super().__init__()
        self.parameters = parameters


class Refusing(Again):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        raise self.error


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def forward_of(model: torch.nn.Module) -> Callable[[int, Any], Tensor]:
    def forward(_: int, batch: Any) -> Tensor:
        loss: Tensor = (model(batch["x"]) - batch["y"]).square().sum() / batch["count"]
        return loss

    return forward


def steps(count: int, lengths: tuple[int, ...] = (4, 4, 3)) -> list[list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    return [
        [
            {
                "x": torch.randn(rows, 6, generator=generator),
                "y": torch.randn(rows, 1, generator=generator),
                "count": torch.tensor(float(sum(lengths))),
            }
            for rows in lengths
        ]
        for _ in range(count)
    ]


def train(model: torch.nn.Module, data: list[list[dict[str, Any]]], replay: Replay | None) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    forward, losses = forward_of(model), []
    for micro_batches in data:
        if replay is None:
            step_losses = []
            for index, batch in enumerate(micro_batches):
                loss = forward(index, batch)
                loss.backward()
                step_losses.append(loss.detach())
        else:
            step_losses = replay.run(micro_batches, forward, backward=lambda loss: loss.backward())
        losses.append(float(sum(step_losses)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


def replay_of(model: torch.nn.Module, recorder: Any) -> Replay:
    return Replay(lambda: list(model.parameters()), torch.device("cpu"), recorder)


def test_losses_and_weights_are_the_eager_ones_to_the_bit() -> None:
    data = steps(12)
    plain, captured = build(), build()
    recorder = Again()
    replay = replay_of(captured, recorder)
    assert train(captured, data, replay) == train(plain, data, None)
    for ours, theirs in zip(captured.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    report = replay.report
    assert (report.reason, recorder.recorded, report.recordings) == (None, 2, 2)
    # The first step's two alike record the larger shape, so all but two of 24; the smaller one takes two steps.
    assert report.replayed_elements == 6 * (4 * 22 + 3 * 10)
    assert report.elements == 6 * 11 * 12
    assert report.gradient_error < 1e-6
    assert report.sizes == [18, 24]


def test_the_check_of_a_recording_pins_no_block_of_an_eager_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is made, then copies are taken, then the eager pass runs and is recorded; nothing is copied after it."""
    model, recorder = build(), Again()
    copy = FlatGradients.copy

    def noted(gradients: FlatGradients) -> list[Tensor]:
        recorder.done.append("copy")
        return copy(gradients)

    monkeypatch.setattr(FlatGradients, "copy", noted)
    model.register_forward_pre_hook(lambda *_: recorder.done.append("forward"))
    train(model, steps(1, lengths=(4, 4)), replay_of(model, recorder))
    eager, again = ["forward"], ["forward"]  # the recorder here runs the model when it replays
    assert recorder.done == [*eager, "make room", "copy", "copy", *eager, "record", *again, "make room"]


def test_gradients_are_compared_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategies.gradients.PIECE_ELEMENTS", 5)
    model = build()
    gradients = FlatGradients(list(model.parameters()))
    gradients.begin()
    for parameter in model.parameters():
        parameter.grad = parameter.grad.add_(2.0)  # type: ignore[union-attr]
    kept = gradients.copy()
    assert gradients.distance(kept) == 0
    assert gradients.distance([values * 2 for values in kept]) == pytest.approx(0.5)
    assert gradients.distance([values * 0 for values in kept]) == float("inf")
    gradients.begin()
    gradients.copy_to(kept)
    assert all(not values.any() for values in kept)


def test_what_holds_more_than_tensors_is_run_eagerly() -> None:
    data: Any = steps(4)
    for micro_batches in data:
        for batch in micro_batches:
            batch["row_lengths"] = [1]
    plain, captured = build(), build()
    replay = replay_of(captured, Again())
    assert train(captured, data, replay) == train(plain, data, None)
    assert (replay.report.recordings, replay.report.reason) == (0, None)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("stream is capturing\nsecond line"), "RuntimeError: stream is capturing"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_a_step_that_cannot_be_captured_is_run_eagerly_and_said(error: Exception, told: str) -> None:
    data = steps(6)
    plain, captured = build(), build()
    recorder = Refusing(error)
    replay = replay_of(captured, recorder)
    assert train(captured, data, replay) == train(plain, data, None)
    assert replay.report.reason == f"the step cannot be captured: {told}"
    assert recorder.forgotten


def test_gradients_that_overflow_are_no_reason_to_give_up() -> None:
    data = steps(6, lengths=(4,))
    model = build()
    replay = replay_of(model, Again())
    forward = forward_of(model)
    for number, (batch,) in enumerate(data):
        if number == 1:
            batch["y"][0] = float("inf")
        replay.run([batch], forward, backward=lambda loss: loss.backward())
    assert (replay.report.reason, replay.report.recordings) == (None, 1)
    assert replay.report.replayed_elements == 3 * 24


def test_a_recording_that_took_values_for_constant_is_found_out() -> None:
    data = steps(6)
    plain, captured = build(), build()
    replay = replay_of(captured, Constant(list(captured.parameters())))
    assert train(captured, data, replay) == train(plain, data, None)
    assert replay.report.reason is not None
    assert "off those of the same step run eagerly" in replay.report.reason
    assert replay.report.recordings == 0


def test_an_error_in_a_forward_pass_is_the_users_to_see() -> None:
    model = build()
    replay = replay_of(model, Again())

    def failing(_: int, batch: Any) -> Tensor:
        raise ValueError("bad rows")

    with pytest.raises(ValueError, match="bad rows"):
        replay.run(steps(1)[0], failing, backward=lambda loss: loss.backward())


def test_flat_gradients_of_several_dtypes_are_views_that_stay() -> None:
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))]
    flat = FlatGradients(parameters, world_size=1)
    flat.begin()
    addresses = [parameter.grad.data_ptr() for parameter in parameters if parameter.grad is not None]
    (parameters[0].sum() * 2 + parameters[1].sum()).backward()
    kept = flat.copy()
    for parameter in parameters:
        parameter.grad = None
    flat.begin()
    assert [parameter.grad.data_ptr() for parameter in parameters if parameter.grad is not None] == addresses
    assert all(bool((parameter.grad == 0).all()) for parameter in parameters if parameter.grad is not None)
    flat.restore(kept)
    assert [buffer.tolist() for buffer in kept] == [[2.0] * 3, [1.0] * 4]
    assert flat.distance(kept) == 0.0
