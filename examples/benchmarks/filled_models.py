"""Models whose weights are noise, quickly written and without a GPU: for measuring memory.

    python examples/benchmarks/filled_models.py FOLDER SHAPE [SHAPE ...]

A folder FOLDER/SHAPE is complete when its config.json is there. Where the disk has no room, the next model waits for
others to be removed, a few minutes at most. Weights repeat a block of random numbers whose length
is prime, so that no two rows of a matrix are equal.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from shapes import make_config

BLOCK = 1_000_003
SPREAD = 0.02
SPARE_BYTES = 2 << 30
ROOM_SECONDS = 300


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
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    wait_for_room(folder, sum(tensor.nbytes for tensor in wanted.values()))
    held = {name: _filled(block, tensor) for name, tensor in wanted.items()}
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    return folder


def wait_for_room(folder: Path, size_bytes: int, seconds: float = ROOM_SECONDS) -> None:
    """Return once the disk has so much room and some to spare.

    Raises:
        OSError: it had not after so many seconds.
    """
    deadline = time.monotonic() + seconds
    while (free := shutil.disk_usage(folder).free) < size_bytes + SPARE_BYTES:
        if time.monotonic() > deadline:
            raise OSError(f"{folder} needs {size_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free on its disk")
        time.sleep(0.5)


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
