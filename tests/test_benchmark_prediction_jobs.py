"""Rows of the prediction benchmark beside each other: who runs when, in which folders, and how they are scored."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from card_processes import FakeNvml

from parallel_tune.hardware import parse_hardware
from parallel_tune.nvml import Probe

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"
CARD = "1xH100-80GB"
GIB = 1 << 30


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


class Card:
    """Runs tasks that last until they are told to end, and keeps who was there together."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.together: list[set[str]] = []
        self.slots: dict[str, int] = {}
        self._running: set[str] = set()
        self._lock = threading.Lock()

    def run(self, row: Any, slot: int, over: threading.Event) -> str:
        with self._lock:
            self.order.append(row.name)
            self._running.add(row.name)
            assert slot not in {self.slots[name] for name in self._running - {row.name}}
            self.slots[row.name] = slot
            self.together.append(set(self._running))
        subprocess.run([sys.executable, "-S", "-c", "import time; time.sleep(0.3)"], check=True)
        with self._lock:
            self._running.discard(row.name)
        return str(row.name)


def tasks_of(module: Any, *wanted: tuple[str, int, bool]) -> list[Any]:
    task = module("prediction_jobs").Task
    return [task(SimpleNamespace(name=name), size, alone) for name, size, alone in wanted]


def run_all(module: Any, tasks: list[Any], jobs: int, room: int, card: Card, **more: Any) -> int:
    calls = {"done": lambda task, result: False, "in_time": lambda row: True, "settle": lambda: None} | more
    return int(module("prediction_jobs").run_side_by_side(tasks, jobs, room, card.run, **calls))


def test_rows_share_the_card_as_far_as_they_fit_and_those_alone_do_not(module: Any) -> None:
    wanted = [("a", 50, False), ("b", 40, False), ("c", 30, False), ("edge", 1, True), ("d", 20, False)]
    wanted += [("huge", 500, False), ("e", 20, False)]
    sizes = {name: size for name, size, _ in wanted}
    card, settled = Card(), []
    left = run_all(module, tasks_of(module, *wanted), 3, 85, card, settle=lambda: settled.append(card.order[-1:]))
    assert left == 0
    assert sorted(card.order) == sorted(sizes)
    assert card.order.index("c") < card.order.index("b")  # there was room for it, beside a, and for b there was none
    assert card.order.index("edge") == 3  # nothing overtook it
    assert {"d", "e"} in card.together
    for names in card.together:
        assert len(names) <= 3
        assert len(names) == 1 or (sum(sizes[name] for name in names) <= 85 and "edge" not in names)
    assert settled[0] == [] and ["edge"] in settled  # whoever comes first finds a card at rest


def test_no_more_rows_than_jobs_and_one_job_keeps_the_order(module: Any) -> None:
    wanted = [(str(number), 1, False) for number in range(5)]
    card = Card()
    run_all(module, tasks_of(module, *wanted), 2, 100, card)
    assert max(len(names) for names in card.together) == 2
    assert set(card.slots.values()) == {0, 1}
    card = Card()
    run_all(module, tasks_of(module, *wanted), 1, 100, card)
    assert card.order == [name for name, _, _ in wanted]
    assert all(len(names) == 1 for names in card.together)


def test_a_row_that_failed_beside_others_is_run_again_alone(module: Any) -> None:
    card = Card()
    said: list[tuple[str, bool]] = []

    def done(task: Any, result: str) -> bool:
        said.append((result, task.alone))
        return result == "b" and not task.alone

    run_all(module, tasks_of(module, ("a", 1, False), ("b", 1, False), ("c", 1, False)), 3, 9, card, done=done)
    assert said.count(("b", False)) == said.count(("b", True)) == 1
    assert card.together[-1] == {"b"} and len(card.order) == 4


def test_when_time_is_short_no_row_begins_and_those_that_run_end(module: Any) -> None:
    card, ended = Card(), []
    left = run_all(
        module,
        tasks_of(module, *((str(number), 1, False) for number in range(6))),
        2,
        9,
        card,
        done=lambda task, result: bool(ended.append(result)),
        in_time=lambda row: row.name != "3",
    )
    assert left == 3
    assert sorted(ended) == card.order == ["0", "1", "2"]


def test_room_leaves_what_unsloth_looks_at(module: Any) -> None:
    jobs = module("prediction_jobs")
    assert jobs.room_bytes(80 * GIB) == int(0.85 * 80 * GIB)
    assert jobs.room_bytes(24 * GIB) == 14 * GIB


def test_what_rows_are_expected_to_hold_is_what_their_plans_say(module: Any) -> None:
    known = module("prediction_rows")
    rows = {row.name: row for row in (*known.ROWS, *known.SEEN_ROWS)}
    device = parse_hardware(CARD).devices[0]
    expected = {name: module("prediction_jobs").expected_bytes(rows[name], device) for name in rows}
    assert all(3 * GIB < size < 0.85 * device.free_bytes for size in expected.values())
    fixed = BENCHMARKS / "results" / "prediction.fixed-segments.NVIDIA-H100-80GB-HBM3.json"
    measured = {
        row["name"]: row["used_peak_bytes"] for row in json.loads(fixed.read_text())["rows"] if "used_error" in row
    }
    compared = rows.keys() & measured
    assert len(compared) >= 3
    for name in compared:
        assert measured[name] < module("prediction_jobs").expected_bytes(replace(rows[name], allocator="fixed"), device)


ROW_PROGRAM = """
import os, sys, time
print(os.environ["XDG_CACHE_HOME"], flush=True)
time.sleep(float(sys.argv[1]))
"""


@pytest.fixture
def benchmark(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark with small processes for rows, on a card that is not there."""
    prediction = module("prediction")
    found = Probe(parse_hardware(CARD), ("GPU-0",), ())
    monkeypatch.setattr(prediction, "probe_details", lambda _: found)
    (tmp_path / "models").mkdir()

    class Models:
        def __init__(self, folder: Path, wanted: list[str]) -> None:
            pass

        def wait_for(self, shape: str, over: threading.Event) -> Path:
            return tmp_path / "models"

        def done_with(self, shape: str) -> None:
            pass

        def close(self) -> None:
            pass

    monkeypatch.setattr(prediction, "Models", Models)
    monkeypatch.setattr(prediction, "measured_constants", lambda folder, gpu: tmp_path / "constants")
    (tmp_path / "constants" / "parallel-tune" / "constants").mkdir(parents=True)
    (tmp_path / "constants" / "parallel-tune" / "constants" / "card.json").write_text("{}")
    prediction.seconds = "0.3"
    real = prediction.start

    def start(command: list[str], variables: dict[str, str]) -> subprocess.Popen[str]:
        assert (Path(variables["XDG_CACHE_HOME"]) / "parallel-tune" / "constants" / "card.json").exists()
        assert Path(command[command.index("--dataset") + 1]).parent == Path(variables["XDG_CACHE_HOME"]).parent
        process: subprocess.Popen[str] = real([sys.executable, "-S", "-c", ROW_PROGRAM, prediction.seconds], variables)
        prediction.started.append((process, time.monotonic()))
        return process

    prediction.started = []
    monkeypatch.setattr(prediction, "start", start)
    return prediction


def test_rows_run_beside_each_other_in_folders_of_their_own(
    module: Any, benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: list[str] = []
    real = benchmark.outcome

    def outcome(process: Any, limit: float, over: threading.Event) -> tuple[int, str]:
        _, output = real(process, limit, over)
        outputs.append(output.strip())
        return 1, "CUDA out of memory"  # there is no report, as of a row that failed

    monkeypatch.setattr(benchmark, "outcome", outcome)
    options = ["--work", str(tmp_path / "work"), "--results", str(tmp_path), "--only", "qwen3-4b", "--jobs", "2"]
    path = benchmark.main(options)
    rows = json.loads(path.read_text())["rows"]
    expected = [row.name for row in module("prediction_rows").ROWS if "qwen3-4b" in row.name]
    assert sorted(row["name"] for row in rows) == sorted(expected)
    assert all(row["jobs"] == 2 and row["ran_out_of_memory"] for row in rows)
    # Each failed beside others, and once more alone.
    assert len(outputs) == 2 * len(expected)
    assert {Path(cache).parent.name for cache in outputs} == {"slot-0", "slot-1"}
    benchmark.started.clear()
    benchmark.main(options)
    assert not benchmark.started  # running out of memory alone is a result


@pytest.mark.parametrize("other_thread", [False, True])
def test_an_interrupt_ends_all_rows_and_leaves_the_file_whole(
    benchmark: Any, tmp_path: Path, other_thread: bool
) -> None:
    benchmark.seconds = "40"
    path = tmp_path / "prediction.H100-80GB.json"
    before = {"name": "old", "engine": "unsloth", "failed": "x", "ran_out_of_memory": True, "tokens": 1, "rows": 1}
    path.write_text(json.dumps({"rows": [before], "figures": {}}))

    def interrupt() -> None:
        deadline = time.monotonic() + 30
        while len(benchmark.started) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    options = ["--work", str(tmp_path / "work"), "--results", str(tmp_path), "--only", "qwen3-4b", "--jobs", "3"]
    threading.Thread(target=interrupt).start()
    if other_thread:
        # As when the signal comes just before this thread begins to wait: nothing wakes it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            benchmark.main(options)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    assert time.monotonic() - began < 30
    assert len(benchmark.started) >= 2
    assert all(process.returncode == -signal.SIGKILL for process, _ in benchmark.started)
    assert json.loads(path.read_text())["rows"] == [before]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_row_that_cannot_be_run_is_a_row_that_failed(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: str
) -> None:
    def torn(row: Any, *_: Any) -> Any:
        if row.engine == "unsloth":
            raise KeyError("devices")
        return benchmark.described(row, int(jobs), time.monotonic()) | {"failed": "x", "ran_out_of_memory": True}

    monkeypatch.setattr(benchmark, "run_row", torn)
    options = ["--work", str(tmp_path / "work"), "--results", str(tmp_path), "--only", "qwen3-4b", "--jobs", jobs]
    record = json.loads(benchmark.main(options).read_text())
    said = {row["name"]: row["failed"] for row in record["rows"]}
    assert said["qwen3-4b unsloth recomputed"] == "KeyError: 'devices'"
    assert said["qwen3-4b recomputed"] == "x"
    assert "qwen3-4b unsloth recomputed" in record["figures"]["failed"]


def test_no_jobs_are_refused(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--jobs", "0"])
    assert "--jobs 0" in capsys.readouterr().err


REPORTING_PROGRAM = """
import json, pathlib, sys, time
run = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
run.mkdir()
sizes = {"predicted_allocated_bytes": 90, "predicted_peak_bytes": 110, "allocated_peak_bytes": 90}
device = sizes | {"reserved_peak_bytes": 95, "used_peak_bytes": 300, "used_by": "card"}
(run / "report.json").write_text(json.dumps({"devices": [device], "steps": 3}))
(run / "plan.json").write_text(json.dumps({"devices": [{}]}))
time.sleep(0.5)
"""


@pytest.mark.parametrize(("jobs", "used", "by"), [(1, 300, "card"), (2, 100, "process")])
def test_a_row_that_ran_is_kept_with_what_it_used(
    module: Any, benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int, used: int, by: str
) -> None:
    pids: list[int] = []
    real = module("prediction_process").start

    def start(command: list[str], variables: dict[str, str]) -> subprocess.Popen[str]:
        process: subprocess.Popen[str] = real([sys.executable, "-c", REPORTING_PROGRAM, *command[3:]], variables)
        pids.append(process.pid)
        return process

    def watch(uuid: str, root: int | None = None) -> Any:
        nvml = FakeNvml(lambda: dict.fromkeys(pids, 100) | {os.getpid(): 50})
        return module("prediction_watch").ProcessMemory(uuid, nvml, root)

    monkeypatch.setattr(benchmark, "start", start)
    monkeypatch.setattr(benchmark, "ProcessMemory", watch)
    options = ["--work", str(tmp_path / "work"), "--results", str(tmp_path), "--only", "qwen3-4b"]
    path = benchmark.main([*options, "--jobs", str(jobs)])
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == len(pids) >= 4
    assert all((row["used_peak_bytes"], row["used_by"], row["jobs"]) == (used, by, jobs) for row in rows)
    assert all(row["used_error"] == pytest.approx(110 / used - 1) and row["steps"] == 3 for row in rows)
    benchmark.main([*options, "--jobs", str(jobs)])
    assert len(pids) == len(rows)  # what was measured is not run again
