"""Lanes compute bit for bit what one micro-batch after the other computes, whatever the threads do."""

from __future__ import annotations

import copy
import gc
import os
import threading
import weakref
from collections.abc import Sequence
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
from torch import Tensor

from strategies.pipeline import Lanes
from strategies.randomness import generator_of, seed_of
from strategies.stages import Stages, dissect, split

THOROUGH = "PARALLEL_TUNE_INTERLEAVINGS" in os.environ


@pytest.mark.parametrize("mode", ["off", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("kind", ["full", "lora", "tied"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_gradients_are_bitwise_the_naive_ones(count: int, kind: str, mode: str) -> None:
    model = tiny(kind)
    checkpointing(model, mode)
    sizes = range(1, 10) if THOROUGH else (1, 4, 9)
    expected = {size: naive(model, batches(size)) for size in sizes}
    stages = split(model, CUTS[count], [CPU] * count)
    for num_lanes in range(1, 6):
        with Lanes(stages, num_lanes) as lanes:
            for size in sizes:
                before = [(c.forward, c.backward) for c in stages.crossings]
                assert_same(expected[size], in_lanes(lanes, model, batches(size)))
                after = [(c.forward, c.backward) for c in stages.crossings]
                assert after == [(f + size, b + size) for f, b in before]
            assert lanes.reason is None
            assert_at_rest(lanes)


@pytest.mark.parametrize("config", ["Qwen3Config", "Gemma3TextConfig", "MistralConfig"])
def test_other_families(config: str) -> None:
    more = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"] * 2}
    model = tiny("tied", config=config, **(more if config == "Gemma3TextConfig" else {}))
    expected = naive(model, batches(5))
    with Lanes(split(model, CUTS[3], [CPU] * 3), 3) as lanes:
        assert_same(expected, in_lanes(lanes, model, batches(5)))
        assert lanes.reason is None


def test_one_stage() -> None:
    model = tiny()
    expected = naive(model, batches(3))
    with Lanes(split(model, [0], [CPU]), 2) as lanes:
        assert_same(expected, in_lanes(lanes, model, batches(3)))


@pytest.mark.parametrize("frozen", [[0], [1], [2], [0, 1], [1, 2], [0, 2], [0, 1, 2]])
@pytest.mark.parametrize("mode", ["off", "non-reentrant"])
def test_stages_without_trained_weights(frozen: list[int], mode: str) -> None:
    model = tiny()
    stages = split(model, CUTS[3], [CPU] * 3)
    for stage in frozen:
        for parameter in stages.parameters[stage].values():
            parameter.requires_grad_(False)
    if mode != "off":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if frozen == [0, 1, 2]:
        with Lanes(stages, 2) as lanes:
            assert len(lanes.run(batches(3), loss_of(model))) == 3
        return
    expected = naive(model, batches(4))
    with Lanes(stages, 2) as lanes:
        assert_same(expected, in_lanes(lanes, model, batches(4)))


def test_gradients_accumulate_over_calls_and_weights_stay_equal_over_steps() -> None:
    model = tiny("tied")
    other = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (model, other)]
    with Lanes(split(model, CUTS[3], [CPU] * 3), 3) as lanes:
        for _ in range(3):
            assert_same(naive(other, batches(4), calls=2), in_lanes(lanes, model, batches(4), calls=2))
            for optimizer in optimizers:
                optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_trained_tied_weight_is_copied_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not change between optimizer steps, of which no count of torch's knows: bitsandbytes writes past it."""
    from strategies import visit

    model = tiny("tied")
    weight = model.get_input_embeddings().weight
    copied: list[int] = []

    def copies_on(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        copied.extend(tensor.numel() for tensor in tensors if tensor.shape == weight.shape)
        return original(tensors, device)

    original = visit.copies_on
    monkeypatch.setattr(visit, "copies_on", copies_on)
    with Lanes(split(model, CUTS[3], [CPU] * 3), 3) as lanes:
        for run in (1, 2):
            assert_same(naive(model, batches(5)), in_lanes(lanes, model, batches(5)))
            assert len(copied) == run
            assert lanes._course is not None
            assert not lanes._course.lent  # its memory is the optimizer's
            version = weight._version
            weight.detach().numpy()[:] *= 0.9
            assert weight._version == version


@pytest.mark.parametrize("mode", ["off", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_dropout_masks_are_those_of_the_naive_run_with_the_same_seeds(kind: str, mode: str) -> None:
    """The reference is the split model, uncut, with each stage's part of a micro-batch seeded alike."""
    model = tiny(kind, dropout=0.3)
    checkpointing(model, mode)
    stages = split(model, CUTS[3], [CPU] * 3)

    class Seeding:
        def cross(self, stage: int, tensors: Sequence[Tensor], late: bool) -> Sequence[Tensor]:
            if not late:
                generator_of(CPU).manual_seed(seed_of(5, 1, self.index, stage))
            return stages.cross(stage, tensors, late)

        def lend(self, weight: Tensor, device: torch.device) -> Tensor:
            return stages.lend(weight, device)

        index = 0

    losses = []
    seeding = Seeding()
    for seeding.index, batch in enumerate(batches(6)):
        generator_of(CPU).manual_seed(seed_of(5, 1, seeding.index, 0))
        with stages.carried_by(seeding):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    expected = losses, gradients(model)

    state = torch.get_rng_state()
    for num_lanes in (1, 2, 4):
        with Lanes(stages, num_lanes, seed=5) as lanes:
            assert_same(expected, in_lanes(lanes, model, batches(6)))
            other = lanes.run(batches(6), loss_of(model), key=2)
            assert not all(torch.equal(a, b) for a, b in zip(losses, other, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_without_gradients_then_training_finds_the_dropout() -> None:
    model = tiny(dropout=0.3).eval()
    stages = split(model, CUTS[2], [CPU] * 2)
    with Lanes(stages, 2) as lanes:
        with torch.no_grad():
            evaluated = lanes.run(batches(3), loss_of(model))
            assert all(torch.equal(a, loss_of(model)(0, b)) for a, b in zip(evaluated, batches(3), strict=True))
        assert all(parameter.grad is None for parameter in model.parameters())
        model.train()
        first, second = (lanes.run(batches(3), loss_of(model), key=1) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_lanes_work_under_the_callers_autocast_hooks_and_context() -> None:
    model = tiny()
    packed: list[str] = []

    def both() -> tuple[Any, Any]:
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        return torch.autocast("cpu", dtype=torch.bfloat16), hooks

    def pack(tensor: Tensor) -> Tensor:
        packed.append(threading.current_thread().name)
        return tensor

    autocast, hooks = both()
    with autocast, hooks:
        expected = naive(model, batches(4))
    with Lanes(split(model, CUTS[3], [CPU] * 3), 2) as lanes:
        autocast, hooks = both()
        with autocast, hooks:
            found = in_lanes(lanes, model, batches(4))
        assert lanes.reason is None
        assert_same(expected, found)
        assert {"lane-0"} <= set(packed)
        assert_same(naive(model, batches(2)), in_lanes(lanes, model, batches(2)))


def test_no_graph_is_kept_alive_by_lanes_that_rest() -> None:
    model = tiny("tied")
    seen: list[weakref.ref[Tensor]] = []

    def forward(index: int, batch: Any) -> Tensor:
        output = model(**batch, use_cache=False)
        seen.append(weakref.ref(output.logits))
        loss: Tensor = output.loss
        return loss

    with Lanes(split(model, CUTS[3], [CPU] * 3), 3) as lanes:
        lanes.run(batches(6), forward)
        gc.collect()
        assert len(seen) == 7
        assert all(reference() is None for reference in seen)


def test_checkpoint_functions_come_back_at_close() -> None:
    model = tiny()
    checkpointing(model, "reentrant")
    before = [module._gradient_checkpointing_func for module in dissect(model).layers]
    with Lanes(split(model, CUTS[2], [CPU] * 2), 2) as lanes:
        lanes.run(batches(1), loss_of(model))
        assert all(module._gradient_checkpointing_func not in before for module in dissect(model).layers)
    assert [module._gradient_checkpointing_func for module in dissect(model).layers] == before
    lanes.close()
    assert not any(thread.name.startswith("lane-") for thread in threading.enumerate())
    with pytest.raises(RuntimeError, match="closed"):
        lanes.run(batches(1), loss_of(model))


def test_modules_are_searched_once_and_checkpoints_switched_on_later_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("lora")
    with Lanes(split(model, CUTS[2], [CPU] * 2), 2) as lanes:
        lanes.run(batches(1), loss_of(model))
        checkpointing(model, "reentrant")
        own = dissect(model).layers[0]._gradient_checkpointing_func
        monkeypatch.setattr(type(model), "modules", lambda self: pytest.fail("all modules are walked through again"))
        lanes.run(batches(1), loss_of(model))
        assert all(module._gradient_checkpointing_func is not own for module in dissect(model).layers)
    assert all(module._gradient_checkpointing_func is own for module in dissect(model).layers)


def moe(auxiliary: bool) -> Any:
    more = {"num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": auxiliary}
    return tiny(config="MixtralConfig", **more)


def test_router_logits_of_earlier_stages_forbid_the_cut() -> None:
    model = moe(auxiliary=True)
    stages = split(model, CUTS[2], [CPU] * 2)
    expected = naive(model, batches(3))
    with Lanes(stages, 2) as lanes:
        assert_same(expected, in_lanes(lanes, model, batches(3)))
        assert lanes.reason is not None and lanes.reason.endswith("on model.layers.1.mlp.gate.weight")
        assert "stage 1 uses a result of stage 0 past its inputs" in lanes.reason


def test_experts_without_auxiliary_loss_run_in_lanes() -> None:
    model = moe(auxiliary=False)
    stages: Stages = split(model, CUTS[2], [CPU] * 2)
    expected = naive(model, batches(3))
    with Lanes(stages, 2) as lanes:
        assert_same(expected, in_lanes(lanes, model, batches(3)))
        assert lanes.reason is None


def test_the_number_of_lanes_is_checked() -> None:
    with pytest.raises(ValueError, match="num_lanes must be at least 1, not 0"):
        Lanes(split(tiny(), [0], [CPU]), 0)
