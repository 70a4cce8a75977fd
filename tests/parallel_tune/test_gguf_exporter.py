"""GGUF by Unsloth's exporter: when it is chosen, what it is given, and what it writes without network or questions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from stand_in_llama_cpp import contents, make_llama_cpp

from parallel_tune import export as exporting
from parallel_tune import gguf_means
from parallel_tune.config import make_config
from parallel_tune.export_after import check_ahead
from parallel_tune.gguf_means import choose
from parallel_tune.hardware import parse_hardware
from parallel_tune.nvml import Probe
from parallel_tune.unsloth_gguf import environment
from strategies.contracts import Hardware
from strategies.errors import ConfigError

NO_HELP = "#!/bin/sh\nexit 127\n"


@pytest.fixture
def llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only one that can be found."""
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path / "cpp"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return make_llama_cpp(tmp_path / "cpp")


def test_a_run_of_unsloth_with_a_gpu_goes_by_unsloths_exporter(llama_cpp: Path) -> None:
    means = choose("unsloth", gpu=True, types=["f16"])
    assert means.exporter == "unsloth"
    assert means.converter == str(llama_cpp / "convert_hf_to_gguf.py")
    assert means.quantizer == str(llama_cpp / "build" / "bin" / "llama-quantize")
    assert f"Unsloth's exporter, with llama.cpp's {means.converter} and {means.quantizer}" in means.said


@pytest.mark.parametrize(
    ("engine", "gpu", "why"),
    [("transformers", True, "the engine is transformers"), ("unsloth", False, "no GPU is visible")],
)
def test_other_runs_go_by_llama_cpps_converter(engine: str, gpu: bool, why: str, llama_cpp: Path) -> None:
    means = choose(engine, gpu, ["f16"])
    assert (means.exporter, means.quantizer) == ("llama.cpp", None)
    assert why in means.said
    assert str(llama_cpp / "convert_hf_to_gguf.py") in means.said
    assert choose(engine, gpu, ["q4_k_m"]).quantizer == str(llama_cpp / "build" / "bin" / "llama-quantize")


def test_a_mig_instance_hinders_only_unsloths_exporter(
    llama_cpp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any) -> Probe:
        raise ConfigError("CUDA_VISIBLE_DEVICES names a MIG instance")

    monkeypatch.setattr(exporting, "probe_gpus", refuse)
    wanted = exporting.Export("gguf", str(tmp_path / "out"))
    assert exporting.check_means(wanted, "transformers").exporter == "llama.cpp"
    with pytest.raises(ConfigError, match="MIG"):
        exporting.check_means(wanted, "unsloth")


@pytest.mark.parametrize("lacks", ["package", "quantizer", "running quantizer", "conversion"])
def test_where_unsloths_exporter_cannot_work_the_converter_does_and_the_line_says_why(
    lacks: str, llama_cpp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer = llama_cpp / "build" / "bin" / "llama-quantize"
    if lacks == "package":
        monkeypatch.setattr(gguf_means, "installed", lambda name: False)
        why = "the package unsloth is not installed"
    elif lacks == "quantizer":
        quantizer.unlink()
        why = f"llama-quantize too, which is not built in {llama_cpp}"
    elif lacks == "running quantizer":
        quantizer.write_text(NO_HELP)
        why = f"{quantizer} does not run"
    else:
        (llama_cpp / "conversion").rename(llama_cpp / "elsewhere")
        why = "folder `conversion`"
    means = choose("unsloth", gpu=True, types=["f16"])
    assert (means.exporter, means.quantizer) == ("llama.cpp", None)
    assert why in means.said


def test_without_llama_cpp_both_ways_out_are_said(llama_cpp: Path) -> None:
    (llama_cpp / "convert_hf_to_gguf.py").unlink()
    with pytest.raises(ConfigError) as raised:
        choose("unsloth", gpu=True, types=["f16"])
    assert "git clone" in raised.value.hint
    assert "install_llama_cpp()" in raised.value.hint
    with pytest.raises(ConfigError) as raised:
        choose("transformers", gpu=True, types=["f16"])
    assert "install_llama_cpp" not in raised.value.hint


def test_unsloths_own_llama_cpp_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = make_llama_cpp(tmp_path / "own")
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    monkeypatch.setenv("UNSLOTH_LLAMA_CPP_PATH", str(own))
    monkeypatch.chdir(tmp_path)
    assert choose("unsloth", gpu=True, types=["f16"]).converter == str(own / "convert_hf_to_gguf.py")
    monkeypatch.delenv("UNSLOTH_LLAMA_CPP_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".unsloth").mkdir()
    own.rename(tmp_path / ".unsloth" / "llama.cpp")
    means = choose("unsloth", gpu=True, types=["f16"])
    assert means.converter == str(tmp_path / ".unsloth" / "llama.cpp" / "convert_hf_to_gguf.py")


@pytest.mark.parametrize(
    ("engine", "hardware", "visible", "exporter"),
    [
        ("auto", "1xH100-80GB", True, "by Unsloth's exporter"),
        ("auto", "1xH100-80GB", False, "by llama.cpp's"),
        ("auto", "cpu:1", True, "by llama.cpp's"),
        ("transformers", "1xH100-80GB", True, "by llama.cpp's"),
    ],
)
def test_the_choice_is_made_before_training(
    engine: str, hardware: str, visible: bool, exporter: str, llama_cpp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Probe(parse_hardware("1xH100-80GB") if visible else Hardware(()), ())
    monkeypatch.setattr(exporting, "probe_gpus", lambda environment: found)
    config = make_config({"save_gguf": True, "engine": engine, "hardware": hardware})
    assert exporter in check_ahead(config)
    assert check_ahead(make_config({"save_model": True})) == ""


def test_unsloth_is_kept_from_installing_and_downloading(tmp_path: Path) -> None:
    """Its own package reads the variables as we mean them."""
    said = """
import unsloth
from unsloth_zoo import llama_cpp
print([llama_cpp.LLAMA_CPP_DEFAULT_DIR, llama_cpp._auto_install_enabled(), llama_cpp._converter_network_allowed()])
try:
    llama_cpp.install_llama_cpp()
except RuntimeError as error:
    print(error)
"""
    env = os.environ | environment(tmp_path / "cpp") | {"UNSLOTH_DISABLE_STATISTICS": "1", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", said], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=tmp_path,
        timeout=300, check=True,
    )  # fmt: skip
    assert str([str(tmp_path / "cpp"), False, False]) in done.stdout
    assert "UNSLOTH_AUTO_INSTALL=0" in done.stdout


# The worker on a machine without GPUs: Unsloth empties a GPU's cache there, and torch has none for a CPU.
WORKER = """
import sys, torch
torch.cpu.empty_cache = lambda: None
from parallel_tune.export_worker import main
main(sys.argv[1:])
"""
FORBIDDEN = ("sudo", "apt-get", "apt", "git", "cmake", "make", "curl", "pip", "pip3", "uv")


@pytest.fixture(scope="module")
def run(tune: Any, tied_model: Path) -> Path:
    """A finished run whose adapter moves the weights."""
    path: Path = tune("--hardware=cpu:1", "--max_steps=3", f"--model={tied_model}").run
    return path


def export(run: Path, llama_cpp: Path, folder: Path, *types: str) -> tuple[dict[str, Any], Path]:
    """What the worker says of its end; beside its files a log of programs that it must not call."""
    wanted = exporting.Export(
        "gguf", str(folder / "out"), types, None, "unsloth", str(llama_cpp / "convert_hf_to_gguf.py"),
        str(llama_cpp / "build" / "bin" / "llama-quantize"),
    )  # fmt: skip
    exporting.unfinished(folder / "out").mkdir()
    called, programs = folder / "called", folder / "programs"
    programs.mkdir()
    for name in FORBIDDEN:
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {called}\n')
        (programs / name).chmod(0o755)
    env = os.environ | {
        "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "HOME": str(folder), "PATH": f"{programs}:/usr/bin:/bin",
        "UNSLOTH_LLAMA_CPP_SCRIPTS_DIR": "/none", "UNSLOTH_LLAMA_CPP_CONVERTER_TAG": "b1", "PIP_NO_INDEX": "1",
        "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9",
    }  # fmt: skip
    (run / "logs" / "export.json").unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(run)], input=json.dumps({"wanted": asdict(wanted), "card": "its card"}),
        env=env, capture_output=True, text=True, cwd=folder, timeout=300, check=False,
    )  # fmt: skip
    assert (run / "logs" / "export.json").exists(), done.stderr
    said: dict[str, Any] = json.loads((run / "logs" / "export.json").read_text())
    return said | {"log": done.stdout + done.stderr}, called


def merged(run: Path, folder: Path) -> dict[str, Any]:
    """The weights of the same run's merged model, by their names."""
    from safetensors.torch import load_file

    command = [sys.executable, "-P", "-m", "parallel_tune", "export", str(run), "--save_method", "merged_16bit"]
    subprocess.run([*command, "--save_path", str(folder)], check=True, capture_output=True, timeout=300)
    return {name: tensor for part in folder.glob("*.safetensors") for name, tensor in load_file(part).items()}


def test_the_real_exporter_writes_the_merged_weights_and_leaves_the_checkout_alone(run: Path, tmp_path: Path) -> None:
    import gguf

    llama_cpp = make_llama_cpp(tmp_path / "cpp")
    before = contents(llama_cpp)
    # In the working directory, where the exporter would put its first file by this name.
    (tmp_path / "model.F16.gguf").write_text("another's")
    said, called = export(run, llama_cpp, tmp_path, "f16")
    assert said["code"] == 0, said["log"]
    assert "Unsloth: All GGUF conversions completed successfully!" in said["log"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model-f16.gguf", "README.md"}
    weights = merged(run, tmp_path / "merged")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "out" / "model-f16.gguf").tensors}
    assert set(tensors) == set(weights)
    for name, weight in weights.items():
        assert (tensors[name] == weight.half().numpy()).all(), name
    assert not called.exists(), called.read_text()
    assert contents(llama_cpp) == before
    left = {path.name for path in tmp_path.iterdir()} - {".cache", ".unsloth", ".config", ".triton"}
    assert left == {"cpp", "out", "merged", "programs", "model.F16.gguf"}
    assert (tmp_path / "model.F16.gguf").read_text() == "another's"


def test_several_types_come_from_one_conversion_and_llama_quantize(run: Path, tmp_path: Path) -> None:
    said, called = export(run, make_llama_cpp(tmp_path / "cpp"), tmp_path, "q4_k_m", "auto", "q8_0")
    assert said["code"] == 0, said["log"]
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"model-q4_k_m.gguf", "model-bf16.gguf", "model-q8_0.gguf", "README.md"}
    assert not called.exists(), called.read_text()


@pytest.mark.parametrize("broken", ["quantizer", "converter"])
def test_a_failure_is_said_and_nothing_is_installed(broken: str, run: Path, tmp_path: Path) -> None:
    llama_cpp = make_llama_cpp(tmp_path / "cpp", NO_HELP) if broken == "quantizer" else make_llama_cpp(tmp_path / "cpp")
    if broken == "converter":
        # What Unsloth would mend by installing packages.
        (llama_cpp / "conversion" / "base.py").write_text(
            "raise ModuleNotFoundError(\"No module named 'mistral_common'\")"
        )
    said, called = export(run, llama_cpp, tmp_path, "f16")
    assert said["code"] == 1
    assert "Unsloth's exporter failed" in said["message"]
    assert "CUDA_VISIBLE_DEVICES" in said["hint"]
    assert "reinstall" not in said["log"]
    assert not (tmp_path / "out").exists()
    assert not called.exists(), called.read_text()
