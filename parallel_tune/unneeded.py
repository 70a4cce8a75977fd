"""Packages that peft and transformers import wherever they are installed, and that most runs have no use for."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from parallel_tune.config import TrainConfig
from parallel_tune.memory.lookup import load_model_config
from strategies.errors import ConfigError

QUANTIZERS = ("bitsandbytes", "torchao")
"""Together a fifth of what a worker's imports take (examples/benchmarks/imports.py)."""


def needs_bitsandbytes(config: TrainConfig) -> bool:
    """Whether weights or the optimizer's states are bitsandbytes'."""
    return config.load_in_4bit or any(part in config.optim for part in ("8bit", "paged", "lion", "bnb"))


def unneeded_packages(config: TrainConfig, engine: str) -> tuple[str, ...]:
    """Quantizers, where nothing is quantised: not the weights, the optimizer's states, nor the model's files."""
    if engine != "transformers" or needs_bitsandbytes(config):
        return ()
    try:
        model, _ = load_model_config(config.model, offline=True)
    except ConfigError:
        return ()
    return () if "quantization_config" in model else QUANTIZERS


def leave_out(packages: Iterable[str]) -> None:
    """Let these packages look as if they were not installed, unless they are imported already."""
    for name in packages:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # which is how Python says that there is none
