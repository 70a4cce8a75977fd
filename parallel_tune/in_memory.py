"""Rows and models that a notebook holds in memory, where training in processes of its own needs files."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sized
from typing import Any

from parallel_tune.cache import cache_folder
from parallel_tune.outcome import write_atomically
from strategies.errors import ConfigError


def dataset_path(dataset: object) -> str:
    """A path or Hub id as it is; of rows in memory, the file in the cache folder that they are written to.

    The file is named after its content, so the same rows are written once, and a resumed run finds them.

    Args:
        dataset: a name, or rows: a list of dicts, a `datasets.Dataset`, a pandas DataFrame.

    Raises:
        ConfigError: it is none of these, or a row is no JSON.
    """
    if isinstance(dataset, str | os.PathLike):
        return os.fspath(dataset)
    rows: Any = _records(dataset) if hasattr(dataset, "notna") and hasattr(dataset, "columns") else dataset
    if isinstance(rows, Mapping):
        raise ConfigError(
            f"the dataset is a {type(dataset).__name__} with {', '.join(map(str, rows))}, not rows",
            'Give one split of it, e.g. dataset["train"].',
        )
    if not isinstance(rows, Iterable) or not isinstance(rows, Sized):
        raise ConfigError(
            f"the dataset is of type {type(dataset).__name__}, which is neither a name nor rows in memory",
            "Give a file, a Hub id, a list of dicts, or a datasets.Dataset.",
        )
    text = "".join(_line(number, row) for number, row in enumerate(rows))
    if not text:
        raise ConfigError("the dataset has no rows", "Give rows to learn.")
    folder = cache_folder() / "datasets"
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_atomically(path, text)
    except OSError as error:
        raise ConfigError(f"the rows cannot be written to {path}: {error.strerror}", "Set XDG_CACHE_HOME.") from error
    return str(path)


def model_name(model: object) -> str:
    """A path or Hub id.

    Raises:
        ConfigError: it is a loaded model, which other processes cannot see.
    """
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    raise ConfigError(
        f"model is a {type(model).__name__} in this process, and training runs in processes of its own",
        "Give its Hub id or folder; model.save_pretrained(folder) and tokenizer.save_pretrained(folder) make one.",
    )


def _records(frame: Any) -> Any:
    """Rows of a DataFrame, in which NaN stands for what is missing."""
    if not frame.columns.is_unique:
        twice = sorted({str(name) for name in frame.columns[frame.columns.duplicated()]})
        raise ConfigError(f"the DataFrame has more than one column {twice[0]!r}", "Give each a name of its own.")
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def _line(number: int, row: object) -> str:
    if not isinstance(row, Mapping):
        raise ConfigError(
            f"row {number} of the dataset is a {type(row).__name__}, not a dict", 'Write {"text": ...}, for example.'
        )
    try:
        line = json.dumps(dict(row), ensure_ascii=False, default=_plain) + "\n"
        line.encode()  # halves of characters cannot be written
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"row {number} of the dataset holds {error.object[error.start]!r}, half of a character", "Correct that row."
        ) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"row {number} of the dataset is no JSON: {error}",
            "Give texts, numbers, lists, and leave out columns that are not learned from.",
        ) from error
    return line


def _plain(value: Any) -> Any:
    """What stands for a value that JSON has not: lists for the arrays that pandas reads Parquet's lists as.

    A time is no text, so that nobody learns one from a column where text belongs.
    """
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, datetime.date | datetime.time):
        return {"time": value.isoformat()}
    raise TypeError(f"a {type(value).__name__} cannot be written")
