"""Engines: who loads the model and adds adapters. The trainer behind them is the same."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, Protocol

from parallel_tune.config import TrainConfig
from parallel_tune.memory.facts import ModelFacts
from strategies.base import Session
from strategies.contracts import Plan
from strategies.errors import ConfigError

EngineName = Literal["unsloth", "transformers"]


class Engine(Protocol):
    """Loads a model where the session wants it."""

    def prepare(self) -> None:
        """What must happen before transformers, trl and peft are imported."""

    def load(self, config: TrainConfig, plan: Plan, session: Session, dtype: Any) -> tuple[Any, Any]:
        """The base model at the session's placement, and its tokenizer."""

    def add_adapters(self, model: Any, config: TrainConfig, plan: Plan) -> Any:
        """The model with trainable adapters, or all of it made trainable."""

    def training_arguments(self, plan: Plan) -> dict[str, Any]:
        """TrainingArguments that the engine needs, by their transformers names."""


def target_modules(config: TrainConfig) -> str | list[str]:
    """The adapted modules in peft's words, for which all-linear is no list."""
    return "all-linear" if config.target_modules == ["all-linear"] else list(config.target_modules)


def installed(package: str) -> bool:
    """Whether a package can be found, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def choose_engine(name: str, gpus: bool, declared: bool) -> tuple[EngineName, str]:
    """The engine of a run and a line that says why, or an empty one.

    Declared hardware is planned for as it will be, whatever is installed here.

    Raises:
        ConfigError: unsloth was asked for and is not installed.
    """
    if name == "transformers":
        return "transformers", ""
    if name == "unsloth":
        if not declared and not installed("unsloth"):
            raise ConfigError(
                "--engine unsloth: the package unsloth is not installed here",
                "Run `make install`, or `pip install --no-deps unsloth unsloth_zoo`; or use --engine transformers.",
            )
        return "unsloth", ""
    if not gpus:
        return "transformers", ""
    if declared or installed("unsloth"):
        return "unsloth", ""
    return (
        "transformers",
        "unsloth is not installed: training with transformers and peft, slower. "
        "`pip install --no-deps unsloth unsloth_zoo` brings it.",
    )


def check_attention(config: TrainConfig, engine: EngineName, facts: ModelFacts) -> None:
    """Refuse attention that was named and that nobody would compute, and what computes another than the model's.

    Raises:
        ConfigError: Unsloth has attention of its own; torch's kernel passes over a cap of the scores (Gemma 2).
    """
    if engine == "transformers" and config.attn_implementation == "sdpa" and facts.attention_softcap:
        raise ConfigError(
            f"attn_implementation = 'sdpa' leaves out the cap that {config.model} has on its attention scores "
            "(attn_logit_softcapping): what is trained would not be this model",
            "Add --attn_implementation eager, or flash_attention_2 where it is installed.",
        )
    if engine == "unsloth" and config.attn_implementation != "sdpa":
        raise ConfigError(
            f"attn_implementation = {config.attn_implementation!r} is for transformers, and Unsloth, which this run "
            "uses, has attention of its own",
            "Add --engine transformers, or leave the option out.",
        )


def missing_packages(gpus: bool, engine: str) -> str:
    """A line about packages that a GPU machine should have, or an empty one."""
    if gpus and engine == "unsloth" and not installed("bitsandbytes"):
        return "bitsandbytes is not installed: 4-bit weights and 8-bit optimizers are not available here."
    return ""


def open_engine(name: EngineName) -> Engine:
    """The engine of that name, its own imports not yet done."""
    if name == "unsloth":
        from parallel_tune.engines.unsloth import UnslothEngine

        return UnslothEngine()
    from parallel_tune.engines.transformers import TransformersEngine

    return TransformersEngine()
