"""Where a model of any architecture keeps its parts, read off the model itself."""

from __future__ import annotations

from typing import Any

from strategies.contracts import ModuleNames
from strategies.errors import ConfigError


def anatomy(model: Any, num_layers: int) -> ModuleNames:
    """The parts of a causal language model of transformers.

    Its base model holds one list of layers. What stands before the list runs with the embedding, and so does what has
    no weights behind it (a rotary embedding); the rest behind it is the final norm, which OLMo has without weights.

    Raises:
        ConfigError: it is built otherwise.
    """
    prefix = model.base_model_prefix
    base = getattr(model, prefix, None)
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is head and head is not None]
    children = list(base.named_children()) if base is not None else []
    lists = [i for i, (_, module) in enumerate(children) if _is_stack(module, num_layers)]
    if len(lists) != 1 or not names:
        raise ConfigError(
            f"{type(model).__name__} is not built of an embedding, one list of {num_layers} layers and a head",
            "Only such decoder-only models can be traced.",
        )
    place = lists[0]
    tail = [name for name, module in children[place + 1 :] if "norm" in name or any(True for _ in module.parameters())]
    early = [name for i, (name, _) in enumerate(children) if i != place and name not in tail]
    return ModuleNames(
        embedding=tuple(f"{prefix}.{name}" for name in early),
        layers=f"{prefix}.{children[place][0]}",
        tail=tuple(f"{prefix}.{name}" for name in tail),
        head=names[0],
    )


def _is_stack(module: Any, num_layers: int) -> bool:
    return type(module).__name__ == "ModuleList" and len(module) == num_layers
