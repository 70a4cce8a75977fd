"""Clipping over several devices: torch's own norm, with no copy for each tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from strategies.clipping import clip_over_devices

LAYERS = 12


def parameters(devices: list[str]) -> list[Tensor]:
    """With gradients, but for the last one."""
    torch.manual_seed(0)
    made: list[Tensor] = [
        torch.nn.Parameter(torch.empty(4, 8, device=devices[at % len(devices)])) for at in range(LAYERS)
    ]
    for parameter in made[:-1]:
        parameter.grad = torch.randn(4, 8).to(parameter.device)
    return made


@pytest.mark.parametrize("max_norm", [0.1, 1e3])
def test_it_clips_as_torch_does(max_norm: float) -> None:
    ours, theirs = parameters(["cpu"]), parameters(["cpu"])
    norm = clip_over_devices(ours, max_norm)
    assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs, max_norm)))
    for mine, other in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    assert ours[-1].grad is None


def test_parameters_without_gradients_have_no_norm() -> None:
    assert clip_over_devices(parameters(["cpu"])[-1:], 1.0) == 0


def test_gradients_of_several_types_count_together() -> None:
    made = parameters(["cpu"])[:2]
    made[1] = torch.nn.Parameter(made[1].detach().bfloat16())
    made[1].grad = torch.full((4, 8), 2.0, dtype=torch.bfloat16)
    assert made[0].grad is not None
    wanted = (made[0].grad.square().sum() + 32 * 4) ** 0.5
    assert float(clip_over_devices(made, 1e3)) == pytest.approx(float(wanted), rel=1e-3)


class _Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        return func(*args, **(kwargs or {}))


def test_one_number_a_device_is_copied_each_way() -> None:
    """Of two GPUs that are not there: of torch's own, one copy for each tensor of the second one."""
    with FakeTensorMode():
        made = parameters(["cuda:0", "cuda:1"])
        with _Copies() as copies:
            norm = clip_over_devices(made, 1.0)
    assert (norm.device, copies.count) == (torch.device("cuda:0"), 2)
