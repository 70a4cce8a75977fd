"""The guard in a user's script: what reading the script could not see is seen when it loads a model.

Whoever loads a model does so through transformers' `PreTrainedModel.from_pretrained`, Unsloth's loaders or accelerate's
dispatch. These are wrapped as soon as the script imports them; nothing is imported for the script's sake, since Unsloth
must come first. No `strategies` here: the script may have its own.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType, ModuleType
from typing import Any

from parallel_tune.script_placement import Placement

SPLITTING_MAPS = ("auto", "balanced", "balanced_low_0", "sequential", "unsloth", "unsloth_balanced")
"""transformers' words for a split, and Unsloth's."""
LOADERS = {
    "transformers.modeling_utils": ("PreTrainedModel",),
    "unsloth.models.loader": ("FastLanguageModel", "FastModel"),
    "unsloth_zoo.cpu.loader": ("FastCPUModel",),
}
"""Module -> its classes with a `from_pretrained` that takes a device_map."""
DISPATCHERS = {"accelerate.big_modeling": ("dispatch_model", "load_checkpoint_and_dispatch")}
"""Module -> its functions that lay a model over the devices of a device_map."""

COMBINED = 4
"""The exit code of strategies that may not be combined."""

LOADING = ("transformers", "torch", "parallel_tune")
LIBRARIES = (*LOADING, "unsloth", "unsloth_zoo", "trl", "peft", "accelerate")
SPLIT_BY_DEFAULT = ("unsloth", "unsloth_zoo", "trl")
"""Libraries that ask for a split where the script says nothing."""


class Refused(SystemExit):
    """The script asked for what its strategy excludes. Not an Exception: a script's own handler must not go on."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(COMBINED)
        self.message = message
        self.hint = hint


def install(placement: Placement, planned_model: str | None) -> None:
    """Wrap the loaders of each library once the script imports it."""
    sys.meta_path.insert(0, _AfterImport(functools.partial(_wrap_loaders, placement, planned_model)))


def choose_map(asked: Any, model: str, where: str, placement: Placement, planned_model: str | None) -> Any:
    """The device_map to load with.

    Args:
        asked: what the script gave; None if nothing.
        model: the model's name as the script gave it.
        where: file and line, for the refusal.

    Raises:
        Refused: a split under ddp.
    """
    if placement.strategy == "model_parallel":
        return _split_map(asked, model, where, placement.device_map, planned_model)
    if asked is None:
        return placement.device_map
    _refuse_split(asked, where, placement)
    if placement.device_map is not None and _gpu(asked) not in (None, placement.local_rank):
        print(
            f"parallel-tune: {where}: this process has GPU {placement.local_rank}, so device_map={asked!r} gives way."
        )
        return dict(placement.device_map)
    return asked


def _refuse_split(asked: Any, where: str, placement: Placement) -> None:
    if placement.strategy not in ("model_parallel", "none") and splits(asked):
        raise Refused(
            f"{where}: device_map={shown(asked)} splits one model over several devices, and --strategy "
            f"{placement.strategy} puts a whole replica on each. They cannot be combined.",
            "Leave out device_map to replicate (each process gets its device), or launch with "
            "--strategy model_parallel to split.",
        )


def _gpu(asked: Any) -> int | None:
    """The one GPU that a map names by its number."""
    if isinstance(asked, Mapping):
        return _gpu(next(iter(asked.values()), None))
    number = str(asked).removeprefix("cuda:")
    return int(number) if number.isdecimal() else None


def _split_map(asked: Any, model: str, where: str, planned: dict[str, int] | None, planned_model: str | None) -> Any:
    """The plan's map for the planned model; a split that the script itself wrote out is its own affair."""
    if planned is None or (isinstance(asked, Mapping) and splits(asked)):
        return asked
    if not _same_model(model, planned_model):
        if asked is None:
            print(f"parallel-tune: {where} loads {model}; the plan is for {planned_model}: no map handed over.")
        return asked
    if asked is not None:
        print(f"parallel-tune: {where}: the plan's map is used instead of device_map={asked!r}.")
    return dict(planned)


def _same_model(model: str, planned: str | None) -> bool:
    return planned is not None and (model == planned or os.path.realpath(model) == os.path.realpath(planned))


def splits(device_map: Any) -> bool:
    """Whether it may lay one model over several devices."""
    if isinstance(device_map, str):
        return device_map in SPLITTING_MAPS
    if isinstance(device_map, Mapping):
        # 0, "0", "cuda:0" and "cuda" are one device.
        return len({str(d).removeprefix("cuda").removeprefix(":") or "0" for d in device_map.values()}) > 1
    return False


def shown(device_map: Any) -> str:
    """A map in a line: a long one by its devices."""
    text = repr(device_map)
    return text if len(text) <= 60 else f"{{{len(device_map)} modules on {len(set(device_map.values()))} devices}}"


def _wrap_loaders(placement: Placement, planned_model: str | None, module: ModuleType) -> None:
    for name in DISPATCHERS.get(module.__name__, ()):
        setattr(module, name, _guarded_dispatch(getattr(module, name), placement))
    for name in LOADERS.get(module.__name__, ()):
        loader: Any = getattr(module, name, None)
        attribute = inspect.getattr_static(loader, "from_pretrained", None)
        if isinstance(attribute, classmethod | staticmethod):
            wrapped = _guarded(attribute.__func__, isinstance(attribute, classmethod), placement, planned_model)
            loader.from_pretrained = type(attribute)(wrapped)


def _guarded(
    original: Callable[..., Any], bound: bool, placement: Placement, planned_model: str | None
) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(original).bind_partial(*args, **kwargs)
        of_its_own = "device_map" in call.arguments
        given = call.arguments["device_map"] if of_its_own else kwargs.get("device_map")
        asked = given
        if isinstance(given, str) and given in SPLITTING_MAPS and _calling_frame(LOADING)[1] in SPLIT_BY_DEFAULT:
            asked = None  # a library's own default, not what the script said: TRL's trainers give "auto"
        names = args[1:] if bound else args
        model = str(names[0] if names else kwargs.get("pretrained_model_name_or_path", kwargs.get("model_name", "")))
        chosen = choose_map(asked, model, calling_line(), placement, planned_model)
        if of_its_own:
            call.arguments["device_map"] = chosen
            args, kwargs = call.args, call.kwargs
        elif chosen is not given:
            kwargs["device_map"] = chosen
        if placement.strategy == "ddp" and placement.device_map:
            # Without this every process opens a context on the first GPU as well.
            import torch

            torch.cuda.set_device(placement.local_rank)
        return original(*args, **kwargs)

    return from_pretrained


def _guarded_dispatch(original: Callable[..., Any], placement: Placement) -> Callable[..., Any]:
    @functools.wraps(original)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(original).bind_partial(*args, **kwargs)
        _refuse_split(call.arguments.get("device_map"), calling_line(), placement)
        return original(*args, **kwargs)

    return dispatch


def calling_line() -> str:
    """File and line of the script, or of a module of its own, that made the call."""
    frame, _ = _calling_frame(LIBRARIES)
    return f"{os.path.relpath(frame.f_code.co_filename)}:{frame.f_lineno}"


def _calling_frame(passed_over: Sequence[str]) -> tuple[FrameType, str]:
    """The nearest frame outside these packages, and the package that it is in."""
    frame = sys._getframe(1)
    while True:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in passed_over or frame.f_back is None:
            return frame, package
        frame = frame.f_back


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls back with a watched module as soon as it has run, before whoever imports it goes on."""

    def __init__(self, callback: Callable[[ModuleType], None]) -> None:
        self._callback = callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in LOADERS and fullname not in DISPATCHERS:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                break
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            self._callback(module)

        # On the instance, so that the loader keeps its type: Unsloth reads the sources of what it patches.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
