"""Commands that tests start, signal and wait for."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from click.testing import CliRunner

from parallel_tune import rundir
from parallel_tune.cli import program
from parallel_tune.config import make_config
from parallel_tune.decision import decide, find_hardware
from parallel_tune.display import summary
from parallel_tune.launch import launch_spec
from parallel_tune.report import read as read_report

TIMEOUT_SECONDS = 240
"""Only so that a hang ends; nothing here takes nearly that long."""

IN_TURN = Path(__file__).with_name("trained_in_turn.py")


def clean_environment() -> dict[str, str]:
    """The environment without launchers' variables, quiet, offline, one thread a process."""
    prefixes = ("ACCELERATE_", "TORCHELASTIC_", "SLURM_", "OMPI_", "PYTHON", "GROUP_", "ROLE_")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {n: v for n, v in os.environ.items() if not n.startswith(prefixes) and n not in names}
    return clean | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str
    run: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Training rows, those of repeated steps too."""
        rows = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if "loss" in row]

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.metrics]

    @property
    def report(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.run / "report.json").read_text())
        return loaded

    @property
    def plan(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.run / "plan.json").read_text())
        return loaded


def ended_well(run: Path) -> Ended:
    """How a run that trained in turn with others ended; what it gives as output is the summary alone."""
    return Ended(0, summary(read_report(run / "report.json"), run), "", run)


def unfinished_copy(run: Path, to: Path) -> Path:
    """The run as it would be, had it been killed before its result was written."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "adapter")
    for left in [to / "report.json", *to.rglob("*outcome*")]:
        left.unlink()
    return to


class Command:
    """A started command."""

    def __init__(self, argv: list[str], env: dict[str, str], cwd: Path, place: Path, run: Path) -> None:
        self.run = run
        self._out, self._err = place / "out", place / "err"
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                argv, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )

    def wait(self, seconds: float = TIMEOUT_SECONDS) -> Ended:
        """Until it has ended; a hang is killed and fails the test."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._fail("hung")
        return Ended(self.process.returncode, self._out.read_text(), self._err.read_text(), self.run)

    def wait_for(self, path: Path) -> None:
        """Until a file is there."""
        self.wait_until(path.exists, path.name)

    def wait_for_word(self, text: str) -> None:
        """Until the command has said it on stderr."""
        self.wait_until(lambda: text in self._err.read_text(), text)

    def wait_until(self, there: Callable[[], bool], name: str) -> None:
        """Until something that has a name for the failure's message is there."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not there():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self._fail(f"{name!r} never came")
            time.sleep(0.02)

    def _fail(self, what: str) -> NoReturn:
        self.process.kill()
        self.process.wait()
        pytest.fail(f"{what}:\n{self._out.read_text()}\n{self._err.read_text()}\n{logs(self.run)}")

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


Alive = Callable[[Path], list[int]]
Once = Callable[[str, Callable[[], Ended]], Ended]


@contextlib.contextmanager
def finding_processes() -> Iterator[Alive]:
    """Gives what finds the processes whose command line names a run; those still there at the end are killed."""
    asked: set[Path] = set()

    def find(run: Path) -> list[int]:
        asked.add(run)
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and str(run).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    try:
        yield find
    finally:
        for run in set(asked):
            for pid in find(run):
                os.kill(pid, signal.SIGKILL)


def logs(run: Path) -> str:
    """The ends of a run's logs, for a failure's message."""
    return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in sorted(run.glob("logs/*.log")))


@dataclass(frozen=True)
class Runner:
    """Starts the command on the tiny model and dataset, each run in a directory of its own."""

    folder: Path
    base: tuple[str, ...]

    def start(
        self,
        *options: str,
        base: bool = True,
        shared_output: bool = True,
        before: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Command:
        """Start `parallel-tune`.

        Args:
            base: add the options that all runs share.
            shared_output: add an `--output_dir` as well.
            before: a launcher and its options; it runs `-m parallel_tune`.
        """
        place = self._place()
        run = place / "run"
        program = [*before, "-m", "parallel_tune"] if before else [str(Path(sys.executable).with_name("parallel-tune"))]
        shared = [*(self.base if base else ()), *(("--output_dir", str(run)) if base and shared_output else ())]
        if options[:1] == ("resume",):
            run = Path(options[1])
        return Command([*program, *options, *shared], clean_environment() | (env or {}), cwd or place, place, run)

    def in_turn(
        self, *each: tuple[str, ...], strategy: str | None = None, env: dict[str, str] | None = None
    ) -> list[Ended]:
        """Runs with these options on as many processes, which train one after the other: for what is held against
        another run, where starting, watching and ending is not what is looked at. Options count more than the base;
        what the last one gives as output is the summary alone.

        Args:
            strategy: the one that opens the sessions, if it is not the one that plans.
            env: where that one is installed.
        """
        place = self._place()
        runs = []
        for number, options in enumerate(each):
            given = [*self.base, *options, f"--output_dir={place / str(number)}", "--print_config"]
            config = make_config(yaml.safe_load(CliRunner().invoke(program, given, catch_exceptions=False).stdout))
            plan = decide(config, find_hardware(config), with_data=True)[0]
            plan = replace(plan, strategy=strategy or plan.strategy)
            runs.append(rundir.create(config, plan))
        folders = [str(run.path) for run in runs]
        spec = launch_spec(plan, runs[0], clean_environment(), 1)
        launcher = spec.argv[: spec.argv.index("parallel_tune.worker") - 1]
        done = Command(
            [*launcher, str(IN_TURN), *folders], {**spec.env, **(env or {})}, place, place, runs[-1].path
        ).wait()
        assert done.code == 0, f"{done.err}\n{logs(done.run)}"
        return [ended_well(run.path) for run in runs]

    def _place(self) -> Path:
        """A new folder for a command and its run."""
        place = self.folder / str(len(list(self.folder.iterdir())))
        place.mkdir()
        return place

    def ended(self, *options: str, **how: Any) -> Ended:
        """Run to the end, whatever it is."""
        return self.start(*options, **how).wait()

    def __call__(self, *options: str, **how: Any) -> Ended:
        """Run to the end, which must be a good one."""
        ended = self.ended(*options, **how)
        assert ended.code == 0, f"{ended.out}\n{ended.err}\n{logs(ended.run)}"
        return ended
