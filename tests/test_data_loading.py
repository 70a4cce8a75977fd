"""Rows from files, folders and the Hub, and what is said of those that cannot be read."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from parallel_tune.config import make_config
from parallel_tune.data import load_rows
from parallel_tune.data.loading import read_text
from strategies.errors import ConfigError

ROWS = [
    {"instruction": "Say hi, please", "input": "", "output": "Hi!\nThere."},
    {"instruction": "Zähle", "input": "bis 2", "output": '1, "2"'},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        case ".jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        case ".csv" | ".tsv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def failure(dataset: str, split: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_rows(dataset, split)
    assert caught.value.hint
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.tsv", "a.parquet", "A.JSON"])
def test_each_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    if name == "A.JSON":
        write(tmp_path / "a.json", ROWS).rename(tmp_path / name)
    else:
        write(tmp_path / name, ROWS)
    assert list(load_rows(str(tmp_path / name))) == ROWS


def test_json_in_its_other_dresses(tmp_path: Path) -> None:
    (tmp_path / "wrapped.json").write_text(json.dumps({"data": ROWS}))
    (tmp_path / "lines.json").write_text("\n\n".join(json.dumps(row) for row in ROWS))
    (tmp_path / "bom.jsonl").write_text("\ufeff" + json.dumps(ROWS[0]), encoding="utf-8")
    conversation = {"messages": [{"role": "user", "content": "a"}]}
    (tmp_path / "one.json").write_text(json.dumps(conversation))
    assert load_rows(str(tmp_path / "wrapped.json")) == ROWS
    assert load_rows(str(tmp_path / "lines.json")) == ROWS
    assert load_rows(str(tmp_path / "bom.jsonl")) == ROWS[:1]
    assert load_rows(str(tmp_path / "one.json")) == [conversation]


def test_a_folder_is_read_whole_or_by_split(tmp_path: Path) -> None:
    write(tmp_path / "plain" / "b.jsonl", ROWS[1:])
    write(tmp_path / "plain" / "a.csv", ROWS[:1])
    (tmp_path / "plain" / "README.md").write_text("about")
    assert load_rows(str(tmp_path / "plain")) == ROWS
    write(tmp_path / "split" / "data" / "train-00000-of-00001.parquet", ROWS)
    write(tmp_path / "split" / "data" / "test-00000-of-00001.parquet", ROWS[1:])
    assert load_rows(str(tmp_path / "split")) == ROWS
    assert load_rows(str(tmp_path / "split"), "test") == ROWS[1:]
    assert "test, train" in failure(str(tmp_path / "split"), "validation")


def test_a_folder_never_leaves_data_out_unsaid(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    write(folder / "some.jsonl", ROWS)
    write(folder / "evaluation.jsonl", ROWS[1:])
    assert load_rows(str(folder)) == ROWS  # none is named after train
    assert load_rows(str(folder), "eval") == ROWS[1:]
    write(folder / "training.jsonl", ROWS[:1])
    message = failure(str(folder))
    assert "training.jsonl to train on, and some.jsonl, whose name tells no split" in message
    (folder / "some.jsonl").rename(tmp_path / "some.jsonl")
    assert load_rows(str(folder)) == ROWS[:1]
    (folder / "train-2.jsonl.gz").write_bytes(b"")
    assert "compressed data, train-2.jsonl.gz" in failure(str(folder))


def test_a_folder_is_read_through_links(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "b.jsonl", ROWS[1:])
    write(tmp_path / "rows" / "a.jsonl", ROWS[:1])
    (tmp_path / "rows" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "rows" / "loop").symlink_to(tmp_path / "rows")
    (tmp_path / "link").symlink_to(tmp_path / "rows")
    assert load_rows(str(tmp_path / "rows")) == load_rows(str(tmp_path / "link")) == ROWS


def test_part_of_a_split(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", [{"text": str(number)} for number in range(10)]))
    assert [row["text"] for row in load_rows(path, "train[:3]")] == ["0", "1", "2"]
    assert [row["text"] for row in load_rows(path, "train[80%:]")] == ["8", "9"]
    assert "train[1" in failure(path, "train[1")
    assert "no split 'test'" in failure(path, "test")


def test_a_near_name_is_proposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "examples" / "assistant_rows.jsonl", ROWS)
    for slip in ("examples/asistant_rows.jsonl", "example/assistant_rows.jsonl", "examples/assistant_rows.json"):
        assert f"did you mean {path}?" in failure(str(tmp_path / slip))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    assert "did you mean examples/assistant_rows.jsonl?" in failure("examples/assistant_row")  # might be a Hub id


def unreachable(*args: Any, **options: Any) -> None:
    raise ConnectionError("Couldn't reach the Hub")


def test_hub_failures_are_configuration_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    message = failure("owner/some-data")
    assert "owner/some-data" in message
    assert "Couldn't reach the Hub" in message
    assert "local JSON" in message


def test_the_hub_is_asked_for_id_subset_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    asked = []

    def load_dataset(*args: Any, **options: Any) -> Dataset:
        asked.append((args, options))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(load_rows("owner/name", "train[:5%]", "small")) == ROWS
    assert asked == [(("owner/name", "small"), {"split": "train[:5%]"})]


@pytest.mark.parametrize(
    ("name", "content", "seen"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ', "line 2"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', "line 2"),
        ("a.json", '[{"text": "a"},\n 3]', "row 2"),
        ("a.json", '[{"text": "a"},\n', "line 2"),
        ("a.json", "7", "int"),
        ("a.csv", "text,more\na,b\nc\n", "line 3"),
        ("a.csv", "text\na,b\n", "line 2"),
        ("a.csv", 'text\na\n"b\nc\nd\n', "row from line 3"),
        ("a.csv", 'text\n"a" b\n', "row from line 2"),
        ("a.csv", "text,text\na,b\n", "'text' more than once"),
        ("a.csv", "instruction;output\na, b;c\n", "not by ';'"),
        ("a.tsv", "instruction,output\na,b\n", "not by ','"),
        ("a.json", "[" * 100_000, "recursion"),
        ("a.jsonl", '{"text": "a"}\n{"text": ' + "1" * 5000 + "}", "line 2: cannot be read"),
        ("a.parquet", "PAR0", "not Parquet"),
        ("a.jsonl", "", "no rows"),
        ("a.txt", "hello", "of no kind"),
    ],
)
def test_a_broken_file_names_the_place(tmp_path: Path, name: str, content: str, seen: str) -> None:
    (tmp_path / name).write_text(content)
    message = failure(str(tmp_path / name))
    assert seen in message
    assert name in message


@pytest.mark.parametrize("name", ["", " "])
def test_no_name_is_not_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    assert "names nothing" in failure(name)


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    assert "neither a file nor a folder" in failure(str(tmp_path / "a.jsonl"))
    assert "standard input" in failure("-")
    with pytest.raises(ConfigError, match="is not a file"):
        read_text(str(tmp_path / "a.jsonl"))


def test_no_text_is_not_the_default_dataset() -> None:
    with pytest.raises(ConfigError, match="names nothing"):
        make_config({"raw_text_file": ""})


def test_other_bytes_than_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "ä"}'.encode("latin-1"))
    assert "not UTF-8" in failure(str(tmp_path / "a.jsonl"))


def test_a_folder_without_data_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    assert "notes.md" in failure(str(tmp_path))
