"""GGUF by Unsloth's exporter: when it is chosen, what it is given, and what it writes without network or questions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from exported_in_turn import Asked, exported_in_turn
from stand_in_llama_cpp import QUANTIZER, contents, make_llama_cpp
from started_commands import Ended, Once

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

IMPORT_AS_WITH_A_GPU = {"UNSLOTH_ALLOW_CPU": "1"}
"""Unsloth's own way to be tested without one; it also leaves trl's trainers alone, whose rewriting takes seconds."""
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


FORBIDDEN = ("sudo", "apt-get", "apt", "git", "cmake", "make", "curl", "pip", "pip3", "uv")
# What Unsloth would mend by installing packages.
BROKEN_CONVERTER = "raise ModuleNotFoundError(\"No module named 'mistral_common'\")"


def asked(folder: Path, llama_cpp: Path, *types: str) -> Asked:
    """An export in a folder, where programs that it must not call leave a log."""
    wanted = exporting.Export(
        "gguf", str(folder / "out"), types, None, "unsloth", str(llama_cpp / "convert_hf_to_gguf.py"),
        str(llama_cpp / "build" / "bin" / "llama-quantize"),
    )  # fmt: skip
    programs = folder / "programs"
    programs.mkdir()
    for name in FORBIDDEN:
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {folder / "called"}\n')
        (programs / name).chmod(0o755)
    return Asked(wanted, folder, {"HOME": str(folder), "PATH": f"{programs}:/usr/bin:/bin"})


@pytest.fixture(scope="module")
def exports(single_run: Any, once: Once, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of a run whose adapter moves the weights: each lies in a folder of its name, beside what it said."""

    def make() -> Ended:
        place = tmp_path_factory.mktemp("exports")
        each = {"f16": ("f16",), "several": ("q4_k_m", "auto", "q8_0"), "quantizer": ("f16",), "converter": ("f16",)}
        asked_for = []
        for name, types in each.items():
            (place / name).mkdir()
            llama_cpp = make_llama_cpp(place / name / "cpp", NO_HELP if name == "quantizer" else QUANTIZER)
            if name == "converter":
                (llama_cpp / "conversion" / "base.py").write_text(BROKEN_CONVERTER)
            asked_for.append(asked(place / name, llama_cpp, *types))
        # In the working directory, where the exporter would put its first file by this name.
        (place / "f16" / "model.F16.gguf").write_text("another's")
        asked_for.append(Asked(exporting.Export("merged_16bit", str(place / "merged")), place))
        env = os.environ | IMPORT_AS_WITH_A_GPU | {
            "HF_HUB_OFFLINE": "1", "HOME": str(place), "UNSLOTH_LLAMA_CPP_SCRIPTS_DIR": "/none",
            "UNSLOTH_LLAMA_CPP_CONVERTER_TAG": "b1", "PIP_NO_INDEX": "1", "HTTPS_PROXY": "http://127.0.0.1:9",
            "HTTP_PROXY": "http://127.0.0.1:9",
        }  # fmt: skip
        run = shutil.copytree(single_run.run, place / "run")
        for name, said in zip([*each, "merged"], exported_in_turn(run, asked_for, env), strict=True):
            (place / f"{name}.json").write_text(json.dumps(said))
        return Ended(0, "", "", place)

    return once("unsloths_exports", make).run


def said_of(exports: Path, name: str) -> dict[str, Any]:
    """What the worker of an export said of its end; it must have called none of the programs that it must not call."""
    called = exports / name / "called"
    assert not called.exists(), called.read_text()
    said: dict[str, Any] = json.loads((exports / f"{name}.json").read_text())
    return said


def test_the_real_exporter_writes_the_merged_weights_and_leaves_the_checkout_alone(
    exports: Path, tmp_path: Path
) -> None:
    import gguf
    from safetensors.torch import load_file

    said, folder = said_of(exports, "f16"), exports / "f16"
    assert said["code"] == 0, said["log"]
    assert "Unsloth: All GGUF conversions completed successfully!" in said["log"]
    assert {path.name for path in (folder / "out").iterdir()} == {"model-f16.gguf", "README.md"}
    assert said_of(exports, "merged")["code"] == 0
    parts = (exports / "merged").glob("*.safetensors")
    weights = {name: tensor for part in parts for name, tensor in load_file(part).items()}
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(folder / "out" / "model-f16.gguf").tensors}
    assert set(tensors) == set(weights)
    for name, weight in weights.items():
        assert (tensors[name] == weight.half().numpy()).all(), name
    assert contents(folder / "cpp") == contents(make_llama_cpp(tmp_path / "cpp"))
    left = {path.name for path in folder.iterdir()} - {".cache", ".unsloth", ".config", ".triton"}
    assert left == {"cpp", "out", "programs", "model.F16.gguf"}
    assert (folder / "model.F16.gguf").read_text() == "another's"


def test_several_types_come_from_one_conversion_and_llama_quantize(exports: Path) -> None:
    said = said_of(exports, "several")
    assert said["code"] == 0, said["log"]
    files = {path.name for path in (exports / "several" / "out").iterdir()}
    assert files == {"model-q4_k_m.gguf", "model-bf16.gguf", "model-q8_0.gguf", "README.md"}


@pytest.mark.parametrize("broken", ["quantizer", "converter"])
def test_a_failure_is_said_and_nothing_is_installed(broken: str, exports: Path) -> None:
    said = said_of(exports, broken)
    assert said["code"] == 1
    assert "Unsloth's exporter failed" in said["message"]
    assert "CUDA_VISIBLE_DEVICES" in said["hint"]
    assert "reinstall" not in said["log"]
    assert not (exports / broken / "out").exists()
