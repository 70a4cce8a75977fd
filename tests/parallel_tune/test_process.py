"""Imports go without garbage collections, which pass over what was made meanwhile ever after."""

from __future__ import annotations

import gc
import importlib.metadata as metadata
import subprocess
import sys
from collections.abc import Iterator

import pytest

from parallel_tune.process import importing


@pytest.fixture
def collections() -> Iterator[list[str]]:
    """The collections that have begun."""
    begun: list[str] = []

    def note(phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            begun.append(phase)

    gc.callbacks.append(note)
    yield begun
    gc.callbacks.remove(note)
    gc.unfreeze()


def many_objects() -> list[list[int]]:
    return [[number] for number in range(10 * gc.get_threshold()[0])]


def test_no_collection_runs_among_imports_and_later_ones_pass_over_what_they_made(collections: list[str]) -> None:
    assert many_objects() and collections
    collections.clear()
    with importing():
        kept = many_objects()
        assert not collections
    assert gc.isenabled() and gc.get_freeze_count() >= len(kept)
    assert many_objects() and collections


def test_a_failed_import_leaves_collections_on(collections: list[str]) -> None:
    with pytest.raises(ImportError), importing():
        raise ImportError("no such library")
    assert gc.isenabled()
    assert many_objects() and collections


def test_the_metadata_of_all_packages_are_read_once_among_imports() -> None:
    before = metadata.packages_distributions
    with importing():
        first = metadata.packages_distributions()
        assert metadata.packages_distributions() is first
    assert metadata.packages_distributions is before
    assert first == before() and first is not before()


def test_a_process_that_imported_so_ends_without_a_word() -> None:
    """The last line of stderr is what a failed process is said to have died of."""
    pytest.importorskip("triton")
    program = "from parallel_tune.process import importing\nwith importing():\n    import triton._C.libtriton"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == done.stderr == ""
