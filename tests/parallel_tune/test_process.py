"""Imports go without garbage collections, which pass over what was made meanwhile ever after."""

from __future__ import annotations

import gc
import importlib.metadata as metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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


def test_a_log_that_takes_no_more_does_not_end_the_process() -> None:
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from parallel_tune.process import redirect_output\n"
        "redirect_output(Path(sys.argv[1]))\n"
        "print('x' * 100_000, flush=True)\n"
        "print('on stderr', file=sys.stderr, flush=True)\n"
        "os._exit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, "/dev/full"], timeout=60, check=False).returncode == 7


def test_a_log_holds_what_is_printed(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from parallel_tune.process import redirect_output\n"
        "redirect_output(Path(sys.argv[1]))\n"
        "print('eins \u00e4')\n"
        "os.write(1, b'zwei\\n')\n"
        "print('drei', file=sys.stderr)\n"
        "os._exit(0)\n"
    )
    log = tmp_path / "log"
    subprocess.run([sys.executable, "-X", "utf8", "-c", script, str(log)], timeout=60, check=True)
    assert log.read_text(encoding="utf-8") == "eins \u00e4\nzwei\ndrei\n"
