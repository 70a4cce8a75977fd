"""What a shell completes: options in either spelling, and the values of those that take names or paths."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
)

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]

PATHS = {
    "model": "dir", "dataset": "file", "raw_text_file": "file", "output_dir": "dir", "save_path": "dir",
    "device_map": "file",
}  # fmt: skip
"""Options that take a path, and of what."""
MARKS = {"hardware": "x+", "model": "\0", "device_map": "\0"}
"""Signs after which a value begins anew, where it is not the comma; \0 is in none."""


def completer(name: str) -> Completer | None:
    """What completes an option's value; None where there is nothing to offer."""
    words = _WORDS.get(name)
    path = PATHS.get(name)
    if words is None and path is None:
        return None

    def complete(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        # The last of a list's words, or a card after its number.
        start = 1 + max(incomplete.rfind(mark) for mark in MARKS.get(name, ","))
        head, rest = incomplete[:start], incomplete[start:].lower()
        found = [CompletionItem(head + word) for word in (words() if words else ()) if word.lower().startswith(rest)]
        return [*found, *([CompletionItem(incomplete, type=path)] if path else [])]

    return complete


def _strategies() -> Iterable[str]:
    from importlib.metadata import entry_points

    from strategies.registry import ENTRY_POINT_GROUP

    return "auto", *sorted({point.name for point in entry_points(group=ENTRY_POINT_GROUP)})


def _models() -> Iterable[str]:
    from parallel_tune.memory.lookup import catalog

    return [name for canonical, row in catalog().items() for name in (canonical, *row.get("aliases", ()))]


def _optimizers() -> Iterable[str]:
    from parallel_tune.memory.states import OPTIMIZERS

    return OPTIMIZERS


def _trackers() -> Iterable[str]:
    from parallel_tune.trackers import PACKAGES, WORDS

    return *WORDS, *PACKAGES


def _gguf_types() -> Iterable[str]:
    from parallel_tune.llama_cpp import GGUF_TYPES, SMALLER_GGUF_TYPES

    return *GGUF_TYPES, *SMALLER_GGUF_TYPES


def _cards() -> Iterable[str]:
    from parallel_tune.gpus import GPUS

    return [gpu.name for gpu in GPUS]


def _modules() -> Iterable[str]:
    from parallel_tune.config import LORA_TARGETS

    return "all-linear", *LORA_TARGETS


def _split_words() -> Iterable[str]:
    return "balanced", "auto"


_WORDS: dict[str, Callable[[], Iterable[str]]] = {
    "strategy": _strategies,
    "model": _models,
    "optim": _optimizers,
    "report_to": _trackers,
    "quantization": _gguf_types,
    "hardware": _cards,
    "target_modules": _modules,
    "device_map": _split_words,
}


class EitherSpelling(ShellComplete):
    """Options with `-` or `_`: answered as they were begun."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        """As click's, of names that it knows."""
        # bash parts `--option=value` at the sign.
        args = args[:-1] if args[-1:] == ["="] else args
        items = super().get_completions([_normal(word) for word in args], _normal(incomplete))
        if incomplete.startswith("--") and "-" in incomplete[2:].partition("=")[0]:
            for item in items:
                item.value = item.value.replace("_", "-") if str(item.value).startswith("--") else item.value
        return items


def _normal(word: str) -> str:
    name, sign, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{sign}{value}" if word.startswith("--") else word


@add_completion_class
class Bash(EitherSpelling, BashComplete):
    """Bash."""


@add_completion_class
class Zsh(EitherSpelling, ZshComplete):
    """Zsh."""


@add_completion_class
class Fish(EitherSpelling, FishComplete):
    """Fish."""
