"""A loaded model whose passes with labels compute their loss chunk by chunk, without ever making all logits. Runs in
workers only."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from parallel_tune.chunked_loss import Form, chunked_loss, form_of
from parallel_tune.data import EncodedRow
from strategies.base import Session
from strategies.errors import ConfigError

TOKENS = 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""By how much, as a share of it, the loss of a few tokens may differ from the model's own: rounding."""


@dataclass
class _Pass:
    """What the head was called with in one pass with labels.

    Attributes:
        stand_in: what the head answered with, in place of logits.
        asked: whether the model asked for its loss.
    """

    stand_in: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    asked: bool = False


class _Passes:
    """The pass with labels that each thread is in, if any: lanes have several under way at once."""

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def current(self) -> _Pass | None:
        return getattr(self._local, "current", None)

    @contextmanager
    def begun(self) -> Iterator[_Pass]:
        """A pass, from here to the end of the context."""
        self._local.current = begun = _Pass()
        try:
            yield begun
        finally:
            self._local.current = None


def use_chunked_loss(model: nn.Module, rows: Sequence[EncodedRow], session: Session, dtype: torch.dtype) -> None:
    """Let `model` compute its loss chunk by chunk wherever it is given labels; without them it gives logits as ever.

    Names, `isinstance`, parameters and the state dict stay as they are. Call it when the model lies where it will train
    and before it is wrapped. Every rank calls it.

    Args:
        model: a causal language model of transformers, or a PeftModel around one.
        rows: some of its training rows; the end of one is tried.

    Raises:
        ConfigError: the head is none that can be taken apart, or the loss would not be the model's own.
    """
    causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    head = _plain_head(causal)
    form = form_of(causal.config.get_text_config())
    passes = _Passes()
    own = _loss_of_a_few(model, rows[0], session, dtype)
    causal.__class__ = _class_without_logits(causal.__class__, passes, form)
    head.__class__ = _class_that_hands_on(head.__class__, passes)
    try:
        loss = _loss_of_a_few(model, rows[0], session, dtype)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise refusal(f"its forward needs logits ({type(error).__name__}: {error})") from error
    if not abs(loss - own) <= TOLERANCE[dtype] * max(1.0, abs(own)):
        raise refusal(f"it would be {loss:.6g} on a few tokens where the model's own is {own:.6g}")


def refusal(reason: str) -> ConfigError:
    """What to raise where the loss cannot be computed chunk by chunk."""
    return ConfigError(
        f"--cross_entropy fused: this model's loss cannot be computed chunk by chunk, since {reason}",
        "Use --cross_entropy plain.",
    )


def _plain_head(causal: Any) -> nn.Module:
    from transformers.loss.loss_utils import ForCausalLMLoss

    head = causal.get_output_embeddings()
    kind = type(head)
    if not isinstance(head, nn.Linear) or kind.forward is not nn.Linear.forward or "forward" in vars(head):
        raise refusal(f"its head is a {kind.__module__}.{kind.__name__}, not a torch.nn.Linear alone")
    if causal.loss_function is not ForCausalLMLoss:
        raise refusal(f"its loss is {getattr(causal.loss_function, '__name__', causal.loss_function)}")
    return head


def _class_that_hands_on(base: type[nn.Module], passes: _Passes) -> type[nn.Module]:
    """A head's class that computes nothing in a pass with labels, and notes what it would have computed it of."""

    @wraps(base.forward)
    def forward(self: Any, hidden: Tensor) -> Any:
        current = passes.current
        if current is None:
            return base.forward(self, hidden)
        # The weight is read here, where a split model answers with this pass's copy of it.
        current.hidden, current.weight, current.bias = hidden, self.weight, self.bias
        # Some models ask for float32 or for contiguous logits: then this is both, and stays what it is.
        current.stand_in = hidden.detach()[..., :1].float().contiguous()
        return current.stand_in

    return _subclass(base, {"forward": forward})


def _class_without_logits(base: type[nn.Module], passes: _Passes, form: Form) -> type[nn.Module]:
    """A causal language model's class whose loss is made of what the head noted."""

    @wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("labels") is None:
            return base.forward(self, *args, **kwargs)
        with passes.begun() as current:
            outputs = base.forward(self, *args, **kwargs)
        if not current.asked:
            raise refusal("it computes its loss otherwise than transformers' models do")
        outputs["logits"] = None
        return outputs

    def loss_of(
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        current = passes.current
        if current is None or current.hidden is None or current.weight is None:
            raise refusal("it asks for its loss before it has called its head")
        if (logits is current.stand_in) != (form == Form()):
            raise refusal("what it does to logits between head and loss is not what its config says")
        current.asked = True
        return chunked_loss(
            current.hidden, current.weight, current.bias, labels, num_items_in_batch, form, shift_labels
        )

    return _subclass(base, {"forward": forward, "loss_function": property(lambda _: loss_of)})


def _subclass(base: type[nn.Module], members: dict[str, Any]) -> type[nn.Module]:
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {**names, **members})


def _loss_of_a_few(model: nn.Module, row: EncodedRow, session: Session, dtype: torch.dtype) -> float:
    ids = torch.tensor([row["input_ids"][-TOKENS:]], device=session.device)
    was_training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(session.device.type, dtype, enabled=dtype != torch.float32):
        # A model that makes its loss itself would look for other labels than 0 beyond the stand-in's one column.
        loss = float(model(input_ids=ids, labels=torch.zeros_like(ids), use_cache=False).loss)
    model.train(was_training)
    return loss
