"""Encoded rows are kept by all that they depend on: the same comes back, and nothing else ever does."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parallel_tune.config import TrainConfig, make_config
from parallel_tune.data import kept
from parallel_tune.data.encoding import encode_rows
from parallel_tune.data.identity import data_identity, key_of
from parallel_tune.data.prepare import encoded_rows
from parallel_tune.data.rows import EncodedRows
from parallel_tune.known_rows import measure_rows
from strategies.errors import ConfigError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(kept.SWITCH, raising=False)
    return tmp_path / "cache" / "parallel-tune" / "rows"


@pytest.fixture
def config(rows_file: Path, tmp_path: Path) -> TrainConfig:
    shutil.copy(rows_file, tmp_path / "data.jsonl")
    return make_config({"dataset": str(tmp_path / "data.jsonl"), "max_seq_length": 64})


@pytest.fixture
def tokenizer(tied_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tied_model)


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.rows"))


def fresh(config: TrainConfig, tokenizer: Any) -> kept.Encoded:
    return encoded_rows(config.replace(data_cache=False), tokenizer)


def test_what_was_kept_comes_back_whole(
    cache: Path, config: TrainConfig, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = fresh(config, tokenizer)
    assert not cache.exists()
    first = encoded_rows(config, tokenizer)
    assert "are kept in" in capsys.readouterr().out
    again = encoded_rows(config, tokenizer)
    assert "were read from" in capsys.readouterr().out
    assert expected == first == again
    assert len(entries(cache)) == 1 and not list(cache.glob(".*"))
    assert cache.stat().st_mode & 0o077 == 0  # the user's data


CHANGES: dict[str, Callable[[TrainConfig, Any], TrainConfig]] = {
    "a row": lambda config, _: (edit(config), config)[1],
    "the length": lambda config, _: config.replace(max_seq_length=63),
    "what is learned": lambda config, _: config.replace(answers_only=True),
    "the number of rows": lambda config, _: config.replace(max_rows=30),
    "the part": lambda config, _: config.replace(dataset_split="train[:30]"),
    "the template": lambda config, tok: (setattr(tok, "chat_template", tok.chat_template + " "), config)[1],
    "a token": lambda config, tok: (tok.add_tokens(["alpha beta"]), config)[1],
    "the end": lambda config, tok: (setattr(tok, "eos_token", "<s>"), config)[1],
    "the backend": lambda config, tok: (
        setattr(tok.backend_tokenizer, "normalizer", __import__("tokenizers").normalizers.Lowercase()),
        config,
    )[1],
}


def edit(config: TrainConfig) -> None:
    """Another word in one row; size and time of the file stay."""
    path = Path(config.dataset)
    stat = path.stat()
    path.write_text(
        path.read_text().replace("alpha", "gamma", 1).replace("gamma", "alpha", 1).replace("tree", "eert", 1)
    )
    assert path.stat().st_size == stat.st_size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_them_misses(change: str, cache: Path, config: TrainConfig, tokenizer: Any) -> None:
    encoded_rows(config, tokenizer)
    changed = CHANGES[change](config, tokenizer)
    assert encoded_rows(changed, tokenizer) == fresh(changed, tokenizer)
    assert len(entries(cache)) == 2


def test_what_does_not_change_them_hits(cache: Path, config: TrainConfig, tokenizer: Any, tmp_path: Path) -> None:
    encoded_rows(config, tokenizer)
    shutil.copy(config.dataset, tmp_path / "elsewhere.jsonl")
    tokenizer("a text", padding="max_length", truncation=True, max_length=5)  # leaves its state in the tokenizer
    tokenizer.padding_side = "left"
    encoded_rows(config.replace(dataset=str(tmp_path / "elsewhere.jsonl"), learning_rate=1.0, seed=1), tokenizer)
    assert len(entries(cache)) == 1


def test_raw_text_is_kept_by_its_content_and_its_chunks(cache: Path, tokenizer: Any, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("alpha beta gamma delta " * 50)
    config = make_config({"dataset": str(text), "max_seq_length": 64})
    for changed in (config, config, config.replace(chunk_size=32), config.replace(stride=3)):
        assert encoded_rows(changed, tokenizer) == fresh(changed, tokenizer)
    assert len(entries(cache)) == 3
    text.write_text("alpha beta gamma delta " * 49)
    assert encoded_rows(config, tokenizer) == fresh(config, tokenizer)
    assert len(entries(cache)) == 4


def test_a_template_that_writes_the_date_is_encoded_each_day(
    config: TrainConfig, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_identity(config, None)
    assert data is not None
    plain = key_of(config, data, tokenizer)
    monkeypatch.setattr(time, "strftime", lambda _: "1999-12-31")
    assert key_of(config, data, tokenizer) == plain
    tokenizer.chat_template += "{{ strftime_now('%d %b %Y') }}"
    keys = {key_of(config, data, tokenizer)}
    monkeypatch.setattr(time, "strftime", lambda _: "2000-01-01")
    assert key_of(config, data, tokenizer) not in keys


def test_a_hub_dataset_is_kept_by_its_fingerprint(
    cache: Path, config: TrainConfig, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def dataset(word: str) -> Any:
        made = datasets.Dataset.from_list([{"text": f"{word} {number}"} for number in range(9)])
        made._fingerprint = word
        return made

    config = config.replace(dataset="someone/rows")
    for word, number, count in (("alpha", None, 1), ("alpha", None, 1), ("beta", None, 2), ("beta", 4, 3)):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, word=word, **__: dataset(word))
        changed = config.replace(max_rows=number)
        assert encoded_rows(changed, tokenizer) == fresh(changed, tokenizer)
        assert len(entries(cache)) == count
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"text": "alpha"}])
    assert len(encoded_rows(config, tokenizer)[0]) == 1  # nothing tells its content
    assert len(entries(cache)) == 3


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "torn": lambda data: data[:-7],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0",
    "a flipped bit": lambda data: data[:-50] + bytes([data[-50] ^ 1]) + data[-49:],
    "another figure": lambda data: re.sub(rb'"rows": \d+', b'"rows": 7', data, count=1),
    "no header": lambda data: b"[1]\n" + data,
    "huge counts": lambda data: re.sub(rb'"counts": \[\d+', b'"counts": [99999999999999', data, count=1),
    "negative counts": lambda data: re.sub(rb'"counts": \[\d+', b'"counts": [-5', data, count=1),
    "not text": lambda data: b"\xff\xfe" + data,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_encoded_again(
    damage: str, cache: Path, config: TrainConfig, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = encoded_rows(config, tokenizer)
    (path,) = entries(cache)
    whole = path.read_bytes()
    path.write_bytes(DAMAGE[damage](whole))
    assert path.read_bytes() != whole
    capsys.readouterr()
    assert encoded_rows(config, tokenizer) == expected
    assert "is damaged" in capsys.readouterr().out
    assert path.read_bytes() == whole


@pytest.mark.parametrize("how", ["option", "0", "off"])
def test_it_can_be_switched_off(
    how: str, cache: Path, config: TrainConfig, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "option":
        config = config.replace(data_cache=False)
    else:
        monkeypatch.setenv(kept.SWITCH, how)
    encoded_rows(config, tokenizer)
    assert not cache.exists()


def test_a_folder_that_cannot_be_written_costs_nothing_else(
    cache: Path, config: TrainConfig, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert encoded_rows(config, tokenizer) == fresh(config, tokenizer)
    assert "not kept" in capsys.readouterr().out


def test_a_dataset_that_changes_while_it_is_read_is_not_kept(
    cache: Path, config: TrainConfig, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(rows: Any, *settings: Any) -> Any:
        edit(config)
        return encode_rows(rows, *settings)

    monkeypatch.setattr("parallel_tune.data.prepare.encode_rows", slow)
    encoded_rows(config, tokenizer)
    assert not entries(cache)


def test_errors_are_those_of_the_dataset(cache: Path, config: TrainConfig, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="is not there"):
        encoded_rows(config.replace(dataset="nowhere.jsonl"), tokenizer)
    Path(config.dataset).write_text("")
    with pytest.raises(ConfigError, match="has no rows"):
        encoded_rows(config, tokenizer)
    assert not entries(cache)


def test_those_used_longest_ago_make_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = EncodedRows([{"input_ids": [1] * 1000, "labels": [1] * 1000}])
    report = replace(kept.DataReport("text", 1), length_percentiles={50: 1000})
    monkeypatch.setattr(kept, "MOST_BYTES", 3 * 9000)

    def ask(key: str) -> None:
        kept.kept_or_encoded(key, lambda: (rows, report), lambda: True)

    for at, key in enumerate("abc"):
        ask(key)
        os.utime(cache / f"{key}.rows", (at, at))
    ask("a")  # used again
    (cache / ".killed.rows.1.part").write_bytes(b"half")
    os.utime(cache / ".killed.rows.1.part", (0, 0))
    ask("d")
    assert [path.stem for path in entries(cache)] == ["a", "c", "d"]
    assert not list(cache.glob(".*"))
    monkeypatch.setattr(kept, "MOST_BYTES", 1000)
    ask("e")
    assert len(entries(cache)) == 3


def ask_slowly(folder: str, number: int, notes: str) -> None:
    """What each of several processes does."""
    os.environ["XDG_CACHE_HOME"] = folder

    def encode() -> kept.Encoded:
        (Path(notes) / f"encoded-{number}").touch()
        time.sleep(0.5)
        rows = EncodedRows([{"input_ids": [5] * 9, "labels": [5] * 9}])
        return rows, kept.DataReport("text", 1)

    rows, report = kept.kept_or_encoded("key", encode, lambda: True)
    (Path(notes) / f"got-{number}").write_text(json.dumps([rows.lengths, report.rows]))


def run_all(processes: list[Any]) -> None:
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0


def test_of_several_processes_one_encodes(cache: Path, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    arguments = [(str(tmp_path / "cache"), number, str(tmp_path)) for number in range(4)]
    run_all([spawn.Process(target=ask_slowly, args=each) for each in arguments])
    assert len(list(tmp_path.glob("encoded-*"))) == 1
    assert [path.read_text() for path in tmp_path.glob("got-*")] == ["[[9], 1]"] * 4


def test_who_waits_too_long_encodes_as_well(
    cache: Path, config: TrainConfig, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = EncodedRows([{"input_ids": [5] * 9, "labels": [5] * 9}])
    with kept._alone(cache / "key.rows", 0.0):
        kept.kept_or_encoded("key", lambda: (rows, kept.DataReport("text", 1)), lambda: True, patience_seconds=0.2)
    assert "encoding as well" in capsys.readouterr().out
    assert [path.stem for path in entries(cache)] == ["key"]


def test_two_ranks_encode_once_and_take_what_the_plan_kept(
    tune: Any, compared: Callable[[str], Any], cache: Path, tied_model: Path, rows_file: Path
) -> None:
    """Real runs: of two ranks one encodes; where the plan has read the lengths, neither does."""
    options = ("--strategy=ddp", "--hardware=cpu:2", "--max_steps=3")
    env = {"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]}

    def count(run: Any) -> tuple[int, int]:
        ranks = [run.run / "logs" / f"rank-{rank}.log" for rank in range(run.plan["processes"])]
        said = [path.read_text() for path in ranks]
        words = ("encoded rows are kept in", "encoded rows were read from")
        return sum(words[0] in text for text in said), sum(words[1] in text for text in said)

    first = tune(*options, env=env)
    assert count(first) == (1, 1)
    shutil.rmtree(cache)
    settings = {"model": str(tied_model), "dataset": str(rows_file), "answers_only": True, "max_seq_length": 256}
    measure_rows(make_config(settings))
    assert len(entries(cache)) == 1
    second = tune(*options, env=env)
    assert count(second) == (0, 2)
    assert second.losses == first.losses
    third = compared("no rows kept")
    assert count(third) == (0, 0)
    assert third.losses == pytest.approx(first.losses, rel=1e-5)
