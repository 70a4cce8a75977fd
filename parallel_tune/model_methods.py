"""Methods of a model that libraries call in training, made to do less or otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn


@contextmanager
def stays_in_training(model: nn.Module) -> Iterator[None]:
    """Within it a model that trains answers `train()` at once.

    transformers calls it for each micro-batch, which walks through thousands of modules: 4 ms of an 8B's with adapters.
    """
    if not model.training or "train" in vars(model):
        yield
        return
    model.train = lambda mode=True: model  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.train


def read_adapters_onto(model: Any, device: torch.device) -> None:
    """Let checkpoints' adapters be read onto this device.

    By itself peft reads them onto "cuda", which is the first GPU for safetensors, whatever the current one is: each
    resumed rank would hold a context there as well.
    """
    model.load_adapter = partial(model.load_adapter, torch_device=str(device))
