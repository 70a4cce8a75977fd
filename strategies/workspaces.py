"""cuBLAS's workspaces, taken before anything else lies on a device."""

from __future__ import annotations

from collections.abc import Iterable

import torch

WIDTH = 64


def settle_workspaces(devices: Iterable[torch.device]) -> None:
    """Multiply once forward and once backward on each device, so that both threads' workspaces lie below all else.

    cuBLAS takes one for each thread and stream at its first product, and keeps it. Autograd's thread would take its own
    amid the logits that the first loss has just freed, and pin them there: in a run of Qwen2-1.5B, whose loss takes
    10 GiB, the allocator then held 1.4 GiB more.
    """
    for device in devices:
        left = torch.ones(WIDTH, WIDTH, device=device, requires_grad=True)
        (left @ left.detach()).sum().backward()  # type: ignore[no-untyped-call]
