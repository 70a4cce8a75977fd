"""Start-up is told by phase, and the phases are all of it."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest

from parallel_tune.startup import CLOCKS, PHASES, Startup, clocks, process_began, startup_line


def test_phases_add_up_from_the_command_on() -> None:
    began = time.monotonic() - 100
    startup = Startup({CLOCKS: f"{began} {began + 40}"})
    startup.mark("load")
    startup.mark("data")
    startup.mark("load")  # adapters come after the data
    startup.finish()
    whole = time.monotonic() - began
    startup.finish()  # a second step is no start
    report = startup.report()
    assert list(report) == ["plan", "launch", "load", "data", "first_step", "total"]
    assert report["plan"] == pytest.approx(40)
    assert report["launch"] >= 60
    assert 100 <= report["total"] <= whole + 1e-3


def test_without_a_command_of_ours_it_counts_from_the_process() -> None:
    for environ in ({}, {CLOCKS: ""}, {CLOCKS: "yesterday"}, {CLOCKS: "1 2 3"}):
        startup = Startup(environ)
        assert list(startup.seconds) == ["plan"]
    assert 0 <= startup.seconds["plan"] == pytest.approx(time.monotonic() - process_began(), abs=1)


def test_a_process_knows_when_it_was_started() -> None:
    before = time.monotonic()
    code = "import time; time.sleep(0.3); from parallel_tune.startup import process_began; print(process_began())"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert before - 0.05 <= float(done.stdout) <= time.monotonic() - 0.3 + 0.05


def test_clocks_reach_the_worker() -> None:
    startup = Startup(clocks(time.monotonic() - 5))
    assert startup.seconds["plan"] == pytest.approx(5, abs=1)


def test_the_line_names_what_there_was() -> None:
    line = startup_line({"plan": 1.25, "import": 4.0, "first_step": 0.31, "total": 5.56})
    assert line == "first step done after 5.6 s: plan 1.2, import 4.0, first step 0.3"


@pytest.mark.parametrize("fixture", ["single_run", "ddp_run"])
def test_a_run_reports_its_start(fixture: str, request: pytest.FixtureRequest) -> None:
    run: Any = request.getfixturevalue(fixture)
    seconds = run.report["startup_seconds"]
    assert list(seconds) == [*PHASES, "total"]  # with rows held out, all phases
    assert all(value > 0 for value in seconds.values())
    assert seconds["total"] == pytest.approx(sum(value for name, value in seconds.items() if name != "total"))
    assert startup_line(seconds) in run.out
    assert "command to first step" in (run.run / "report.html").read_text()
