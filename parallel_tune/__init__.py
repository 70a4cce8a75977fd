"""Fine-tune language models with Unsloth on all the GPUs of a machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parallel_tune.api import Run, describe, plan, resume, tune
    from parallel_tune.script_placement import Placement, placement

__version__ = "0.1.0"
__all__ = ["Placement", "Run", "__version__", "describe", "placement", "plan", "resume", "tune"]

_HOMES = {
    "Placement": "script_placement",
    "Run": "api",
    "describe": "api",
    "placement": "script_placement",
    "plan": "api",
    "resume": "api",
    "tune": "api",
}


def __getattr__(name: str) -> Any:
    # Looked up when asked for: a script that follows its placement must not import the rest, nor `strategies`.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
