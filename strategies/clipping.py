"""Clipping of gradients that lie on several devices, by the norm of all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def clip_over_devices(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_` does, by one number from each device.

    torch's own takes the norm of every tensor to the first device by itself: an 80-layer model's adapters make 560
    copies of four bytes, which each wait for both devices.

    Returns:
        The norm before clipping, on the device of the first gradient.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_device.setdefault(parameter.grad.device, []).append(parameter.grad)
    if not by_device:
        return torch.tensor(0.0)
    first = next(iter(by_device))
    norms = [get_total_norm(gradients).to(first, torch.float32) for gradients in by_device.values()]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    clip_grads_with_norm_(list(parameters), max_norm, total)
    return total
