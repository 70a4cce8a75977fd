"""Split a loaded causal language model into stages, each on a device, inside one process.

Stages may lie on distinct GPUs, share one, or all lie on the CPU ("virtual" stages, which cross boundaries by real
copies). Losses and gradients are bitwise those of the model in one piece. Names, class names, `isinstance` and the
state dict stay as they are, and `undo()` takes everything back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from strategies.crossing import Carrier, Crossings, Crossroads, borrowing_class, receiving_class
from strategies.errors import ConfigError


@dataclass(frozen=True)
class Anatomy:
    """Where a causal language model keeps its parts.

    Attributes:
        causal: the model that has the head, without PEFT's wrapper.
        decoder: the module that runs the layers one after the other.
        layers: its list of decoder layers.
        layers_name: the name of that list within `causal`, e.g. "model.layers".
        embedding: the token embedding.
        head: the output projection, None where there is none.
    """

    causal: nn.Module
    decoder: nn.Module
    layers: nn.ModuleList
    layers_name: str
    embedding: nn.Module
    head: nn.Module | None


class Stages:
    """A model split into stages; made by `split`.

    Attributes:
        model: the model given to `split`, as it was wrapped.
        anatomy: its parts.
        cuts: the first layer of each stage.
        devices: the device of each stage.
        modules: the modules of each stage, in order.
        parameters: the parameters of each stage by their names in `model`; each parameter is in exactly one stage (a
            tied weight in the first).
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        cuts: tuple[int, ...],
        roads: Crossroads,
        modules: tuple[tuple[nn.Module, ...], ...],
        parameters: tuple[dict[str, nn.Parameter], ...],
    ) -> None:
        self.model = model
        self.anatomy = anatomy
        self.cuts = cuts
        self.devices = roads.devices
        self.modules = modules
        self.parameters = parameters
        self._roads = roads
        self._undo: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self.cuts)

    @property
    def head_device(self) -> torch.device:
        """Where logits and loss are; labels that lie there already need no copy."""
        return self.devices[-1]

    @property
    def crossings(self) -> list[Crossings]:
        """Crossings of the p-1 boundaries so far, the one before stage 1 first."""
        return self._roads.counts[1:]

    def count(self, stage: int, backward: bool = False) -> None:
        """Note a crossing of the boundary before `stage`; for carriers that do not use `Stages`' own."""
        self._roads.count(stage, backward)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Within it, crossings are counted as ever; afterwards the counts are what they were before."""
        before = [replace(count) for count in self.crossings]
        try:
            yield
        finally:
            for count, kept in zip(self.crossings, before, strict=True):
                count.forward, count.backward = kept.forward, kept.backward

    def carried_by(self, carrier: Carrier) -> AbstractContextManager[None]:
        """Within it, `carrier` takes over what this thread's forward passes bring to a boundary."""
        return self._roads.carried_by(carrier)

    def cross(self, stage: int, tensors: Sequence[Tensor], late: bool) -> Sequence[Tensor]:
        """Carry tensors over a boundary as without a carrier: differentiable copies, counted."""
        return self._roads.cross(stage, tensors, late)

    def lend(self, weight: Tensor, device: torch.device) -> Tensor:
        """A differentiable copy of a trained tied weight, as without a carrier."""
        return self._roads.lend(weight, device)

    def undo(self) -> None:
        """Give the model its own classes back. Weights stay where they are; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def _swap(self, module: nn.Module, made: type[nn.Module]) -> None:
        original = module.__class__

        def restore() -> None:
            module.__class__ = original

        module.__class__ = made
        self._undo.append(restore)


def split(model: nn.Module, cuts: Sequence[int], devices: Sequence[torch.device]) -> Stages:
    """Split `model` before the layers `cuts[1:]`, stage k going to `devices[k]`.

    Weights that `from_pretrained(device_map=...)` placed there already are not touched; accelerate's hooks are removed,
    so that logits stay on the head's device. The embedding goes to the first stage, final norm and head to the last.
    A head tied to the embedding works with a copy: of a frozen weight one for good, of a trained one a fresh one each
    pass (in lanes, each run) that carries its gradient back. Call it before the model is wrapped for mixed precision.

    Args:
        model: a causal language model, or a PeftModel around one.
        cuts: index of the first layer of each stage; ascending, the first is 0.
        devices: one for each stage; the same device may come several times.

    Raises:
        ConfigError: the cuts do not fit the model, the model is split already, its layers were not found, or two stages
            share a weight.
    """
    anatomy = dissect(model)
    placed = tuple(_with_index(torch.device(device)) for device in devices)
    _check(anatomy, cuts, placed)
    _remove_accelerate_hooks(model)
    roads = Crossroads(placed)
    modules = _assign_modules(anatomy, cuts)
    tied = _tied(anatomy) if len(cuts) > 1 else []
    parameters = _assign_parameters(model, modules, {id(weight) for _, _, weight in tied})
    borrowed = {id(weight) for _, _, weight in tied}
    for stage, owned in enumerate(modules):
        for module in owned:
            _place(module, placed[stage], keep=borrowed if stage else set())

    stages = Stages(model, anatomy, tuple(cuts), roads, modules, parameters)
    # Layers that are alike share a class: torch.compile compiles anew for each.
    receiving: dict[tuple[type[nn.Module], int, bool], type[nn.Module]] = {}
    for index, layer in enumerate(anatomy.layers):
        if stage := _stage_of(index, cuts):
            kind = (layer.__class__, stage, index == cuts[stage])
            if kind not in receiving:
                receiving[kind] = receiving_class(kind[0], roads, *kind[1:])
            stages._swap(layer, receiving[kind])
    for module, name, _ in tied:
        stages._swap(module, borrowing_class(module.__class__, roads, name, placed[-1]))

    def labels_to_head(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        for name in ("labels", "shift_labels"):
            if isinstance(kwargs.get(name), Tensor):
                kwargs[name] = kwargs[name].to(placed[-1], non_blocking=True)
        return args, kwargs

    handles = (
        anatomy.decoder.register_forward_pre_hook(roads.begin),
        anatomy.decoder.register_forward_hook(roads.end_layers, always_call=True),
        anatomy.causal.register_forward_pre_hook(labels_to_head, with_kwargs=True),
        anatomy.causal.register_forward_hook(roads.end, always_call=True),
    )
    stages._undo.extend(handle.remove for handle in handles)
    return stages


def dissect(model: nn.Module) -> Anatomy:
    """Find the parts of a causal language model.

    Raises:
        ConfigError: there is no list of as many modules as the model's config says it has layers.
    """
    causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    config = causal.config.get_text_config() if hasattr(causal.config, "get_text_config") else causal.config
    count = config.num_hidden_layers
    embedding = causal.get_input_embeddings()
    lists = [(n, m) for n, m in causal.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    # A vision tower may have as many layers: the text layers are those that live beside the token embedding.
    beside = [
        (name, layers)
        for name, layers in lists
        if any(module is embedding for module in causal.get_submodule(name.rpartition(".")[0]).modules())
    ]
    if not beside:
        raise ConfigError(
            f"{type(causal).__name__}: no list of {count} layers beside the token embedding was found.",
            "This model cannot be split; train it with --strategy ddp.",
        )
    name, layers = beside[0]
    head = causal.get_output_embeddings()
    return Anatomy(causal, causal.get_submodule(name.rpartition(".")[0]), layers, name, embedding, head)


def _check(anatomy: Anatomy, cuts: Sequence[int], devices: Sequence[torch.device]) -> None:
    count = len(anatomy.layers)
    ascending = all(a < b for a, b in pairwise(cuts))
    if not cuts or cuts[0] != 0 or not ascending or cuts[-1] >= count:
        raise ConfigError(
            f"cuts {list(cuts)} do not divide {count} layers.",
            f"Give the first layer of each stage in ascending order, 0 first, none above {count - 1}.",
        )
    if len(cuts) != len(devices):
        raise ConfigError(f"{len(cuts)} stages but {len(devices)} devices.", "Give one device for each stage.")
    if any(hasattr(type(layer), "of_split_model") for layer in anatomy.layers):
        raise ConfigError("the model is split already.", "Call undo() of its stages first.")


def _stage_of(layer: int, cuts: Sequence[int]) -> int:
    return max(stage for stage, first in enumerate(cuts) if first <= layer)


def _assign_modules(anatomy: Anatomy, cuts: Sequence[int]) -> tuple[tuple[nn.Module, ...], ...]:
    """Each stage's modules: what is registered before the layers runs on the first device, what is after on the last.

    Modules without weights (rotary tables, often registered last) prepare what layers need: first device.
    """
    before: list[nn.Module] = []
    after: list[nn.Module] = []
    parent = anatomy.causal
    for step in anatomy.layers_name.split("."):
        passed = False
        for name, child in parent.named_children():
            if name == step:
                passed = True
            elif child is not anatomy.embedding and child is not anatomy.head:
                weighty = any(True for _ in child.parameters())
                (after if passed and weighty else before).append(child)
        parent = parent.get_submodule(step)
    stages: list[list[nn.Module]] = [[] for _ in cuts]
    stages[0] += [anatomy.embedding, *before]
    for index, layer in enumerate(anatomy.layers):
        stages[_stage_of(index, cuts)].append(layer)
    stages[-1] += after + ([anatomy.head] if anatomy.head is not None and anatomy.head is not anatomy.embedding else [])
    return tuple(tuple(stage) for stage in stages)


def _assign_parameters(
    model: nn.Module, modules: tuple[tuple[nn.Module, ...], ...], tied: set[int]
) -> tuple[dict[str, nn.Parameter], ...]:
    """Each stage's parameters by name. What no stage's module owns (a soft prompt of PEFT, say) is the first stage's.

    Raises:
        ConfigError: two stages share a weight that is not a tied embedding.
    """
    owner: dict[int, int] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for stage, owned in enumerate(modules):
        for parameter in (parameter for module in owned for parameter in module.parameters()):
            if owner.setdefault(id(parameter), stage) != stage and id(parameter) not in tied:
                raise ConfigError(
                    f"{names[id(parameter)]} is shared by stages {owner[id(parameter)]} and {stage}.",
                    "Cut the model elsewhere, or train it with --strategy ddp.",
                )
    parameters: tuple[dict[str, nn.Parameter], ...] = tuple({} for _ in modules)
    for name, parameter in model.named_parameters():
        parameters[owner.get(id(parameter), 0)][name] = parameter
    return parameters


def _tied(anatomy: Anatomy) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Where the head holds a weight of the embedding: module, name, weight."""
    if anatomy.head is None:
        return []
    embedded = {id(parameter) for parameter in anatomy.embedding.parameters()}
    return [
        (module, name, parameter)
        for module in anatomy.head.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) in embedded
    ]


def _place(module: nn.Module, device: torch.device, keep: set[int]) -> None:
    """Move what is elsewhere; weights in `keep` (those tied to another stage) stay."""
    for part in module.modules():
        own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        strays = [tensor for tensor in own if tensor.device != device and id(tensor) not in keep]
        if strays and len(strays) == len(own) and next(part.children(), None) is None:
            part.to(device)  # its own `to` knows how to move quantised weights
            continue
        for tensor in strays:
            tensor.data = tensor.data.to(device)


def _with_index(device: torch.device) -> torch.device:
    """A device as tensors name theirs: "cuda" becomes "cuda:0", "cpu:0" becomes "cpu"."""
    if device.type == "cuda":
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return torch.device(device.type)


def _remove_accelerate_hooks(model: nn.Module) -> None:
    for module in model.modules():
        # Not hasattr: PEFT's wrapper answers for the model inside it, and deleting the hook from the wrapper fails.
        if "_hf_hook" in module.__dict__:
            from accelerate.hooks import ModelHook, remove_hook_from_module

            forward, wrapped = module.forward, module.__dict__.get("_old_forward")
            remove_hook_from_module(module)  # brings back what the hook had wrapped
            if getattr(forward, "__wrapped__", None) is not wrapped:
                # Set after the hook, as Unsloth's fused kernels are. What calls the hook's forward finds an idle hook.
                module.__dict__.update(forward=forward, _old_forward=wrapped, _hf_hook=ModelHook())
