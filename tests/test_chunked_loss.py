"""The loss that goes through the logits chunk by chunk is transformers' own, gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from parallel_tune import chunked_loss as module
from parallel_tune.chunked_loss import Form, chunked_loss
from parallel_tune.data import IGNORED
from parallel_tune.memory.tracker import LiveBytes

TOKENS, HIDDEN, VOCABULARY = 23, 12, 40
Found = tuple[Tensor, list[Tensor | None]]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FUSED_CHUNK_ROWS", 5)


def inputs(bias: bool, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor | None], Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, TOKENS, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,))
    tensors = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    labels = torch.randint(0, VOCABULARY, (2, TOKENS), generator=generator)
    labels[0, :9] = labels[1, 4] = IGNORED
    return [*tensors[:2], tensors[2] if bias else None], labels


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, form: Form) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias) * form.scale
    return logits if form.softcap is None else form.softcap * torch.tanh(logits / form.softcap)


def plain(tensors: list[Any], labels: Tensor, form: Form, **more: Any) -> Tensor:
    loss: Tensor = ForCausalLMLoss(logits_of(*tensors, form), labels, VOCABULARY, **more)
    return loss


def with_gradients(tensors: list[Tensor | None], loss: Tensor, scale: float = 1.0) -> Found:
    (loss * scale).backward()  # type: ignore[no-untyped-call]
    gradients = [tensor.grad if tensor is not None else None for tensor in tensors]
    for tensor in tensors:
        if tensor is not None:
            tensor.grad = None
    return loss.detach(), gradients


def assert_close(found: Found, expected: Found, tolerance: float) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.dtype == theirs.dtype
            assert float((ours - theirs).norm() / theirs.norm()) < tolerance


@pytest.mark.parametrize("form", [Form(), Form(0.25), Form(softcap=2.0), Form(3.0, 5.0)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("items", [None, 7, torch.tensor(11)], ids=str)
def test_loss_and_gradients_are_those_of_all_logits(form: Form, bias: bool, items: Any) -> None:
    tensors, labels = inputs(bias)
    expected = with_gradients(tensors, plain(tensors, labels, form, num_items_in_batch=items), 3.0)
    found = with_gradients(tensors, chunked_loss(*tensors, labels, items, form), 3.0)  # type: ignore[arg-type]
    assert_close(found, expected, 1e-6)


def test_labels_that_are_shifted_already() -> None:
    tensors, labels = inputs(bias=False)
    found = with_gradients(tensors, chunked_loss(*tensors, labels, None, None, labels))  # type: ignore[arg-type]
    assert_close(found, with_gradients(tensors, plain(tensors, labels, Form(), shift_labels=labels)), 1e-6)


def test_what_does_not_train_has_no_gradient() -> None:
    (hidden, weight, bias), labels = inputs(bias=True)
    assert hidden is not None and weight is not None and bias is not None
    weight.requires_grad_(False)
    chunked_loss(hidden, weight, bias, labels).backward()  # type: ignore[no-untyped-call]
    assert weight.grad is None and hidden.grad is not None and bias.grad is not None
    with torch.no_grad():
        assert not chunked_loss(hidden, weight, bias, labels).requires_grad


def test_rows_without_a_target_weigh_nothing() -> None:
    tensors, labels = inputs(bias=True)
    none = torch.full_like(labels, IGNORED)
    loss, gradients = with_gradients(tensors, chunked_loss(*tensors, none, torch.tensor(5)))  # type: ignore[arg-type]
    assert float(loss) == 0.0
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["half", "float32"])
@pytest.mark.parametrize("form", [Form(), Form(softcap=2.0)], ids=str)
def test_under_autocast_it_rounds_as_the_plain_loss_does(dtype: torch.dtype, weights: str, form: Form) -> None:
    """Against float32's: float16 has too little range for a mean over a million tokens without the loss scale."""
    scale, items = (2.0**21, torch.tensor(1_000_000)) if dtype == torch.float16 else (1.0, torch.tensor(30))
    exact, labels = inputs(bias=True, dtype=dtype)
    tensors = [tensor.detach().to(dtype if weights == "half" else torch.float32).requires_grad_() for tensor in exact]  # type: ignore[union-attr]
    exact = [tensor.detach().float().requires_grad_() for tensor in tensors]
    truth = with_gradients(exact, plain(exact, labels, form, num_items_in_batch=items), scale)
    with torch.autocast("cpu", dtype):
        theirs = plain(tensors, labels, form, num_items_in_batch=items)
        ours = chunked_loss(*tensors, labels, items, form)  # type: ignore[arg-type]
    assert ours.dtype == torch.float32

    def errors(found: Found) -> list[float]:
        pairs = zip([found[0], *found[1]], [truth[0], *truth[1]], strict=True)
        return [float((one.float() - other).norm() / other.norm()) for one, other in pairs]  # type: ignore[union-attr]

    their_errors = errors(with_gradients(tensors, theirs, scale))
    for error, their in zip(errors(with_gradients(tensors, ours, scale)), their_errors, strict=True):
        assert error < 2 * their + (2e-3 if dtype == torch.bfloat16 else 2e-4)


@pytest.mark.parametrize(("dtype", "softcap"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 2.0)])
@pytest.mark.parametrize("trained", [False, True])
def test_no_more_than_a_chunk_of_logits_lives(dtype: torch.dtype, softcap: float | None, trained: bool) -> None:
    vocabulary, tokens = 5000, 60
    hidden = torch.randn(tokens, 4, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, 4, dtype=dtype, requires_grad=trained)
    labels = torch.randint(0, vocabulary, (tokens,))
    with LiveBytes() as tracker:
        tracker.count([hidden, weight])
        before = tracker.live_bytes
        chunked_loss(hidden, weight, None, labels, form=Form(softcap=softcap)).backward()  # type: ignore[no-untyped-call]
        peak = max(tracker.peaks_bytes.values()) - before
    chunk = 5 * vocabulary * (4 + (2 if dtype == torch.bfloat16 else 0) + (4 if softcap else 0))
    gradients = (hidden.nbytes + weight.nbytes) if trained else hidden.nbytes
    assert chunk < peak < chunk + gradients + 4096 < tokens * vocabulary * 4
