"""Renders parallel_tune/option_types.py: the options of `tune()` and `plan()` for type checkers and editors.

python tests/option_types.py > parallel_tune/option_types.py
"""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_type_hints

from parallel_tune.completion import PATHS
from parallel_tune.config import TrainConfig

HEAD = '''"""The options of `tune()` and `plan()`, for type checkers and editors.

Made by `python tests/option_types.py` from TrainConfig, whose values they become; a test keeps it true. What they do
stands in examples/OPTIONS.md. Names that other tools use are taken as well, unchecked: tune(**{"lora_rank": 8}).
"""

from __future__ import annotations

from os import PathLike
from typing import Any, Literal, TypedDict


class Options(TypedDict, total=False):
    """Settings under their command-line names; what is left out has the default or is planned."""

'''


def render() -> str:
    """The module."""
    hints = get_type_hints(TrainConfig)
    rows = [
        line(item.name, written(item, hints[item.name]))
        for item in dataclasses.fields(TrainConfig)
        if item.name not in ("model", "dataset", "strategy")
    ]
    return HEAD + "\n".join(rows) + "\n"


def line(name: str, kind: str) -> str:
    """A field, as the formatter breaks it."""
    row = f"    {name}: {kind}"
    if len(row) <= 120:
        return row
    head, _, choices = row.partition("[")
    return f"{head}[\n" + "".join(f"        {choice.strip(' ]')},\n" for choice in choices.split(",")) + "    ]"


def written(item: dataclasses.Field[Any], hint: Any) -> str:
    """An option's type as a caller may give it."""
    optional = " | None" if type(None) in get_args(hint) else ""
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    if item.metadata["choices"]:
        switch = " | bool" if {"true", "false"} & set(item.metadata["synonyms"]) else ""
        return f"Literal[{', '.join(map(repr, item.metadata['choices']))}]".replace("'", '"') + switch + optional
    if hint == list[str]:
        return "str | list[str]"
    if str in kinds:
        return "str" + (" | PathLike[str]" if item.name in PATHS else "") + optional
    if float in kinds:
        return "float" + optional
    return (kinds[0].__name__ if isinstance(kinds[0], type) and not get_args(kinds[0]) else "dict[str, Any]") + optional


if __name__ == "__main__":
    print(render(), end="")
