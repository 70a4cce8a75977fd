"""Models whose weights are noise, quickly written and without a GPU: for measuring memory.

    python examples/benchmarks/filled_models.py FOLDER SHAPE [SHAPE ...]

A folder FOLDER/SHAPE is complete when its config.json is there. Weights repeat a block of random numbers whose length
is prime, so that no two rows of a matrix are equal.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from shapes import make_config

BLOCK = 1_000_003
SPREAD = 0.02


def make_filled(shape: str, folder: Path) -> Path:
    """Save the shape in bf16 with a tokenizer; nothing is done where it lies already."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    if (folder / "config.json").exists():
        return folder
    config = make_config(shape, folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
    block = (torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * SPREAD).bfloat16()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    held = {name: _filled(block, tensor) for name, tensor in model.state_dict().items() if name not in tied}
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    return folder


def _filled(block: Any, like: Any) -> Any:
    """A vector is a norm's or a bias's: small noise about one, which every kind of norm bears."""
    import torch

    if like.dim() < 2:
        return (1 + block[: like.numel()]).contiguous()
    repeats = -(-like.numel() // BLOCK)
    return torch.cat([block] * repeats)[: like.numel()].view(like.shape)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        make_filled(name, Path(sys.argv[1]) / name)
