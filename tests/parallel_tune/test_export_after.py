"""Exports at the end of a training run: checked before it, made after it, and never at the result's cost."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from started_commands import finding_processes

from parallel_tune.config import make_config
from parallel_tune.export_after import wanted_export

TOKEN = "hf_a_secret_token"
CONVERTER = """
import pathlib, sys
folder, _, out, _, kind = sys.argv[1:]
assert (pathlib.Path(folder) / "model.safetensors").exists()
pathlib.Path(out).write_text(kind)
"""


@pytest.fixture(scope="module")
def run_it(tune: Any, tied_model: Path, rows_file: Path) -> Any:
    data = (f"--model={tied_model}", f"--dataset={rows_file}", "--max_seq_length=64", "--max_steps=2")
    return type(tune)(tune.folder, (*data, "--global_batch_size=4"))


def converter(folder: Path) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    quantizer = folder / "build" / "bin" / "llama-quantize"
    quantizer.parent.mkdir(parents=True, exist_ok=True)
    quantizer.write_text('#!/bin/sh\nprintf "%s made %s" "$(cat "$1")" "$3" > "$2"\n')
    quantizer.chmod(0o755)
    return {"LLAMA_CPP_DIR": str(folder)}


def test_the_merged_model_lies_in_the_run(run_it: Any) -> None:
    run = run_it("--save_model", "true", "--hardware=cpu:1", "--use_dora")
    assert (run.run / "merged_16bit" / "model.safetensors").exists()
    assert (run.run / "adapter" / "adapter_model.safetensors").exists()
    assert "merged_16bit: " in run.out


def test_gguf_files_of_several_types_under_a_launcher(run_it: Any, tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0")
    options = ("--save_gguf", "--quantization", "q4_k_m", "q8_0", "--save_path=out")
    env = converter(tmp_path / "cpp")
    run = run_it(*options, before=(*torchrun, "--nproc-per-node=2"), env=env, cwd=tmp_path)
    files = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    card = files.pop("README.md")
    assert "exported as `gguf`" in card
    assert files == {"model-q4_k_m.gguf": "auto made q4_k_m", "model-q8_0.gguf": "q8_0"}
    assert run.out.count("gguf: ") == 1
    # Said before training, and when it is made.
    assert run.out.count("GGUF files will be written by llama.cpp's") == 2


def test_a_failed_push_leaves_export_and_adapter_and_the_token_is_nowhere(run_it: Any, tmp_path: Path) -> None:
    """Nothing listens at this address."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"hub_token: {TOKEN}\nsave_method: lora\n")
    options = ("--push_model", "--hub_path=me/tuned", f"--config={recipe}", "--hardware=cpu:1", "--debug")
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    ended = run_it.ended(*options, env=hub)
    assert ended.code == 1
    assert "training is done and" in ended.err
    assert "but the push to me/tuned failed" in ended.err
    assert "--hub_path me/tuned" in ended.err
    assert (ended.run / "lora" / "adapter_model.safetensors").exists()
    assert (ended.run / "adapter" / "adapter_model.safetensors").exists()
    assert json.loads((ended.run / "report.json").read_text())["steps"] == 2
    for path in (path for path in ended.run.rglob("*") if path.is_file()):
        assert TOKEN.encode() not in path.read_bytes(), path
    assert TOKEN not in ended.out + ended.err


def test_a_failed_export_leaves_the_adapter(run_it: Any, tmp_path: Path) -> None:
    env = converter(tmp_path / "cpp")
    (tmp_path / "cpp" / "convert_hf_to_gguf.py").write_text("raise SystemExit('no such architecture')")
    ended = run_it.ended("--save_gguf", "--hardware=cpu:1", env=env)
    assert ended.code == 1
    assert "no such architecture" in ended.err
    assert "makes it again" in ended.err
    assert (ended.run / "adapter" / "adapter_model.safetensors").exists()
    assert not (ended.run / "gguf").exists()
    assert not list(ended.run.glob(".*.part"))


SLOW = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
(pathlib.Path(__file__).parent / "begun").touch()
while folder.exists():
    time.sleep(0.05)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)])
def test_an_export_that_was_stopped_is_made_by_resume(
    number: signal.Signals, code: int, run_it: Any, tmp_path: Path
) -> None:
    env = converter(tmp_path / "cpp")
    (tmp_path / "cpp" / "convert_hf_to_gguf.py").write_text(SLOW)
    with finding_processes() as alive:
        command = run_it.start("--save_gguf", "--hardware=cpu:1", env=env)
        command.wait_for(tmp_path / "cpp" / "begun")
        again = run_it.ended("resume", str(command.run), base=False, env=env)
        assert (again.code, again.err.splitlines()[0]) == (
            2, f"parallel-tune: another command is training in {command.run}"
        )  # fmt: skip
        command.send(number)
        stopped = command.wait()
        deadline = time.monotonic() + 60
        while alive(command.run):
            assert time.monotonic() < deadline, f"still alive: {alive(command.run)}"
            time.sleep(0.05)
    assert stopped.code == code
    if number == signal.SIGTERM:
        assert f"the export was stopped by SIGTERM; {command.run / 'adapter'} is complete" in stopped.err
        assert f"`parallel-tune resume {command.run}` makes the export" in stopped.err
    converter(tmp_path / "cpp")
    resumed = run_it("resume", str(command.run), base=False, env=env)
    assert "making the export that was asked for" in resumed.out
    assert sorted(path.name for path in (command.run / "gguf").iterdir()) == ["README.md", "model-q8_0.gguf"]
    # Nothing of the half made one is left: its scratch folder holds a whole model.
    assert not [path.name for path in command.run.iterdir() if path.name.startswith((".", "tmp"))]
    assert "is finished" in run_it.ended("resume", str(command.run), base=False, env=env).err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--save_gguf",), "convert_hf_to_gguf.py"),
        (("--save_gguf", "--quantization=q4_k"), "does not write q4_k"),
        (("--push_model", "--hub_path=me/tuned"), "needs a token"),
        (("--push_model", "--hub_path=me/tuned", "--hub_token=hf_x"), "HF_HUB_OFFLINE is set"),
        (("--push_model", "--hub_path=me/t u"), "hub_path"),
        (("--save_model", "--save_path={taken}"), "is there already"),
    ],
)
def test_what_could_not_be_exported_is_refused_before_training(
    options: tuple[str, ...], said: str, run_it: Any, tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    env = {"LLAMA_CPP_DIR": str(tmp_path / "none"), "HF_HOME": str(tmp_path), "HF_TOKEN": ""}
    filled = [option.format(taken=tmp_path / "taken") for option in options]
    ended = run_it.ended(*filled, "--hardware=cpu:1", env=env)
    assert ended.code == 2, ended.err
    assert said in ended.err
    assert not ended.run.exists()


@pytest.mark.parametrize(
    ("options", "method", "hub_path"),
    [
        ({}, None, None),
        ({"save_model": True}, "merged_16bit", None),
        ({"save_model": True, "save_method": "merged_4bit"}, "merged_4bit", None),
        ({"push_model": True, "hub_path": "me/it", "save_method": "lora"}, "lora", "me/it"),
        ({"save_model": True, "save_gguf": True}, "gguf", None),
        ({"push_gguf": True, "hub_path": "me/it"}, "gguf", "me/it"),
        ({"save_gguf": True, "push_model": True, "hub_path": "me/it"}, "gguf", "me/it"),
    ],
)
def test_what_is_exported(options: dict[str, Any], method: str | None, hub_path: str | None) -> None:
    wanted = wanted_export(make_config(options), Path("run"))
    if method is None:
        assert wanted is None
    else:
        assert wanted is not None
        assert (wanted.method, wanted.hub_path) == (method, hub_path)
        assert wanted.save_path == f"run/{method}"
