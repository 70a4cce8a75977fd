"""Captured stages: gradients of the naive run to the bit, in any number of lanes; what cannot be captured runs eagerly.

A CPU has no CUDA graphs; `OperationTape` takes their place, which repeats operations and nothing of Python.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lane_steps import CPU, CUTS, assert_at_rest, assert_same, batches, gradients, in_lanes, loss_of, naive, tiny
from op_tape import OperationTape
from torch import Tensor
from toy_model import Toy

from parallel_tune import chunked_loss
from parallel_tune.fused_head import use_chunked_loss
from parallel_tune.row_attention import use_row_attention
from strategies.pipeline import Lanes
from strategies.stage_capture import StageCapture
from strategies.stages import Stages, split
from strategies.visit import Visit


def maskless(kind: str = "lora", **more: Any) -> Any:
    """A tiny model whose forward reads nothing on the host."""
    model = tiny(kind, **more)
    use_row_attention(model)
    return model


def captured_of(stages: Stages) -> tuple[StageCapture, OperationTape]:
    tape = OperationTape()
    return StageCapture(stages, lambda: [p for p in stages.model.parameters() if p.requires_grad], tape), tape


def crossings(stages: Stages) -> list[tuple[int, int]]:
    return [(count.forward, count.backward) for count in stages.crossings]


@pytest.mark.parametrize("kind", ["lora", "full", "tied"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_gradients_are_bitwise_the_naive_ones(count: int, kind: str) -> None:
    model = maskless(kind)
    stages = split(model, CUTS[count], [CPU] * count)
    for num_lanes, num_batches in ((1, 4), (2, 7), (count + 1, 9), (5, 3)):
        inputs = batches(num_batches)
        expected = naive(model, inputs)
        captured, tape = captured_of(stages)
        with Lanes(stages, num_lanes, captured=captured) as lanes:
            for calls in range(1, 4):
                before = crossings(stages)
                assert_same(expected, in_lanes(lanes, model, inputs))
                crossed = [(f - b[0], r - b[1]) for (f, r), b in zip(crossings(stages), before, strict=True)]
                assert crossed == [(num_batches, num_batches)] * (count - 1)
                assert len(lanes.timeline()) == num_batches * (2 * count - 1)
                assert captured.report.elements == calls * sum(batch["input_ids"].numel() for batch in inputs)
            assert_at_rest(lanes)
        report = captured.report
        assert (report.reason, report.gradient_error) == (None, 0.0)
        assert report.sizes == [4, 5, 6]
        assert report.replayed_elements >= 2 * report.elements // 3
        assert tape.passes == 3 * num_lanes


@pytest.mark.parametrize("kind", ["lora", "tied"])
def test_a_loss_by_chunks_is_captured_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads nothing on the host, and its gradients, made in the forward pass, are made anew in each replay."""
    monkeypatch.setattr(chunked_loss, "FUSED_CHUNK_ROWS", 3)
    model = maskless(kind)
    inputs = batches(7)
    plain, _ = naive(model, inputs)
    stages = split(model, CUTS[2], [CPU] * 2)
    row = {name: tensor[0].tolist() for name, tensor in inputs[0].items()}
    use_chunked_loss(model, [row], SimpleNamespace(device=CPU), torch.float32)  # type: ignore[arg-type, list-item]
    expected = naive(model, inputs)
    torch.testing.assert_close(expected[0], plain, rtol=1e-6, atol=0.0)
    captured, _ = captured_of(stages)
    with Lanes(stages, 2, captured=captured) as lanes:
        for _ in range(3):
            assert_same(expected, in_lanes(lanes, model, inputs))
    assert captured.report.reason is None and captured.report.replayed_elements > 0


def test_a_size_is_recorded_when_it_comes_again_and_eager_micro_batches_keep_their_place() -> None:
    model = maskless()
    stages = split(model, CUTS[2], [CPU] * 2)
    captured, _ = captured_of(stages)
    first, later = batches(1), batches(5)
    with Lanes(stages, 2, captured=captured) as lanes:
        assert_same(naive(model, first), in_lanes(lanes, model, first))
        assert (captured.report.recordings, captured.report.replayed_elements) == (0, 0)
        assert_same(naive(model, later), in_lanes(lanes, model, later))
        # Of 4, 5, 6, 4 and 5 tokens: 4 came again, and 5 came twice, 6 alone was run eagerly.
        assert captured.report.sizes == [4, 5]
        assert captured.report.replayed_elements == 4 + 5 + 4 + 5


def test_gradients_accumulate_over_calls_and_training_goes_on() -> None:
    model, other = maskless(), maskless()
    stages = split(model, CUTS[3], [CPU] * 3)
    captured, _ = captured_of(stages)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.05) for each in (model, other)]
    inputs = batches(5)
    with Lanes(stages, 3, captured=captured) as lanes:
        for _ in range(4):
            assert_same(naive(other, inputs, calls=2), in_lanes(lanes, model, inputs, calls=2))
            for optimizer in optimizers:
                optimizer.step()
    assert captured.report.replayed_elements > 0
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("count", "late"), [(2, False), (2, True), (3, False)])
def test_several_tensors_cross_and_some_come_late(count: int, late: bool) -> None:
    model = Toy(late=late)
    stages = split(model, CUTS[count], [CPU] * count)
    inputs = [{"ids": batch["input_ids"]} for batch in batches(6)]
    losses = []
    for batch in inputs:
        loss = model(batch["ids"])
        loss.backward()
        losses.append(loss.detach())
    expected = losses, gradients(model)
    assert expected[1]["inner.side.weight"] is not None
    captured, tape = captured_of(stages)
    with Lanes(stages, 2, captured=captured) as lanes:
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            found = lanes.run(inputs, lambda _, batch: model(batch["ids"])), gradients(model)
            assert_same(expected, found)
    assert captured.report.reason is None and captured.report.replayed_elements > 0
    # Of the late ones the last stage's recording has two pieces.
    assert tape.recorded[:count].count((0, count - 1)) == 1
    assert tape.recorded.count((0, count - 1)) == 3 * (2 if late else 1)


def test_random_delays_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = maskless("tied")
    stages = split(model, CUTS[3], [CPU] * 3)
    inputs = batches(6)
    expected = naive(model, inputs)
    go, draws = Visit.go, random.Random(0)

    def delayed(self: Visit, stage: int, backward: bool) -> None:
        time.sleep(draws.random() * 0.002)
        go(self, stage, backward)

    monkeypatch.setattr(Visit, "go", delayed)
    captured, _ = captured_of(stages)
    with Lanes(stages, 3, captured=captured) as lanes:
        for _ in range(30):
            assert_same(expected, in_lanes(lanes, model, inputs))
    assert captured.report.replayed_elements == captured.report.elements


def test_a_model_that_reads_a_value_is_run_eagerly_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("lora")  # transformers looks at positions from the host to make its masks
    stages = split(model, CUTS[2], [CPU] * 2)
    captured, tape = captured_of(stages)
    inputs = batches(6)
    expected = naive(model, inputs)
    with caplog.at_level(logging.WARNING), Lanes(stages, 2, captured=captured) as lanes:
        for _ in range(3):
            assert_same(expected, in_lanes(lanes, model, inputs))
        assert len(lanes.timeline()) == 6 * 3
    assert captured.report.reason is not None
    assert captured.report.reason.startswith("a stage cannot be captured: RuntimeError: aten._local_scalar_dense")
    assert (captured.report.replayed_elements, tape.forgotten, tape.passes) == (0, True, 1)
    assert caplog.text.count("steps are no longer captured") == 1


def test_a_recording_that_took_values_for_constant_is_found_out() -> None:
    model = maskless()
    stages = split(model, CUTS[2], [CPU] * 2)
    captured, _ = captured_of(stages)

    def forward(_: int, batch: Any) -> Tensor:
        seen = int(batch["input_ids"].numpy()[0, 0])  # past the tape, as a value kept on the host would be
        return model(**batch, use_cache=False).loss * seen  # type: ignore[no-any-return]

    inputs = batches(6)
    losses = []
    for index, batch in enumerate(inputs):
        loss = forward(index, batch)
        loss.backward()
        losses.append(loss.detach())
    expected = losses, gradients(model)
    with Lanes(stages, 2, captured=captured) as lanes:
        model.zero_grad(set_to_none=True)
        assert_same(expected, (lanes.run(inputs, forward), gradients(model)))
    assert captured.report.reason is not None
    assert "off those of the same step run eagerly" in captured.report.reason


def test_what_a_replay_raises_ends_the_lanes_and_the_next_step_is_right() -> None:
    model = maskless()
    stages = split(model, CUTS[2], [CPU] * 2)
    inputs = batches(6)
    expected = naive(model, inputs)
    captured, _ = captured_of(stages)
    with Lanes(stages, 2, captured=captured) as lanes:
        in_lanes(lanes, model, inputs)
        recording = captured.recording(1, 0)
        assert recording is not None
        piece = recording._segments[1].pieces[0]
        repeat = piece.repeat

        def failing() -> None:
            raise RuntimeError("the device is lost")

        for lane in range(2):
            other = captured.recording(lane, 0)
            assert other is not None
            other._segments[1].pieces[0].repeat = failing
        with pytest.raises(RuntimeError, match="the device is lost"):
            in_lanes(lanes, model, inputs)
        assert_at_rest(lanes)
        piece.repeat = repeat
        other = captured.recording(0, 0)
        assert other is not None
        captured._recordings = {
            signature: [each[1], each[1]] if each[0] is other else each
            for signature, each in captured._recordings.items()
        }
        with Lanes(stages, 1, captured=captured) as alone:
            assert_same(expected, in_lanes(alone, model, inputs))


@pytest.mark.parametrize("more", [{"row_lengths": [4]}, {"scale": torch.ones((), device="meta")}])
def test_what_cannot_be_copied_to_a_stage_is_run_eagerly(more: dict[str, Any]) -> None:
    model = maskless()
    stages = split(model, CUTS[2], [CPU] * 2)
    captured, tape = captured_of(stages)
    inputs: Sequence[Any] = [batch | more for batch in batches(4)]

    def forward(_: int, batch: Any) -> Tensor:
        wanted = {name: value for name, value in batch.items() if name not in more}
        return loss_of(model)(0, wanted)  # type: ignore[no-any-return]

    expected = naive(model, batches(4))
    with Lanes(stages, 2, captured=captured) as lanes:
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            assert_same(expected, (lanes.run(inputs, forward), gradients(model)))
    assert (captured.report.recordings, captured.report.reason, tape.passes) == (0, None, 0)


def test_dropout_is_not_captured() -> None:
    model = maskless(dropout=0.3)
    stages = split(model, CUTS[2], [CPU] * 2)
    captured, _ = captured_of(stages)
    with Lanes(stages, 2) as lanes:
        expected = lanes.run(batches(4), loss_of(model), key=3), gradients(model)
        model.zero_grad(set_to_none=True)
    with Lanes(stages, 2, captured=captured) as lanes:
        assert_same(expected, (lanes.run(batches(4), loss_of(model), key=3), gradients(model)))
    assert captured.report.reason is not None and "random numbers" in captured.report.reason


def test_a_graph_that_cannot_be_cut_is_not_captured() -> None:
    model = Toy(leak=True)
    stages = split(model, CUTS[3], [CPU] * 3)
    captured, tape = captured_of(stages)
    with Lanes(stages, 2, captured=captured) as lanes:
        for _ in range(2):
            lanes.run([{"ids": batch["input_ids"]} for batch in batches(4)], lambda _, batch: model(batch["ids"]))
    assert captured.report.reason is not None
    assert captured.report.reason.startswith("the model's graph cannot be cut: stage 2 sends a gradient to")
    assert tape.passes == 0


def test_without_gradients_nothing_is_recorded() -> None:
    model = maskless()
    stages = split(model, CUTS[2], [CPU] * 2)
    captured, tape = captured_of(stages)
    with Lanes(stages, 2, captured=captured) as lanes:
        with torch.no_grad():
            for _ in range(2):
                losses = lanes.run(batches(4), loss_of(model))
        assert tape.passes == 0 and all(p.grad is None for p in model.parameters())
        assert_same(naive(model, batches(4)), in_lanes(lanes, model, batches(4)))
        assert torch.equal(torch.stack(losses), torch.stack(naive(model, batches(4))[0]))
        assert tape.passes > 0
