"""What the tests on GPUs share: runs through the command line, and a suite that can be ended and gone on with.

    pytest -m gpu tests/gpu -n 5 --gpu-done passed.txt --gpu-minutes 8

`passed.txt` collects the tests that passed, which the next call leaves out, and `passed.txt.failed` what failed and
why, as it happens: a time limit from outside loses nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DATASET = ROOT / "examples" / "short_answers.jsonl"
SHAPES = ROOT / "examples" / "benchmarks" / "shapes.py"
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu")
    group.addoption("--gpu-done", type=Path, default=None, help="file of passed tests, which are left out")
    group.addoption("--gpu-minutes", type=float, default=None, help="begin no test after so many minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_STARTED] = time.monotonic()


_STARTED = pytest.StashKey[float]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done: Path | None = config.getoption("--gpu-done")
    if done is not None and done.exists():
        passed = set(done.read_text().splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = [item for item in items if item.nodeid not in passed]


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--gpu-minutes")
    if minutes is not None and time.monotonic() - item.config.stash[_STARTED] > 60 * minutes:
        pytest.skip("out of time; the same command goes on with it")


class Notes:
    """Writes down each test's end as it comes, in the process that has all of them."""

    def __init__(self, done: Path) -> None:
        self.done = done
        done.parent.mkdir(parents=True, exist_ok=True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            with self.done.with_name(f"{self.done.name}.failed").open("a") as file:
                file.write(f"=== {report.nodeid} ({report.when})\n{report.longreprtext[-6000:]}\n")
        elif report.when == "call" and report.passed:
            with self.done.open("a") as file:
                file.write(f"{report.nodeid}\n")


def pytest_sessionstart(session: pytest.Session) -> None:
    done: Path | None = session.config.getoption("--gpu-done")
    if done is not None and not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(Notes(done))


@pytest.fixture(scope="session")
def checkout() -> dict[str, str]:
    """The environment of a program that imports this checkout before what else is on its path."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@dataclass(frozen=True)
class Trained:
    """A run that has ended well."""

    path: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        read = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        return [row for row in read if "loss" in row]

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows]

    @property
    def report(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.path / "report.json").read_text())
        return loaded


Tune = Callable[..., Trained]


@pytest.fixture(scope="session")
def tune() -> Tune:
    """Runs parallel-tune with options, in a run directory; whatever else is asked of it must end well."""

    def run(path: Path, *options: str, verb: str = "train") -> Trained:
        arguments = [
            verb,
            *([f"--output_dir={path}", "--report_to=none"] if verb == "train" else [str(path)]),
            *options,
        ]
        done = subprocess.run(
            [sys.executable, "-P", "-m", "parallel_tune", *arguments],
            env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        logs = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(path.glob("logs/*.log")))
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}\n{logs}"
        return Trained(path)

    return run


@pytest.fixture(scope="session")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of random models by the name of their shape, made once for all processes of a test run."""
    from filelock import FileLock

    common = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        common = common.parent

    def make(name: str) -> Path:
        folder = common / "shapes" / name
        folder.parent.mkdir(exist_ok=True)
        with FileLock(folder.with_name(f"{name}.lock")):
            subprocess.run([sys.executable, SHAPES, name, folder], check=True, timeout=300)
        return folder

    return make
