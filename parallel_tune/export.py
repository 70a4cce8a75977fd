"""`parallel-tune export`: what a finished run trained, as an adapter, a merged model or a GGUF file, with its card."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from parallel_tune import outcome
from parallel_tune.config import TrainConfig
from parallel_tune.gguf_means import choose
from parallel_tune.launch import without_launcher
from parallel_tune.model_card import model_card
from parallel_tune.nvml import probe_gpus
from parallel_tune.process import die_with_parent
from parallel_tune.report import read as read_report
from parallel_tune.rundir import RunDir
from parallel_tune.watcher import failure_of
from strategies.errors import ConfigError, RunFailed

METHODS = ("lora", "merged_16bit", "merged_4bit", "gguf")


@dataclass(frozen=True)
class Export:
    """What is wanted.

    Attributes:
        method: one of METHODS.
        quantizations: the types of the GGUF files, one file each.
        hub_path: the Hub repository to push to; None for none.
        exporter: what writes GGUF files, "unsloth" or "llama.cpp".
        converter: llama.cpp's script, where it is needed.
        quantizer: its llama-quantize, likewise.
        said: which exporter it is and why, for the user.
    """

    method: str
    save_path: str
    quantizations: tuple[str, ...] = ("f16",)
    hub_path: str | None = None
    exporter: str = "llama.cpp"
    converter: str | None = None
    quantizer: str | None = None
    said: str = ""


def export_run(path: Path, wanted: Export, hub_token: str | None) -> None:
    """Write the export, and push it if asked; the folder appears only when complete.

    Raises:
        ConfigError: the run is not finished, the folder is taken, or something that is needed is not there.
        RunFailed: the export began and failed.
    """
    run = RunDir(path.absolute())
    config, plan = run.read()
    wanted = check(run, config, plan.engine, wanted)
    if wanted.said:
        click.echo(wanted.said)
    part = unfinished(Path(wanted.save_path))
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"cannot write {part}: {error.strerror}", "Choose another --save_path.") from error
    card = model_card(config, plan, _report_of(run), wanted.method)
    try:
        _run_child(run, wanted, card, hub_token)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    click.echo(f"{wanted.method}: {wanted.save_path}")
    if wanted.hub_path:
        click.echo(f"pushed to {wanted.hub_path}")


def _report_of(run: RunDir) -> dict[str, Any]:
    # A run that died after its result was written has none; the weights are whole all the same.
    return read_report(run.report) if run.report.exists() else {}


def unfinished(target: Path) -> Path:
    """Where an export lies until it is complete."""
    return target.with_name(f".{target.name}.part")


def check(run: RunDir, config: TrainConfig, engine: str, wanted: Export) -> Export:
    """The export with everything that it needs found; nothing has been loaded yet.

    Raises:
        ConfigError: something is missing, or in the way.
    """
    if not run.result(config).exists():
        raise ConfigError(
            f"{run.path} is not finished: {run.result(config).name}/ is missing",
            f"`parallel-tune resume {shlex.quote(str(run.path))}` goes on with it.",
        )
    if wanted.method == "lora" and config.full_finetuning:
        raise ConfigError("the run trained all weights: there is no adapter", "Use --save_method merged_16bit.")
    return check_means(wanted, engine)


def check_means(wanted: Export, engine: str) -> Export:
    """The same as far as it does not depend on the run's result, so that it can be asked before training.

    Args:
        engine: the run's.

    Raises:
        ConfigError: the folder is taken, a GGUF type is unknown, or llama.cpp or what it needs is not there.
    """
    target = Path(wanted.save_path).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{wanted.save_path} is there already", "Give a --save_path that is new or empty.")
    wanted = replace(wanted, save_path=str(target))
    if wanted.method != "gguf":
        return wanted
    # Only Unsloth's exporter asks for a GPU; a MIG instance, which nothing is planned for, hinders no other.
    gpu = engine == "unsloth" and bool(probe_gpus(os.environ).hardware.devices)
    means = choose(engine, gpu, wanted.quantizations)
    return replace(
        wanted, exporter=means.exporter, converter=means.converter, quantizer=means.quantizer, said=means.said
    )


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
