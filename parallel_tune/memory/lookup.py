"""Find a model's facts: a local folder, the Hub cache, the built-in catalogue, the Hub."""

from __future__ import annotations

import difflib
import json
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

from parallel_tune.hub_answers import why_not
from parallel_tune.memory.facts import ModelFacts, facts_from_config
from strategies.errors import ConfigError

HUB_TIMEOUT_SECONDS = 5.0
"""How long one request to the Hub may take: a plan is to answer, or to say why not, at once."""
_HUB_ANSWERS = {
    "RepositoryNotFoundError": "the Hub has no such model, or shows it only to those who are logged in",
    "GatedRepoError": "the Hub gives it only to those who are logged in and have accepted its terms",
    "RemoteEntryNotFoundError": "on the Hub it has no config.json",
    "EntryNotFoundError": "on the Hub it has no config.json",
    "RevisionNotFoundError": "on the Hub it has no such revision",
}
QUANTIZED_SUFFIXES = ("-unsloth-bnb-4bit", "-bnb-4bit")
"""Endings of repositories that hold a known model's weights in bitsandbytes' 4-bit form."""


def load_model_facts(model: str, *, revision: str | None = None, offline: bool | None = None) -> ModelFacts:
    """The facts of a model given as a folder or as a Hub name; see `load_model_config`."""
    return facts_from_config(*load_model_config(model, revision=revision, offline=offline))


def load_model_config(
    model: str, *, revision: str | None = None, offline: bool | None = None
) -> tuple[dict[str, Any], str]:
    """The config.json of a model given as a folder or as a Hub name, and what to call it in an error.

    Looked at, in turn: the folder's config.json; the Hub cache; the catalogue; the Hub itself. A name that the
    catalogue knows never costs a request.

    Args:
        revision: branch, tag or commit on the Hub; a revision is not looked up in the catalogue.
        offline: ask the Hub nothing; None means what HF_HUB_OFFLINE says.

    Raises:
        ConfigError: nothing is known of the model, or its config.json cannot be read.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        path = folder / "config.json"
        if not path.is_file():
            raise ConfigError(f"{model} is a folder without a config.json", "Give the folder that holds the model.")
        return _read(path), str(path)
    looked_at = ["a local folder", f"the Hub cache {hub_cache()}"]
    cached = _cached_config(model, revision or "main")
    if cached is not None:
        return _read(cached), str(cached)
    if revision is None:
        looked_at.append("the catalogue")
        config, quantized = catalog_config(model)
        if config is not None:
            return {**config, **_quantization(quantized)}, f"the catalogue's {model}"
    told = None
    hub_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model) is not None
    offline = _offline() if offline is None else offline
    reason = "offline" if offline else "not a Hub name"
    if hub_name and not offline:
        looked_at.append("the Hub")
        try:
            return _hub_config(model, revision), f"config.json of {model}"
        except ConfigError:
            raise
        except Exception as error:  # requests, httpx and huggingface_hub each have a family of their own
            name = type(error).__name__
            told = None if name in _HUB_ANSWERS else why_not(error)
            reason = _HUB_ANSWERS.get(name, f"the Hub cannot be asked: {told[0] if told else name}")
    address = re.search(r"huggingface\.co/(\w[\w.-]*/\w[\w.-]*)", model)
    if address is not None:
        raise ConfigError(f"{model!r} is an address, and a model is named", f"Give its name: --model {address[1]}")
    near = nearest_names(model)
    raise ConfigError(
        f"nothing is known of model {model!r}: looked at {', '.join(looked_at)} ({reason})",
        told[1]
        if told
        else (f"Did you mean {', '.join(near)}? Or give" if near else "Give")
        + " a folder with a config.json, or go online once so that it is cached.",
    )


def model_folder(model: str) -> Path | None:
    """Where a model's files lie on this machine: its folder, or its snapshot in the Hub cache; None if they do not."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    cached = _cached_config(model, "main")
    return cached.parent if cached is not None else None


def catalog() -> dict[str, dict[str, Any]]:
    """The built-in rows: canonical name -> {parameters, aliases, config}."""
    text = resources.files("parallel_tune").joinpath("catalog.json").read_text(encoding="utf-8")
    rows: dict[str, dict[str, Any]] = json.loads(text)
    return rows


def catalog_config(model: str) -> tuple[dict[str, Any] | None, bool]:
    """The catalogue's config of a model, if it has one, and whether the name asks for a 4-bit repository.

    Case does not matter; unsloth/X stands for the row or alias that ends in /X, with or without a 4-bit suffix.
    """
    wanted = model.lower()
    quantized = False
    for suffix in QUANTIZED_SUFFIXES:
        if wanted.endswith(suffix):
            wanted, quantized = wanted.removesuffix(suffix), True
            break
    names = _names()
    row = names.get(wanted)
    if row is None and (wanted.startswith("unsloth/") or "/" not in wanted):
        short = wanted.rsplit("/", 1)[-1]
        row = next((row for name, row in names.items() if name.rsplit("/", 1)[-1] == short), None)
    return (row["config"], quantized) if row is not None else (None, quantized)


def nearest_names(model: str, count: int = 3) -> list[str]:
    """Catalogue names that look like this one."""
    names = {alias: alias for key, row in catalog().items() for alias in (key, *row["aliases"])}
    lower = {name.lower(): name for name in names}
    short = {name.rsplit("/", 1)[-1]: full for name, full in lower.items()}
    wanted = model.lower()
    near = [lower[hit] for hit in difflib.get_close_matches(wanted, lower, count, cutoff=0.6)]
    near += [short[hit] for hit in difflib.get_close_matches(wanted.rsplit("/", 1)[-1], short, count, cutoff=0.6)]
    return list(dict.fromkeys(near))[:count]


def hub_cache() -> Path:
    """Where huggingface_hub keeps its snapshots, by the variables that it reads itself."""
    explicit = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or str(Path(cache_home) / "huggingface")
    return Path(home).expanduser() / "hub"


def _names() -> dict[str, dict[str, Any]]:
    rows = catalog()
    names = {key.lower(): row for key, row in rows.items()}
    for row in rows.values():
        names.update({alias.lower(): row for alias in row["aliases"]})
    return names


def _quantization(quantized: bool) -> dict[str, Any]:
    return {"quantization_config": {"load_in_4bit": True}} if quantized else {}


def _cached_config(model: str, revision: str) -> Path | None:
    """config.json of a model's snapshot, if the cache has it: refs/REVISION names the commit's folder."""
    repository = hub_cache() / f"models--{model.replace('/', '--')}"
    reference = repository / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    path = repository / "snapshots" / commit / "config.json"
    return path if path.is_file() else None


def _hub_config(model: str, revision: str | None) -> dict[str, Any]:
    # Imported here because it costs a second, and most plans need no network. It reads HF_ENDPOINT itself.
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    # Downloading tries again and again for half a minute, and says so; this asks once.
    get_hf_file_metadata(hf_hub_url(model, "config.json", revision=revision), timeout=HUB_TIMEOUT_SECONDS)
    path = hf_hub_download(model, "config.json", revision=revision, etag_timeout=HUB_TIMEOUT_SECONDS)
    return _read(Path(path))


def _offline() -> bool:
    return any(
        os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "Restore the model's config.json.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is not an object but {type(config).__name__}", "Restore the model's config.json.")
    return config
