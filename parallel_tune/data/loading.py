"""Rows from a local file, a folder of files, or the Hub."""

from __future__ import annotations

import csv
import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from parallel_tune.hub_answers import first_line, why_not
from strategies.errors import ConfigError

Row = dict[str, Any]

_SPLIT = re.compile(r"(?P<name>\w+)(?:\[(?P<start>\d*%?):(?P<stop>\d*%?)\])?")
_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
_SPLITS = {name: name for name in ("train", "test", "validation", "valid", "val", "dev", "eval")}
_SPLITS |= {"training": "train", "testing": "test", "evaluation": "eval"}
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that describe a dataset and hold none of its rows."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")


def load_rows(dataset: str, split: str | None = None, subset: str | None = None) -> Sequence[Row]:
    """The rows of a dataset, as dictionaries of its columns.

    Args:
        dataset: a JSON, JSONL, CSV, TSV or Parquet file, a folder of such files, or else the dataset's id on the Hub.
            What exists on disk is taken before the Hub is asked.
        split: "train" (the default), "test", ..., or a part of one: "train[:100]", "train[10%:20%]". In a folder, files
            named after splits (train-00000.parquet, test.jsonl) are told apart by it; where none is named after train,
            other files are the train split.
        subset: a Hub dataset's configuration, where it has several.
    """
    rows: Sequence[Row]
    files = local_files(dataset, split, subset)
    if files is not None:
        match = _parse_split(split)
        rows = [row for file in files for row in _read(file)]
        rows = rows[_bound(match["start"], len(rows), 0) : _bound(match["stop"], len(rows), len(rows))]
    else:
        rows = _from_hub(dataset, split or "train", subset)
    if not len(rows):
        raise ConfigError(f"dataset {dataset!r} has no rows (split {split or 'train'!r})", "name another file or split")
    return rows


def local_files(dataset: str, split: str | None = None, subset: str | None = None) -> list[Path] | None:
    """The files that a dataset's split consists of, in order; None if the dataset is on the Hub.

    Raises:
        ConfigError: it looks like a path and is not there, has no files for the split, or is to have configurations.
    """
    if dataset == "-":
        raise ConfigError("dataset '-' is standard input, and each process reads the data", "write the rows to a file")
    if not dataset.strip():  # Path("") is the working directory, whose files nobody meant
        raise ConfigError(f"dataset {dataset!r} names nothing", "give a file, a folder or a Hub id")
    path = Path(dataset).expanduser()
    if path.exists() and subset is not None:
        raise ConfigError(
            f"dataset_config = {subset!r} is about a dataset on the Hub, and {dataset!r} is here",
            "drop --dataset_config, and name the file or folder that holds those rows",
        )
    if path.exists():
        return _files(path, _parse_split(split)["name"])
    if _looks_local(dataset):
        raise ConfigError(f"dataset {dataset!r} is not there", _near(path) or "check the path; a Hub id is owner/name")
    return None


def _parse_split(split: str | None) -> re.Match[str]:
    match = _SPLIT.fullmatch(split or "train")
    if match is None:
        raise ConfigError(f"split {split!r} is not understood", 'write it as "train" or "train[:100]"')
    return match


def read_text(name: str) -> str:
    """A text file, whole.

    Raises:
        ConfigError: it is not there, is a folder, or is not UTF-8.
    """
    path = Path(name).expanduser()
    if path.exists() and not path.is_file() and not path.is_dir():  # a pipe without a writer would never end
        raise ConfigError(f"{name} is not a file", "write the text to a file, and name that")
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"the text file {name!r} is not there", _near(path) or "check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8 text: byte {error.start}", "save it in UTF-8") from error
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror or error}", "check the file and its rights") from error


def _looks_local(dataset: str) -> bool:
    known = Path(dataset).suffix.lower() in READERS
    return known or dataset.startswith((".", "/", "~")) or _HUB_ID.fullmatch(dataset) is None


def _bound(text: str | None, total: int, default: int) -> int:
    if not text:
        return default
    return round(total * int(text[:-1]) / 100) if text.endswith("%") else int(text)


def _files(path: Path, split: str) -> list[Path]:
    if path.is_file():
        if split != "train":
            raise ConfigError(
                f"{path} is one file and has no split {split!r}", "leave the split away, or name its file"
            )
        return [path]
    if not path.is_dir():  # a pipe can be read once, and each process reads the data
        raise ConfigError(f"{path} is neither a file nor a folder", "write the rows to a file, and name that")
    there = [f for f in _walk(path) if not _hidden(f.relative_to(path))]
    packed = [f for f in there if f.suffix.lower() in COMPRESSED and Path(f.stem).suffix.lower() in READERS]
    if packed:
        raise ConfigError(f"folder {path} has compressed data, {packed[0].name}", "unpack it, or take it out")
    files = [f for f in there if f.suffix.lower() in READERS]
    if not files:
        found = ", ".join(sorted(f.name for f in path.iterdir())[:8]) or "nothing"
        raise ConfigError(
            f"folder {path} has no data files (it holds {found})", f"files may end in {' '.join(READERS)}"
        )
    splits = {f: _split_of(f.relative_to(path)) for f in files}
    chosen = [f for f in files if splits[f] == split]
    if split == "train":
        others = [f for f in files if splits[f] is None]
        if chosen and others:
            raise ConfigError(
                f"folder {path} has {chosen[0].name} to train on, and {others[0].name}, whose name tells no split",
                "name one of the files, or put train, test or validation into each file's name",
            )
        chosen = chosen or others
    if not chosen:
        raise ConfigError(
            f"folder {path} has no file for split {split!r}",
            f"its files are for: {', '.join(sorted({name or 'train' for name in splits.values()}))}",
        )
    return chosen


def _walk(folder: Path) -> list[Path]:
    """All files below a folder, in order, those in linked folders too, each folder once."""

    def refuse(error: OSError) -> None:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}", "check the folder and its rights")

    files, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(root)
        if real in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        files += [Path(root, name) for name in names]
    return sorted(files)


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts) or relative.name in DESCRIPTIONS


def _split_of(relative: Path) -> str | None:
    """The split that a file's folder or name tells: test/a.json, test-00000-of-00001.parquet, my_test.jsonl."""
    words = [word for part in reversed(relative.with_suffix("").parts) for word in re.split(r"[-_.]", part.lower())]
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)


def _read(file: Path) -> list[Row]:
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise ConfigError(f"{file} is of no kind that can be read", f"files may end in {' '.join(READERS)}")
    try:
        return reader(file)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text: byte {error.start}", "save it in UTF-8") from error
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}", "check the file and its rights") from error


def _decoded(text: str, file: Path, line: int | None = None) -> Any:
    """What JSON says; `json.JSONDecodeError` where it is none.

    Raises:
        ConfigError: it is JSON, and Python will not read it.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        where = f"{file}, line {line}" if line is not None else str(file)
        raise ConfigError(f"{where}: cannot be read ({str(error).split(';')[0]})", "correct that value") from error


def _json(file: Path) -> list[Row]:
    text = file.read_text(encoding="utf-8-sig")
    try:
        value = _decoded(text, file)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one value a line, under the other name
            return _jsonl(file)
        raise ConfigError(f"{file}, line {error.lineno}: not JSON ({error.msg})", "correct that line") from error
    if isinstance(value, dict):
        lists = [entry for entry in value.values() if isinstance(entry, list)]
        # {"data": [...]} is a wrapper around the rows; any other object is the only row of a file of lines
        value = lists[0] if len(value) == 1 and lists and _all_objects(lists[0]) else [value]
    if not isinstance(value, list):
        raise ConfigError(f"{file} holds one {type(value).__name__}, not rows", "make it a list of objects")
    return [_object(row, f"{file}, row {number}") for number, row in enumerate(value, 1)]


def _all_objects(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(v, dict) and not {"role", "from"} & v.keys() for v in values)


def _jsonl(file: Path) -> list[Row]:
    rows = []
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                rows.append(_object(_decoded(line, file, number), f"{file}, line {number}"))
            except json.JSONDecodeError as error:
                raise ConfigError(f"{file}, line {number}: not JSON ({error.msg})", "correct that line") from error
    return rows


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {json.dumps(value)[:60]} is not an object", "each row must be {column: value}")
    return value


def _csv(file: Path) -> list[Row]:
    limit = csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    began = 1
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            # Strict, since a quote that nothing closes would take all that follows into one field.
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            heading = next(reader, [])
            _check_heading(heading, delimiter, file)
            rows: list[Row] = []
            began = reader.line_num + 1
            for fields in reader:
                if fields and len(fields) != len(heading):
                    raise ConfigError(
                        f"{file}, line {reader.line_num}: {len(fields)} fields, and the heading has {len(heading)} "
                        f"({', '.join(heading)})",
                        "put a text that holds commas, quotes or line ends in double quotes",
                    )
                if fields:  # a blank line has none
                    rows.append(dict(zip(heading, fields, strict=True)))
                began = reader.line_num + 1
            return rows
    except csv.Error as error:
        raise ConfigError(
            f"{file}, row from line {began}: not CSV ({error})",
            'close each quote, and write a quote within a quoted text twice ("")',
        ) from error
    finally:
        csv.field_size_limit(limit)  # the limit is the csv module's own global


def _check_heading(heading: list[str], delimiter: str, file: Path) -> None:
    other = next((mark for mark in (";", "\t", "|", ",") if mark in "".join(heading) and mark != delimiter), None)
    if other is not None and len(heading) == 1:
        raise ConfigError(
            f"{file}: its heading {heading[0][:60]!r} is one field, since {file.suffix} files separate fields by "
            f"{delimiter!r}, not by {other!r}",
            "save it with that separator, or as .tsv if tabs separate its fields",
        )
    twice = sorted({name for name in heading if heading.count(name) > 1})
    if twice:
        raise ConfigError(f"{file}: its heading has {twice[0]!r} more than once", "give each column a name of its own")


def _parquet(file: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[Row] = pq.read_table(file).to_pylist()
    except pa.ArrowException as error:
        raise ConfigError(f"{file}: not Parquet ({str(error).splitlines()[0]})", "write the file again") from error
    return rows


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


def _from_hub(dataset: str, split: str, subset: str | None) -> Sequence[Row]:
    try:
        import datasets
    except ImportError as error:
        message = f"dataset {dataset!r} is no local file, and reading from the Hub needs the package datasets"
        raise ConfigError(message, "pip install datasets") from error
    try:
        rows: Sequence[Row] = datasets.load_dataset(dataset, subset, split=split)
    except Exception as error:  # whatever the Hub, the network or the dataset's files raise is about this name
        told = why_not(error)
        if told is not None:
            raise ConfigError(f"dataset {dataset!r} cannot be loaded from the Hub: {told[0]}", told[1]) from error
        raise ConfigError(
            f"dataset {dataset!r} cannot be loaded: {type(error).__name__}: {first_line(error)}",
            _near(Path(dataset)) or _hub_hint(error),
        ) from error
    return rows


def _hub_hint(error: Exception) -> str:
    text = f"{type(error).__name__} {error}".lower()
    if "gated" in text or "authenticat" in text:
        return "accept its terms on the Hub and log in with `hf auth login`"
    if "split" in text or "config" in text:
        return "choose another split or subset"
    if any(word in text for word in ("offline", "connect", "reach", "timed out", "resolve")):
        return "without a network give a local JSON, JSONL, CSV or Parquet file"
    return "check the id on huggingface.co/datasets, or give a local JSON, JSONL, CSV or Parquet file"


def _near(path: Path) -> str:
    """A hint that names what lies close by, for a path with a slip in its last part or in one before it."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    names = {entry.name: entry for entry in missing.parent.iterdir()} if missing.parent.is_dir() else {}
    stems = {Path(name).stem: name for name in names}
    close = difflib.get_close_matches(missing.name, [*names, *stems], n=1, cutoff=0.6)
    if not close:
        return ""
    return f"did you mean {missing.parent / stems.get(close[0], close[0]) / path.relative_to(missing)}?"
