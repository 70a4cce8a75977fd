"""Processes of the prediction benchmark: what they hold on the card, how they end, and the constants measured first."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from card_processes import FakeNvml

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"
GIB = 1 << 30


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


CHILD = "import os, subprocess, sys; subprocess.run([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])"


def test_only_what_descends_from_a_row_is_its_use(module: Any) -> None:
    """Two rows whose processes have children, in sessions of their own as workers are, and a stranger's."""
    watch, process = module("prediction_watch"), module("prediction_process")
    worker = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {CHILD!r}], start_new_session=True)"
    rows = [process.start([sys.executable, "-S", "-c", worker], dict(os.environ)) for _ in range(2)]
    try:
        trees = [wait_for_descendants(row.pid, 2) for row in rows]
        moment = {"asked": 0}
        many = threading.Event()

        def held() -> dict[int, int | None]:
            moment["asked"] += 1
            if moment["asked"] > 6:
                many.set()
            high = 3 if moment["asked"] == 2 else 1  # a peak that is over at once
            first, second = trees
            return {first[-1]: high * GIB, first[0]: GIB, second[-1]: 9 * GIB, os.getpid(): 20 * GIB, 2**30: GIB}

        with watch.ProcessMemory("GPU-0", FakeNvml(held), rows[0].pid) as watched:
            assert many.wait(30)
        assert watched.peak_bytes == 4 * GIB
        asked = threading.Event()

        def strangers() -> dict[int, int | None]:
            asked.set()
            return {os.getpid(): GIB}

        with watch.ProcessMemory("GPU-0", FakeNvml(strangers), rows[0].pid) as watched:
            assert asked.wait(30)
        assert watched.peak_bytes is None
    finally:
        for row in rows:
            for child in psutil.Process(row.pid).children(recursive=True):
                child.kill()
            row.kill()
            row.communicate()


def wait_for_descendants(pid: int, count: int) -> list[int]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = [child.pid for child in psutil.Process(pid).children(recursive=True)]
        if len(found) >= count:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{pid} has started {found}")


def test_a_command_is_ended_when_it_takes_too_long_or_all_is_over(module: Any) -> None:
    process = module("prediction_process")
    over = threading.Event()
    talks = [sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(60)"]
    code, output = process.outcome(process.start(talks, dict(os.environ)), 1.5, over)
    assert code == -signal.SIGKILL and output == "begun\n\nended after 1.5 s"
    assert process.outcome(process.start([sys.executable, "-c", "print(1)"], dict(os.environ)), 60, over) == (0, "1\n")
    started = process.start(talks, dict(os.environ))
    threading.Timer(0.3, over.set).start()
    with pytest.raises(process.Ended):
        process.outcome(started, 60, over)
    assert started.returncode == -signal.SIGKILL


PROGRAM = """
import os, pathlib, sys, time
model = pathlib.Path(sys.argv[sys.argv.index("--model") + 1])
assert sys.argv[1:3] == ["plan", "--measure"] and (model / "config.json").exists()
assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-0"
folder = pathlib.Path(os.environ["XDG_CACHE_HOME"]) / "parallel-tune" / "constants"
folder.mkdir(parents=True)
(folder / "card.json").write_text(str(os.getpid()))
time.sleep(1)
"""


def test_constants_are_measured_once_and_each_row_has_them(module: Any, tmp_path: Path) -> None:
    constants = module("prediction_constants")
    program = (sys.executable, "-c", PROGRAM)
    kept = Path("parallel-tune") / "constants" / "card.json"

    def held() -> dict[int, int | None]:
        path = tmp_path / "constants" / kept
        return {int(path.read_text()): GIB} if path.exists() and path.read_text() else {}

    for _ in range(2):
        folder = constants.measured_constants(tmp_path / "constants", "GPU-0", program, FakeNvml(held))
        program = ("/no/such/program",)  # it is not asked again
    for slot in ("slot-0", "slot-1"):
        cache = tmp_path / slot / "cache"
        taught = cache / "parallel-tune" / "corrections" / "card.jsonl"
        taught.parent.mkdir(parents=True)
        taught.write_text("{}\n")
        constants.prepare_cache(cache, folder)
        assert (cache / kept).read_text() == (folder / kept).read_text()
        assert not taught.exists()


@pytest.mark.parametrize("held", [{}, {os.getpid(): GIB}])
def test_jobs_are_refused_where_nvml_does_not_name_our_processes(
    module: Any, held: dict[int, int], tmp_path: Path
) -> None:
    constants = module("prediction_constants")
    program = (sys.executable, "-c", PROGRAM)
    with pytest.raises(SystemExit, match="Leave --jobs out"):
        constants.measured_constants(tmp_path / "constants", "GPU-0", program, FakeNvml(lambda: dict(held)))
    assert not (tmp_path / "constants").exists()
    with pytest.raises(SystemExit, match="exit code 3"):
        failing = (sys.executable, "-c", "raise SystemExit(3)")
        constants.measured_constants(tmp_path / "constants", "GPU-0", failing, FakeNvml(dict))


def test_a_row_beside_others_is_scored_by_its_own_processes(module: Any) -> None:
    device = {"predicted_allocated_bytes": 90, "predicted_peak_bytes": 110, "allocated_peak_bytes": 90}
    device |= {"reserved_peak_bytes": 95, "used_peak_bytes": 300}
    row: dict[str, Any] = {"name": "x", "devices": [device], "plan": {"devices": [{}]}, "process_used_peak_bytes": 100}
    score = module("prediction_figures").score
    for jobs, used, by in ((None, 300, "card"), (1, 300, "card"), (3, 100, "process")):
        measured = dict(row) if jobs is None else row | {"jobs": jobs}
        score(measured)
        assert (measured["used_peak_bytes"], measured["used_by"]) == (used, by)
        assert measured["used_error"] == pytest.approx(110 / used - 1)
    with pytest.raises(ValueError, match="NVML named no process of 'x'"):
        score(row | {"jobs": 2, "process_used_peak_bytes": None})
