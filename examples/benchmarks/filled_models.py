"""Models whose weights are noise, quickly written and without a GPU: for measuring memory and speed.

    python examples/benchmarks/filled_models.py FOLDER SHAPE [SHAPE ...]

A SHAPE of shapes.py is written in bf16; one that ends in -nf4, such as llama-70b-nf4, as transformers saves it once
bitsandbytes has quantised it. A folder FOLDER/SHAPE is complete when its config.json is there. Where the disk has no
room, the next model waits for others to be removed, a few minutes at most. Weights repeat a block of random numbers
whose length is prime, so that no two rows of a matrix are equal; matrices of one size are equal, and are written from
the same memory.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shapes import make_config
from weight_files import write_weights

BLOCK = 1_000_003
SPREAD = 0.02
SPARE_BYTES = 2 << 30
ROOM_SECONDS = 300
QUANTISED = "-nf4"


def make_filled(shape: str, folder: Path) -> Path:
    """Save the shape with a tokenizer, in bf16 or in nf4; nothing is done where it lies already."""
    import torch
    from transformers import AutoModelForCausalLM

    if (folder / "config.json").exists():
        return folder
    config = make_config(shape.removesuffix(QUANTISED), folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
    tensors = filled(model)
    if shape.endswith(QUANTISED):
        from filled_nf4 import quantised

        from parallel_tune.engines.transformers import nf4

        tensors = quantised(model, tensors)
        config.quantization_config = nf4(torch.bfloat16).to_dict()
    held = list(tensors)
    wait_for_room(folder, sum(tensor.nbytes for _, tensor in held))
    write_weights(folder, held)
    config.save_pretrained(folder)
    return folder


def filled(model: Any) -> Iterator[tuple[str, Any]]:
    """The model's weights by name, in bf16. A vector is a norm's or a bias's: small noise about one, which every kind
    of norm bears."""
    import torch

    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    block = (torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * SPREAD).bfloat16()
    vectors = 1 + block
    largest = max(tensor.numel() for tensor in wanted.values())
    matrices = block.repeat(-(-largest // BLOCK))
    for name, tensor in wanted.items():
        yield name, (vectors if tensor.dim() < 2 else matrices)[: tensor.numel()].view(tensor.shape)


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


if __name__ == "__main__":
    for name in sys.argv[2:]:
        make_filled(name, Path(sys.argv[1]) / name)
