"""What the trainer is made of beside itself: its loader, its arguments, and how DDP sums."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch.utils.data import DataLoader
from trl import SFTConfig

from strategies.reduction import reduce_in_bfloat16


class EpochDataLoader(DataLoader):  # type: ignore[type-arg]
    """A DataLoader that tells its batch sampler which epoch begins."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class Arguments(SFTConfig):  # type: ignore[misc]
    """SFTConfig whose CPU device has no index: torch.load cannot map a checkpoint to "cpu:0"."""

    @property
    def device(self) -> torch.device:
        device: torch.device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


class InBfloat16(DistributedDataParallelKwargs):  # type: ignore[misc]
    """Settings of DDP under which it sums gradients in bfloat16, on a CPU too."""

    def register_comm_hook(self, model: Any) -> None:
        model.register_comm_hook(None, reduce_in_bfloat16)
