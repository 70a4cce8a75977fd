"""Which checkpoints are trusted, and which are deleted."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel_tune.checkpoint import (
    MARK,
    begin,
    complete_checkpoints,
    damaged_file,
    is_complete,
    mark_complete,
    remove_unfinished,
    require_room,
    rotate,
    whole_or_none,
)
from strategies.errors import ConfigError, RunFailed


def make(run: Path, step: int, marked: bool = True) -> Path:
    folder = run / f"checkpoint-{step}"
    (folder / "inner").mkdir(parents=True)
    (folder / "weights").write_bytes(b"x" * 100)
    (folder / "inner" / "state").write_bytes(b"y" * 10)
    (folder / "training_args.bin").write_bytes(b"the Hub token in clear")
    if marked:
        mark_complete(folder)
    return folder


def test_the_mark_vouches_and_secrets_are_gone(tmp_path: Path) -> None:
    folder = make(tmp_path, 4)
    assert is_complete(folder)
    assert not (folder / "training_args.bin").exists()
    assert not is_complete(make(tmp_path, 8, marked=False))


@pytest.mark.parametrize("damage", ["cut", "longer", "gone", "inner", "mark", "empty mark", "odd mark"])
def test_damage_is_seen(tmp_path: Path, damage: str) -> None:
    folder = make(tmp_path, 4)
    match damage:
        case "cut":
            (folder / "weights").write_bytes(b"x" * 99)
        case "longer":
            (folder / "weights").write_bytes(b"x" * 101)
        case "gone":
            (folder / "weights").unlink()
        case "inner":
            (folder / "inner" / "state").unlink()
        case "mark":
            (folder / MARK).unlink()
        case "empty mark":
            (folder / MARK).write_text("")
        case "odd mark":
            (folder / MARK).write_text("[1]")
    assert not is_complete(folder)
    assert complete_checkpoints(tmp_path) == []


def test_a_file_that_cannot_be_read_is_damaged(tmp_path: Path) -> None:
    """A flipped bit in the mark: its list of checksums names a file that is not there."""
    folder = make(tmp_path, 4)
    assert damaged_file(folder) is None
    sizes, checksums = (folder / MARK).read_text().split('"crc32"')
    (folder / MARK).write_text(sizes + '"crc32"' + checksums.replace("weights", "veights"))
    assert is_complete(folder)
    assert damaged_file(folder) == "veights"


def test_a_mark_that_lists_no_checksums_is_damaged(tmp_path: Path) -> None:
    folder = make(tmp_path, 4)
    sizes, _ = (folder / MARK).read_text().split('"crc32"')
    (folder / MARK).write_text(sizes + '"crc32": [1]}')
    assert is_complete(folder)
    assert damaged_file(folder) == MARK
    (folder / MARK).unlink()  # another command trains there, and has deleted it
    assert damaged_file(folder) == MARK


def test_order_is_by_number(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        make(tmp_path, step)
    make(tmp_path, 200, marked=False)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]


def test_only_old_complete_ones_are_deleted(tmp_path: Path) -> None:
    for step in (3, 20, 100):
        make(tmp_path, step)
    torn = make(tmp_path, 2, marked=False)
    mine = tmp_path / "checkpoint-of-mine"
    mine.mkdir()
    rotate(tmp_path, None)
    assert len(complete_checkpoints(tmp_path)) == 3
    rotate(tmp_path, 2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-100"]
    assert torn.exists()
    assert mine.exists()
    rotate(tmp_path, 5)
    assert len(complete_checkpoints(tmp_path)) == 2


def test_one_that_cannot_be_deleted_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network disk keeps a file that somebody has open; a user may delete the same folder."""
    for step in (3, 20, 100):
        make(tmp_path, step)

    def busy(path: Path) -> None:
        raise OSError(39, "Directory not empty", str(path))

    monkeypatch.setattr("parallel_tune.checkpoint.shutil.rmtree", busy)
    rotate(tmp_path, 1)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]


def test_what_a_killed_deletion_left_is_removed_and_nothing_that_is_complete(tmp_path: Path) -> None:
    """Files go in the order of the directory, so the mark may still be there."""
    for step in (3, 20, 100):
        make(tmp_path, step)
    for step in (3, 20):
        begin(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-3" / "weights").unlink()
    assert remove_unfinished(tmp_path) == ["checkpoint-3"]
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-100"]


def test_what_was_not_written_whole_is_removed(tmp_path: Path) -> None:
    folder = make(tmp_path, 4)
    with (
        pytest.raises(RunFailed, match=r"checkpoint-4 could not be written: .*No space left") as caught,
        whole_or_none(folder),
    ):
        raise OSError(28, "No space left on device")
    assert "were free" in caught.value.hint
    assert not (tmp_path / "checkpoint-4").exists()


def test_a_result_that_has_no_room_is_refused(tmp_path: Path) -> None:
    require_room(tmp_path, 1)
    with pytest.raises(ConfigError, match="trained weights take"):
        require_room(tmp_path, 2**70)
