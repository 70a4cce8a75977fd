"""LoftQ: adapters that begin as the best low-rank correction of the 4-bit rounding, not as none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from strategies.errors import ConfigError

OVERSAMPLING = 8
POWER_ITERATIONS = 8
"""Of the randomised SVD: rounding errors have singular values that fall slowly."""


@torch.no_grad()
def begin_with_loftq(model: Any, base: str, rank: int) -> None:
    """Give each adapter on a 4-bit linear the factors of W - nf4(W), cut to its rank (Li et al. 2023, one iteration).

    Args:
        model: a peft model whose base is held in nf4.
        base: Hub id or folder of the unrounded model, in safetensors.

    Raises:
        ConfigError: the unrounded weights are not there.
    """
    import bitsandbytes as bnb
    from peft.tuners.lora.bnb import Linear4bit

    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    if not layers:
        raise ConfigError(
            "loftq_config found no adapter on a 4-bit linear", "Use --load_in_4bit and target_modules that exist."
        )
    weights = UnroundedWeights(base)
    for name, module in layers.items():
        held = module.get_base_layer().weight
        rounded = bnb.functional.dequantize_4bit(held.data, held.quant_state).float()
        error = weights.get(name.removeprefix("base_model.model.") + ".weight").to(rounded.device).float() - rounded
        count = min(2 * rank + OVERSAMPLING, *error.shape)
        left, sizes, right = torch.svd_lowrank(error, q=count, niter=POWER_ITERATIONS)
        roots = sizes[:rank].sqrt()
        # Where the rank is more than the matrix has, the rest stays as peft made it: nothing.
        down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
        down[: len(roots)] = roots[:, None] * right[:, :rank].T
        up[:, : len(roots)] = left[:, :rank] * roots / module.scaling["default"]


class UnroundedWeights:
    """The tensors of a model as it was saved, one at a time."""

    def __init__(self, base: str) -> None:
        self._base = base
        self._file_of: dict[str, str] | None = None
        index = self._find("model.safetensors.index.json")
        if index is not None:
            self._file_of = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]

    def get(self, name: str) -> torch.Tensor:
        """The tensor of that name.

        Raises:
            ConfigError: it is not there, or is rounded already.
        """
        from safetensors import safe_open

        path = self._find((self._file_of or {}).get(name, "model.safetensors"))
        if path is not None:
            with safe_open(path, framework="pt") as file:
                if name in file.keys():  # noqa: SIM118  (the file is no mapping)
                    tensor: torch.Tensor = file.get_tensor(name)
                    if tensor.is_floating_point():
                        return tensor
        raise ConfigError(
            f"loftq_config needs the unrounded {name}, and {self._base} has none in safetensors",
            "Give the 16-bit model as --model, or drop --loftq_config.",
        )

    def _find(self, name: str) -> str | None:
        from transformers.utils import cached_file

        found: str | None = cached_file(self._base, name, _raise_exceptions_for_missing_entries=False)
        return found
