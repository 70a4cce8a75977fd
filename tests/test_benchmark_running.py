"""What benchmarks share: commands end with them, and a command that is given once more does what is missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"
DEADLINE_SECONDS = 60
# A rank as torchrun starts it: in a session of its own, with the pipes of what started it.
LEADER = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(300)"], start_new_session=True)
open(sys.argv[1], "w").write(str(rank.pid))
rank.wait()
"""


@pytest.fixture
def running(load_benchmark: Any) -> Any:
    return load_benchmark("running")


def pid_in(path: Path) -> int:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, "nothing was started"
        time.sleep(0.02)
    return int(path.read_text())


def gone(pid: int) -> bool:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_what_takes_too_long_is_ended_with_all_that_it_started(running: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="took longer than 3 s"):
        running.call([sys.executable, "-S", "-c", LEADER, str(tmp_path / "pid")], timeout=3)
    assert gone(pid_in(tmp_path / "pid"))


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import children, running
children.end_orderly()
command = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(300)"
running.call([sys.executable, "-S", "-c", command, sys.argv[2]])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_commands_end_with_the_benchmark(number: signal.Signals, tmp_path: Path) -> None:
    benchmark = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(BENCHMARKS), str(tmp_path / "pid")], stderr=subprocess.DEVNULL
    )
    pid = pid_in(tmp_path / "pid")
    os.kill(benchmark.pid, number)
    benchmark.wait(DEADLINE_SECONDS)
    assert gone(pid)


def test_a_record_goes_on_where_the_same_command_stopped(running: Any, tmp_path: Path) -> None:
    arguments = ["--steps", "4", "--work", "there", f"--results={tmp_path}", "--go_on", "--small"]
    first = running.Record("speed", "cpu", tmp_path, arguments, shape="tiny")
    assert first.content["command"] == "python examples/benchmarks/speed.py --steps 4 --small"
    first.add({"what": "a", "seconds": 1.0, "versions": {"python": "3"}}, lambda rows: {"count": len(rows)})
    first.add({"what": "b", "failed": "no room"}, lambda rows: {"count": len(rows)})

    again = running.Record("speed", "cpu", tmp_path, ["--steps", "4", "--small"], True, shape="tiny")
    assert again.has("a") and not again.has("b")
    again.add({"what": "b", "seconds": 2.0}, lambda rows: {"count": len(rows)})
    written = json.loads((tmp_path / "speed.cpu.json").read_text())
    assert [row["what"] for row in written["rows"]] == ["a", "b"]
    assert (written["figures"], written["versions"]) == ({"count": 2}, {"python": "3"})

    for other in (
        running.Record("speed", "cpu", tmp_path, ["--steps", "5", "--small"], True, shape="tiny"),
        running.Record("speed", "cpu", tmp_path, ["--steps", "4", "--small"], True, shape="large"),
        running.Record("speed", "cpu", tmp_path, ["--steps", "4", "--small"], shape="tiny"),
    ):
        assert not other.has("a")


def test_a_model_is_there_only_when_it_is_whole(
    running: Any, load_benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    shapes = load_benchmark("shapes")

    def torn(self: Any, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(transformers.PreTrainedModel, "save_pretrained", torn)
        with pytest.raises(KeyboardInterrupt):
            shapes.make_model("tiny", tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()
    assert (running.random_model("tiny", tmp_path / "tiny") / "model.safetensors").exists()


def test_a_record_goes_on_with_other_cases_of_the_same_settings(running: Any, tmp_path: Path) -> None:
    def record(*arguments: str) -> Any:
        return running.Record("some", "cpu", tmp_path, arguments, go_on=True, choosing=("--cases",))

    record("--cases", "a", "--steps=4").add({"what": "a"}, lambda rows: {"count": len(rows)})
    record("--cases=b", "--steps=4").add({"what": "b"}, lambda rows: {"count": len(rows)})
    again = record("--cases", "a", "--steps=4")
    assert again.has("a") and again.has("b")
    assert again.content["earlier_commands"] == ["python examples/benchmarks/some.py --cases=b --steps=4"]
    assert not record("--cases", "a", "--steps=5").has("a")
