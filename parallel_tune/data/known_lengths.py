"""Lengths of rows that were measured before, so that a plan need not load a tokenizer to know them. Imports no torch.

A file is named by all that the lengths depend on and that can be told without a tokenizer: the bytes of the dataset and
of the tokenizer's own files, the settings, and the versions and code of what encodes. Deleting any costs a measurement.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

from parallel_tune.cache import cache_folder, read_object, write_object
from parallel_tune.config import TrainConfig
from parallel_tune.data.identity import code_identity, data_identity, file_digest
from parallel_tune.data.kept import switched_off
from parallel_tune.memory.lookup import model_folder
from strategies.errors import ConfigError

TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja",
    "chat_template*", "additional_chat_templates/*", "*.model", "*.tiktoken", "config.json",
)  # fmt: skip
MOST_FILES = 200
"""Beyond it those made longest ago go."""


def lengths_file(config: TrainConfig) -> Path | None:
    """Where the lengths of a run's training rows are kept; None where nothing tells what they depend on."""
    if not config.data_cache or switched_off():
        return None
    folder = model_folder(config.model)
    if folder is None:
        return None
    tokenizer = {str(path.relative_to(folder)): path for glob in TOKENIZER_FILES for path in sorted(folder.glob(glob))}
    texts = b"".join(path.read_bytes() for path in tokenizer.values() if path.suffix in (".jinja", ".json"))
    if b"strftime_now" in texts or b"auto_map" in texts:
        return None  # today's date in each row, or code that is not among these files
    try:
        data = data_identity(config, None)  # those of a Hub dataset are known once it is loaded
    except (OSError, ConfigError):
        return None
    if data is None:
        return None
    identity = {
        "data": data,
        "tokenizer": {name: file_digest(path) for name, path in tokenizer.items()},
        "settings": [
            config.max_seq_length, config.answers_only, config.chunk_size, config.stride, config.val_size,
            config.seed, config.packing, config.dataset_config,
        ],
        "code": code_identity(),
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "lengths" / f"{key}.json"


def read_lengths(path: Path) -> tuple[list[int], int] | None:
    """Lengths of the training rows and of the longest held-out one; None where nothing is kept that can be read."""
    kept = read_object(path) or {}
    lengths, longest_held_out = kept.get("lengths"), kept.get("longest_held_out")
    if not isinstance(lengths, list) or not lengths or type(longest_held_out) is not int or longest_held_out < 0:
        return None
    return (lengths, longest_held_out) if all(type(length) is int and length > 0 for length in lengths) else None


def keep_lengths(path: Path, lengths: list[int], longest_held_out: int) -> None:
    """Keep them; where that is not possible, the next plan measures again."""
    with contextlib.suppress(OSError):
        write_object(path, {"lengths": lengths, "longest_held_out": longest_held_out})
        others = sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)
        for old in others[:-MOST_FILES]:
            old.unlink(missing_ok=True)
