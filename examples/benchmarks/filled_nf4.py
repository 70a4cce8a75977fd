"""Linear layers of a filled model in nf4, as bitsandbytes and transformers save them; each size is quantised once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


def quantised(model: Any, tensors: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The tensors, with packed weights and their scales in place of each linear layer's but the head's.

    Weights of one size must be equal, as a filled model's are: they become the same tensors.
    """
    import torch
    from bitsandbytes.functional import quantize_4bit

    head = model.get_output_embeddings()
    linear = {
        f"{name}.weight" for name, module in model.named_modules() if type(module) is torch.nn.Linear and module != head
    }
    known: dict[tuple[int, ...], dict[str, Any]] = {}
    for name, tensor in tensors:
        if name not in linear:
            yield name, tensor
            continue
        shape = tuple(tensor.shape)
        if shape not in known:
            packed, state = quantize_4bit(tensor, blocksize=64, compress_statistics=True, quant_type="nf4")
            known[shape] = {"": packed, **{f".{key}": value for key, value in state.as_dict(packed=True).items()}}
        for ending, value in known[shape].items():
            yield f"{name}{ending}", value.contiguous()
