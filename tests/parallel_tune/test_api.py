"""The Python API: light to import, refusing as the command line does, and at home in any thread."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

import parallel_tune
from parallel_tune.launch import LaunchSpec, Watcher
from parallel_tune.rundir import RunDir
from strategies.errors import ConfigError, ParallelTuneError, RunFailed, StrategiesCombined


def test_import_stays_light() -> None:
    code = (
        "import sys, parallel_tune; parallel_tune.placement();"
        "heavy = {'torch', 'strategies', 'click', 'yaml', 'transformers'} & set(sys.modules); assert not heavy, heavy;"
        "parallel_tune.tune; heavy = {'torch', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_plan_says_whether_it_fits() -> None:
    model = "meta-llama/Llama-3.3-70B-Instruct"
    split = parallel_tune.plan(model=model, load_in_4bit=True, hardware="2xA100-80GB")
    assert (split.strategy, split.fits) in {("ddp", True), ("model_parallel", True)}
    small = parallel_tune.plan(model=model, hardware="1xT4-16GB")
    assert not small.fits


def test_wrong_options_are_refused_with_a_near_match() -> None:
    with pytest.raises(ConfigError, match="learning_rat") as raised:
        parallel_tune.plan(learning_rat=1e-4)
    assert "learning_rate" in raised.value.hint
    with pytest.raises(StrategiesCombined):
        parallel_tune.tune(model="m", dataset="d", strategy="ddp", device_map="auto", hardware="cpu:2")


def test_tune_under_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StrategiesCombined, match="tune\\(\\) starts its processes itself"):
        parallel_tune.tune(model="m", dataset="d", hardware="cpu:2")


def test_there_is_nothing_else() -> None:
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        parallel_tune.train  # noqa: B018


def test_processes_are_watched_from_any_thread(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.logs.mkdir()
    spec = LaunchSpec((sys.executable, "-c", "raise SystemExit(3)"), {})
    caught: list[ParallelTuneError] = []

    def watch() -> None:
        try:
            Watcher(1, run, spec, lambda: None).run()
        except ParallelTuneError as error:
            caught.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert isinstance(caught[0], RunFailed)
    assert "ended with code 3 before they began" in caught[0].message
