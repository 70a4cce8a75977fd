"""The balancing loss of a mixture's routers: added where the model's own config asks for it, and once a step.

The models of transformers add it to the loss of each pass, so a step of many micro-batches would have it many times;
TRL asks for it whatever the config says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from parallel_tune.data import IGNORED


class RouterLoss:
    """What a loaded model's config says of it.

    Attributes:
        asked: the passes of the model add it to their loss.
    """

    def __init__(self, model: Any) -> None:
        self._config = model.config.get_text_config()
        self.asked = bool(getattr(self._config, "output_router_logits", False))

    def keep_choice(self) -> None:
        """Put the config back to what it said when the model was loaded."""
        if hasattr(self._config, "output_router_logits"):
            self._config.output_router_logits = self.asked

    def by_share(self, loss: Tensor, outputs: Any, labels: Tensor, num_items: Tensor, processes: int) -> Tensor:
        """The loss of a micro-batch with so much of its balancing loss as it has of the step's predicted tokens.

        Args:
            loss: as transformers' Trainer computes it, which multiplies it by the number of processes.
            labels: of the micro-batch; its first column predicts nothing.
            num_items: predicted tokens of the step.
        """
        balance = getattr(outputs, "aux_loss", None)
        if balance is None:
            return loss
        share = (labels[..., 1:] != IGNORED).sum().to(loss.device) / num_items.to(loss.device)
        weight: float = self._config.router_aux_loss_coef * processes
        rest: Tensor = (share - 1) * weight * balance.to(loss.device)
        return loss + rest

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Within it the model's loss is the tokens' alone."""
        if not self.asked:
            yield
            return
        self._config.output_router_logits = False
        try:
            yield
        finally:
            self._config.output_router_logits = True
