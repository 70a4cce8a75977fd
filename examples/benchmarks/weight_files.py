"""Files of weights, written as fast as the page cache takes them.

Tensors may share memory, so that a model far larger than memory can be made of a few blocks of numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SHARD_BYTES = 4 << 30
WRITERS = 8
"""Files that are written at once: a single one is copied into the page cache by a single core."""

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "uint8": "U8"}


def write_weights(folder: Path, tensors: Iterable[tuple[str, Any]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write contiguous tensors by their names as transformers reads them: one file, or shards and their index."""
    shards = _shards(tensors, shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    with ThreadPoolExecutor(min(WRITERS, os.cpu_count() or 1)) as pool:
        list(pool.map(write_safetensors, [folder / name for name in names], shards))
    if len(shards) > 1:
        places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor, _ in shard}
        total = sum(tensor.nbytes for shard in shards for _, tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def write_safetensors(path: Path, tensors: list[tuple[str, Any]]) -> None:
    """One file in the safetensors format. The library's own writer copies every tensor, and takes none that shares."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        begin, end = end, end + tensor.nbytes
        dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors:
            file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))


def _shards(tensors: Iterable[tuple[str, Any]], shard_bytes: int) -> list[list[tuple[str, Any]]]:
    shards: list[list[tuple[str, Any]]] = [[]]
    size = 0
    for name, tensor in tensors:
        if size and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, tensor))
        size += tensor.nbytes
    return shards
