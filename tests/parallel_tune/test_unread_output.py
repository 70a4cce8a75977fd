"""What a command prints is not read, by a pager left alone or a terminal that is gone: what must work still."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from started_commands import TIMEOUT_SECONDS, clean_environment, finding_processes

COMMAND = (sys.executable, "-m", "parallel_tune")
PASSES = 6
"""Forward passes of a step of the split."""


def test_a_signal_stops_a_run_whose_output_nobody_reads(tune: Any, noting: dict[str, str], tmp_path: Path) -> None:
    """`parallel-tune ... | less`, left alone: the pipe is full, and the command waits in the midst of a row."""
    run, said = tune.folder / "unread-at-a-signal", tmp_path / "err"
    split = ("--strategy=noted_split", "--hardware=cpu:2", "--output_dir", str(run))
    env = clean_environment() | noting | {"FAULT": f"hold:0:{6 * PASSES + 1}"}
    reader, writer = os.pipe()
    filler = os.open(f"/proc/self/fd/{writer}", os.O_WRONLY | os.O_NONBLOCK)
    with said.open("wb") as err, finding_processes() as alive:
        process = subprocess.Popen((*COMMAND, *tune.base, *split), stdout=writer, stderr=err, env=env)
        try:
            wait_until((tmp_path / "held").exists, process)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(filler, b"x")
            # A row to show, in which the command then waits.
            rows = (run / "metrics.jsonl").read_text()
            (run / "metrics.jsonl").write_text(rows + rows.splitlines()[-1] + "\n")
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: b"stopping after this step" in said.read_bytes(), process)
            (tmp_path / "go").touch()
            assert process.wait(TIMEOUT_SECONDS) == 75
        finally:
            process.kill()
            for number in (reader, writer, filler):
                os.close(number)
        assert not alive(run)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-7"]


def wait_until(there: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not there():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("arguments", "code"), [(("resume", "nothing"), 2), (("plan", "--no_such_option"), 2)])
def test_an_error_that_nobody_can_read_keeps_its_code(arguments: tuple[str, ...], code: int, tmp_path: Path) -> None:
    """A terminal that is gone takes neither output nor errors."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        process = subprocess.Popen((*COMMAND, *arguments), stdout=writer, stderr=writer, cwd=tmp_path)
    finally:
        os.close(writer)
    assert process.wait(TIMEOUT_SECONDS) == code
