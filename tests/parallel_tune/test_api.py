"""The Python API: light to import, refusing as the command line does, and at home in any thread."""

from __future__ import annotations

import inspect
import io
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import option_types
import pandas
import pytest
import torch

import parallel_tune
from parallel_tune.data.formats import detect_format, read_row
from parallel_tune.data.loading import load_rows
from parallel_tune.in_memory import dataset_path
from parallel_tune.launch import LaunchSpec
from parallel_tune.rundir import RunDir
from parallel_tune.watcher import Watcher
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


def test_the_types_of_options_are_those_of_the_settings() -> None:
    path = Path(parallel_tune.__file__).with_name("option_types.py")
    assert path.read_text() == option_types.render()


CALLS = """
from pathlib import Path
from typing import Unpack
from parallel_tune.option_types import Options
def tune(**options: Unpack[Options]) -> None: ...
tune(r=8, output_dir=Path("out"), use_gradient_checkpointing="full", target_modules=["q_proj"], learning_rate=1)
tune(learning_rat=1e-4)
tune(r="8")
tune(save_method="merged")
"""


def test_a_type_checker_sees_what_is_wrong_with_a_call(tmp_path: Path) -> None:
    (tmp_path / "calls.py").write_text(CALLS)
    checkout = Path(__file__).parents[2]
    if (checkout / ".mypy_cache").is_dir():
        # What `make lint` found out about the packages need not be found out again.
        shutil.copytree(checkout / ".mypy_cache", tmp_path / "cache")
    settings = ("--config-file", checkout / "pyproject.toml", "--cache-dir", tmp_path / "cache")
    command = [sys.executable, "-m", "mypy", *settings, "calls.py"]
    package = Path(parallel_tune.__file__).parents[1]
    path = {} if "site-packages" in str(package) else {"MYPYPATH": str(package)}
    done = subprocess.run(
        command, cwd=tmp_path, env=dict(os.environ) | path, capture_output=True, text=True, timeout=300, check=False
    )
    wrong = [line.split(":")[1] for line in done.stdout.splitlines() if "error:" in line]
    assert wrong == ["7", "8", "9"], done.stdout
    assert '"learning_rat"' in done.stdout
    for function in (parallel_tune.tune, parallel_tune.plan):
        assert inspect.signature(function).parameters["options"].annotation == "Unpack[Options]"


def test_rows_in_memory_are_written_once_under_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows = [{"prompt": "a", "completion": "ß"}, {"prompt": "b", "completion": "c"}]
    paths = {
        dataset_path(given) for given in (rows, tuple(rows), datasets.Dataset.from_list(rows), pandas.DataFrame(rows))
    }
    assert len(paths) == 1
    assert load_rows(paths.pop()) == rows
    assert dataset_path(Path("rows.jsonl")) == dataset_path("rows.jsonl") == "rows.jsonl"


def test_what_a_data_frame_misses_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pandas writes NaN for an empty cell of a CSV file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    frame = pandas.read_csv(io.StringIO("instruction,input,output\na,,b\n"))
    assert load_rows(dataset_path(frame)) == [{"instruction": "a", "input": None, "output": "b"}]


def test_what_pandas_makes_of_a_parquet_file_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists come as numpy arrays, and a column of times need not be learned from: both were "no JSON"."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = tmp_path / "a.parquet"
    pandas.DataFrame({"messages": [turns], "when": pandas.to_datetime(["2026-01-02"])}).to_parquet(file)
    (row,) = load_rows(dataset_path(pandas.read_parquet(file)))
    assert row["messages"] == turns
    timed = {"text": row["when"]}
    with pytest.raises(ConfigError, match="'text' is dict"):  # a time is no text
        read_row(timed, detect_format(["text"], timed), 1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train": [{"text": "a"}]}, r'with train, not rows.*dataset\["train"\]'),
        ([], "no rows"),
        (["a"], "row 0 of the dataset is a str"),
        ([{"text": object()}], "row 0 of the dataset is no JSON"),
        ([{"text": "so \ud83d"}], "row 0 of the dataset holds .*half of a character"),
        (pandas.DataFrame([["a", "b"]], columns=["text", "text"]), "more than one column 'text'"),
        (7, "of type int"),
        (iter([{"text": "a"}]), "neither a name nor rows"),
    ],
)
def test_what_is_no_dataset_is_refused(given: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError) as raised:
        parallel_tune.tune(model="m", dataset=given, hardware="cpu:1")
    assert re.search(said, f"{raised.value.message} {raised.value.hint}")


def test_a_loaded_model_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^model is a Linear in this process") as raised:
        parallel_tune.tune(model=torch.nn.Linear(2, 2), dataset="d")  # type: ignore[arg-type]
    assert "save_pretrained" in raised.value.hint


def test_a_plan_is_described_as_on_the_command_line() -> None:
    said = parallel_tune.describe(parallel_tune.plan(model="unsloth/Llama-3.2-1B-Instruct", hardware="2xT4-16GB"))
    assert said.startswith("ddp with unsloth: 2 processes")


def test_paths_and_other_names_are_options_too() -> None:
    named = {"model_name": "unsloth/Llama-3.2-1B-Instruct", "lora_rank": 8}
    assert parallel_tune.plan(**named, output_dir=Path("out"), hardware="1xH100-80GB").fits  # type: ignore[misc]


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
