"""`parallel-tune export`: what a finished run trained, as an adapter, a merged model or a GGUF file, with its card."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import click

from parallel_tune import outcome
from parallel_tune.config import TrainConfig
from parallel_tune.launch import failure_of, without_launcher
from parallel_tune.model_card import model_card
from parallel_tune.process import die_with_parent
from parallel_tune.report import read as read_report
from parallel_tune.rundir import RunDir
from strategies.errors import ConfigError, RunFailed

METHODS = ("lora", "merged_16bit", "merged_4bit", "gguf")
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "auto")
"""What llama.cpp's converter writes by itself."""
SMALLER_GGUF_TYPES = (
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m", "q5_0", "q5_1", "q5_k_s", "q5_k_m",
    "q6_k",
)  # fmt: skip
"""What its llama-quantize makes of such a file."""
CONVERTER = "convert_hf_to_gguf.py"
QUANTIZER = "llama-quantize"


@dataclass(frozen=True)
class Export:
    """What is wanted.

    Attributes:
        method: one of METHODS.
        quantizations: the types of the GGUF files, one file each.
        hub_path: the Hub repository to push to; None for none.
        converter: llama.cpp's script, where it is needed.
        quantizer: its llama-quantize, likewise.
    """

    method: str
    save_path: str
    quantizations: tuple[str, ...] = ("f16",)
    hub_path: str | None = None
    converter: str | None = None
    quantizer: str | None = None


def export_run(path: Path, wanted: Export, hub_token: str | None) -> None:
    """Write the export, and push it if asked; the folder appears only when complete.

    Raises:
        ConfigError: the run is not finished, the folder is taken, or something that is needed is not there.
        RunFailed: the export began and failed.
    """
    run = RunDir(path.absolute())
    config, plan = run.read()
    wanted = check(run, config, wanted)
    part = unfinished(Path(wanted.save_path))
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"cannot write {part}: {error.strerror}", "Choose another --save_path.") from error
    card = model_card(config, plan, read_report(run.report), wanted.method)
    try:
        _run_child(run, wanted, card, hub_token)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    click.echo(f"{wanted.method}: {wanted.save_path}")
    if wanted.hub_path:
        click.echo(f"pushed to {wanted.hub_path}")


def unfinished(target: Path) -> Path:
    """Where an export lies until it is complete."""
    return target.with_name(f".{target.name}.part")


def check(run: RunDir, config: TrainConfig, wanted: Export) -> Export:
    """The export with everything that it needs found; nothing has been loaded yet.

    Raises:
        ConfigError: something is missing, or in the way.
    """
    if not run.result(config).exists() or not run.report.exists():
        raise ConfigError(
            f"{run.path} is not finished: {run.result(config).name}/ is missing",
            f"`parallel-tune resume {run.path}` goes on with it.",
        )
    if wanted.method == "lora" and config.full_finetuning:
        raise ConfigError("the run trained all weights: there is no adapter", "Use --save_method merged_16bit.")
    return check_means(wanted)


def check_means(wanted: Export) -> Export:
    """The same as far as it does not depend on the run's result, so that it can be asked before training.

    Raises:
        ConfigError: the folder is taken, a GGUF type is unknown, or llama.cpp or what it needs is not there.
    """
    target = Path(wanted.save_path).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{wanted.save_path} is there already", "Give a --save_path that is new or empty.")
    wanted = replace(wanted, save_path=str(target))
    if wanted.method != "gguf":
        return wanted
    unknown = [name for name in wanted.quantizations if name not in GGUF_TYPES + SMALLER_GGUF_TYPES]
    if unknown or not wanted.quantizations:
        raise ConfigError(
            f"llama.cpp does not write {', '.join(unknown) or 'a GGUF file without a type'}",
            f"Choose from {', '.join(GGUF_TYPES + SMALLER_GGUF_TYPES)}.",
        )
    smaller = any(name in SMALLER_GGUF_TYPES for name in wanted.quantizations)
    converter = find_converter()
    check_converter(Path(converter))
    return replace(wanted, converter=converter, quantizer=find_quantizer() if smaller else None)


def find_converter() -> str:
    """llama.cpp's converter: in LLAMA_CPP_DIR, on PATH, in ./llama.cpp, or where Unsloth puts it.

    Raises:
        ConfigError: it is nowhere.
    """
    folders = _llama_cpp_folders()
    for folder in folders:
        if (folder / CONVERTER).is_file():
            return str((folder / CONVERTER).absolute())
    on_path = shutil.which(CONVERTER)
    if on_path:
        return on_path
    raise ConfigError(
        f"--save_method gguf needs llama.cpp's {CONVERTER}, which is not in {', '.join(map(str, folders))} nor on PATH",
        "`git clone https://github.com/ggml-org/llama.cpp` here or set LLAMA_CPP_DIR; merged_16bit needs nothing more.",
    )


def check_converter(converter: Path) -> None:
    """Refuse a converter whose imports would fail, hours later.

    Raises:
        ConfigError: a package that it needs is not installed.
    """
    # llama.cpp has its own gguf package, which the script finds by itself.
    bundled = {"gguf"} if any((converter.parent / name).is_dir() for name in ("gguf-py", "gguf")) else set()
    for package in ("gguf", "sentencepiece"):
        if package not in bundled and find_spec(package) is None:
            raise ConfigError(
                f"llama.cpp's {CONVERTER} needs the package {package}, which is not installed",
                "`pip install 'parallel-tune[gguf]'` brings what it needs.",
            )


def find_quantizer() -> str:
    """llama.cpp's llama-quantize, built: in one of its folders or on PATH.

    Raises:
        ConfigError: it is nowhere.
    """
    for folder in _llama_cpp_folders():
        for place in (folder / QUANTIZER, folder / "build" / "bin" / QUANTIZER):
            if os.access(place, os.X_OK) and place.is_file():
                return str(place.absolute())
    on_path = shutil.which(QUANTIZER)
    if on_path:
        return on_path
    raise ConfigError(
        f"a GGUF file smaller than q8_0 needs llama.cpp's {QUANTIZER}, which is not built here nor on PATH",
        f"Build llama.cpp, or choose {', '.join(GGUF_TYPES)}, which need its converter alone.",
    )


def _llama_cpp_folders() -> list[Path]:
    named = os.environ.get("LLAMA_CPP_DIR")
    return [Path(named)] if named else [Path("llama.cpp"), Path.home() / ".unsloth" / "llama.cpp"]


def _run_child(run: RunDir, wanted: Export, card: str, hub_token: str | None) -> None:
    """Models are loaded in a process of their own: its memory ends with it, and this one stays without torch."""
    said, log = run.logs / "export.json", run.logs / "export.log"
    said.unlink(missing_ok=True)
    # The token goes through the environment: other users of the machine can read command lines.
    env = without_launcher(os.environ) | {"PYTHONSAFEPATH": "1"} | ({"HF_TOKEN": hub_token} if hub_token else {})
    command = [sys.executable, "-m", "parallel_tune.export_worker", str(run.path)]
    with log.open("ab") as file:
        done = subprocess.run(
            command,
            input=json.dumps({"wanted": asdict(wanted), "card": card}).encode(),
            env=env,
            stdout=file,
            stderr=file,
            preexec_fn=die_with_parent,
            check=False,
        )
    how = outcome.load(said)
    if how is None:
        raise RunFailed(f"the export ended with code {done.returncode} and without a word", f"Log: {log}")
    if how.code != 0:
        raise failure_of(how, "export", log)
