"""What encoded rows depend on, as one key: data, tokenizer, settings and the code that encodes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel_tune import __version__
from parallel_tune.config import TrainConfig
from parallel_tune.data.loading import Row, local_files

PACKAGES = ("tokenizers", "transformers", "jinja2", "pyarrow")
"""Those that read, render and tokenise."""


def data_identity(config: TrainConfig, rows: Sequence[Row] | None) -> dict[str, Any] | None:
    """What tells this dataset from any other: the bytes of its files, or the Hub dataset's fingerprint.

    Args:
        rows: a Hub dataset, loaded; None for local files, which need not be read as rows.

    Returns:
        None where the dataset has nothing that tells its content.
    """
    shared = {"split": config.dataset_split, "max_rows": config.max_rows}
    if config.raw_text is not None:
        return {"text": file_digest(Path(config.raw_text).expanduser()), "max_rows": config.max_rows}
    files = local_files(config.dataset, config.dataset_split)
    if files is not None:
        return {**shared, "files": [[file.suffix.lower(), file_digest(file)] for file in files]}
    # The datasets package derives it from repository, commit, configuration and split.
    fingerprint = getattr(rows, "_fingerprint", None)
    return {**shared, "fingerprint": fingerprint, "rows": len(rows or ())} if fingerprint else None


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """All of a tokenizer, as it is now, that decides what a text becomes: engines change what they load."""
    kind = type(tokenizer)
    template = getattr(tokenizer, "chat_template", None)
    found = {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "template": template,
        "special": {name: str(value) for name, value in tokenizer.special_tokens_map.items()},
        "all_special": list(tokenizer.all_special_tokens),
        "ids": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "added": {str(number): repr(token) for number, token in tokenizer.added_tokens_decoder.items()},
        "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
    }
    if "strftime_now" in json.dumps(template):
        found["date"] = time.strftime("%Y-%m-%d")  # such a template writes today's date into each row
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # Both are set anew in each call.
        found["backend"] = {name: value for name, value in state.items() if name not in ("truncation", "padding")}
        return found
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        found["files"] = [[str(path.relative_to(folder)), file_digest(path)] for path in files]
    return found


def key_of(config: TrainConfig, data: Mapping[str, Any], tokenizer: Any) -> str:
    """A name for the encoded rows, the same exactly where they would be the same."""
    identity = {
        "data": data,
        "tokenizer": tokenizer_identity(tokenizer),
        "settings": [config.max_seq_length, config.answers_only, config.chunk_size, config.stride],
        "code": code_identity(),
        "byteorder": sys.byteorder,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def code_identity() -> list[str | None]:
    """What tells the code that encodes from that of any other version."""
    own = (file_digest(path) for path in sorted(Path(__file__).parent.glob("*.py")))
    return [__version__, *own, *(f"{name} {_version(name)}" for name in PACKAGES)]


def file_digest(path: Path) -> str:
    """What tells a file's content from any other."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
