"""Experiment trackers: which are known, and which a run reports to."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from strategies.errors import ConfigError

AUTO = "auto"
NONE = "none"
ALL = "all"
WORDS = (AUTO, NONE, ALL)
PACKAGES: dict[str, tuple[str, ...]] = {
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": ("kubeflow",),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""Trackers by their transformers names, each with the packages of which it needs one."""


def check_names(names: Sequence[str]) -> None:
    """Refuse trackers that nobody knows.

    Raises:
        ConfigError: an unknown name, or "auto", "all" or "none" beside others.
    """
    for name in names:
        if name in WORDS and len(names) > 1:
            raise ConfigError(
                f"report_to = {', '.join(names)}: {name} stands alone", "Name the trackers, or one of it."
            )
        if name not in PACKAGES and name not in WORDS:
            near = difflib.get_close_matches(name, PACKAGES, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(PACKAGES)}; or {', '.join(WORDS)}."
            raise ConfigError(f"report_to = {name!r} is no tracker that is known", hint)


def check_installed(names: Sequence[str]) -> None:
    """Refuse trackers that were asked for by name and are not installed, before a model is loaded.

    Raises:
        ConfigError: a tracker's package is missing.
    """
    for name in names:
        if name in PACKAGES and not _installed(name):
            package = PACKAGES[name][0]
            raise ConfigError(
                f"report_to = {name}, and the package {package} is not installed",
                f"Install {package}, or use --report_to {NONE}.",
            )


def chosen(names: Sequence[str]) -> list[str]:
    """The trackers to report to: "auto" is TensorBoard where it is installed, "all" whatever is."""
    if list(names) == [AUTO]:
        return ["tensorboard"] if _installed("tensorboard") else []
    if list(names) == [ALL]:
        return [name for name in PACKAGES if _installed(name)]
    return [name for name in names if name != NONE]


def keep_from_ending_the_run(callbacks: Sequence[Any]) -> None:
    """Let a tracker whose disk is full, or whose server is gone, end itself once training has begun, not the run."""
    for callback in callbacks:
        if type(callback).__module__.startswith("transformers.integrations"):
            for event in [name for name in dir(callback) if name.startswith("on_")]:
                if event not in ("on_init_end", "on_train_begin"):
                    setattr(callback, event, _guarded(callback, getattr(callback, event)))


def _guarded(callback: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(*arguments: Any, **named: Any) -> Any:
        if getattr(callback, "has_failed", False):
            return None
        try:
            return call(*arguments, **named)
        except OSError as error:
            callback.has_failed = True
            print(f"{type(callback).__name__} reports no more: {type(error).__name__}: {error}; training goes on")
            return None

    return guarded


def _installed(name: str) -> bool:
    return any(find_spec(package) is not None for package in PACKAGES[name])
