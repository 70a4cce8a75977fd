"""Exports that a training run was asked for: checked before it begins, made when its result is on disk."""

from __future__ import annotations

import contextlib
import shlex
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from parallel_tune.alone import alone
from parallel_tune.config import TrainConfig
from parallel_tune.decision import find_hardware
from parallel_tune.engines import choose_engine
from parallel_tune.export import Export, check_means, export_run
from parallel_tune.rundir import RunDir
from parallel_tune.watcher import stop_signals
from strategies.errors import ConfigError, ParallelTuneError, RunFailed, Stopped


def wanted_export(config: TrainConfig, run: Path) -> Export | None:
    """What the settings ask for, as unsloth-cli.py reads them: GGUF files take the place of the merged model."""
    if config.save_gguf or config.push_gguf:
        hub_path = config.hub_path if config.push_model or config.push_gguf else None
        return Export("gguf", config.save_path or str(run / "gguf"), tuple(config.quantization), hub_path)
    if config.save_model or config.push_model:
        hub_path = config.hub_path if config.push_model else None
        return Export(config.save_method, config.save_path or str(run / config.save_method), hub_path=hub_path)
    return None


def check_ahead(config: TrainConfig, run: Path | None = None) -> str:
    """Refuse an export that could not be made, before anything is trained.

    Args:
        run: the run's directory, where it is there already.

    Returns:
        What will write GGUF files and why, as a line for the user; empty for other exports.

    Raises:
        ConfigError: the folder is taken, llama.cpp is not there, or there is no token for a push.
    """
    wanted = wanted_export(config, run or Path(config.output_dir or "outputs/new"))
    if wanted is None:
        return ""
    said = check_means(wanted, _engine(config, run)).said
    if wanted.hub_path is not None:
        _check_push(config, wanted.hub_path)
    return said


def _engine(config: TrainConfig, run: Path | None) -> str:
    if run is not None:
        return RunDir(run).read()[1].engine
    hardware = find_hardware(config)
    return choose_engine(config.engine, hardware.kind == "cuda", hardware.declared)[0]


def _check_push(config: TrainConfig, hub_path: str) -> None:
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(hub_path)
    except HFValidationError as error:
        raise ConfigError(f"hub_path: {error}", "Write it as NAME/MODEL.") from error
    if not config.hub_token and not get_token():
        raise ConfigError(
            f"the push to {hub_path} needs a token, and there is none",
            "Set HF_TOKEN, log in with `hf auth login`, or give --hub_token.",
        )
    if HF_HUB_OFFLINE:
        raise ConfigError(f"the push to {hub_path} needs the Hub, and HF_HUB_OFFLINE is set", "Unset it.")


def missing_export(config: TrainConfig, run: Path) -> Export | None:
    """The export that the settings ask for, where it is not there yet: its command was killed while it was made."""
    wanted = wanted_export(config, run)
    if wanted is None:
        return None
    target = Path(wanted.save_path)
    return None if target.is_file() or (target.is_dir() and any(target.iterdir())) else wanted


def export_result(run: RunDir, hub_token: str | None, is_locked: bool = False) -> None:
    """Make the export of a finished run, if one was asked for.

    Args:
        is_locked: this process holds the run's lock.

    Raises:
        RunFailed: it could not be made; the trained weights are untouched.
        Stopped: SIGTERM or SIGHUP ended it; `resume` makes it.
    """
    config, _ = run.read()
    wanted = wanted_export(config, run.path)
    if wanted is None:
        return
    try:
        with contextlib.nullcontext() if is_locked else alone(run), _stopping_at_signals(run, config):
            export_run(run.path, wanted, hub_token)
    except KeyboardInterrupt as error:
        raise _failed(run, config, wanted, RunFailed("interrupted")) from error
    except Stopped:
        raise
    except ParallelTuneError as error:
        raise _failed(run, config, wanted, error) from error


@contextlib.contextmanager
def _stopping_at_signals(run: RunDir, config: TrainConfig) -> Iterator[None]:
    """Let SIGTERM and SIGHUP end what is half made in order, while the block runs."""

    def stop(number: int, _frame: Any) -> NoReturn:
        raise Stopped(
            f"the export was stopped by {signal.Signals(number).name}; {run.result(config)} is complete",
            f"`parallel-tune resume {shlex.quote(str(run.path))}` makes the export.",
        )

    # Python lets the main thread alone handle signals.
    is_main = threading.current_thread() is threading.main_thread()
    handled = [number for number in stop_signals() if number != signal.SIGINT] if is_main else []
    previous = {number: signal.signal(number, stop) for number in handled}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _failed(run: RunDir, config: TrainConfig, wanted: Export, error: ParallelTuneError) -> RunFailed:
    command = ["parallel-tune", "export", str(run.path), "--save_method", wanted.method, "--save_path", "NEW_FOLDER"]
    if wanted.method == "gguf":
        command += ["--quantization", ",".join(wanted.quantizations)]
    if wanted.hub_path:
        command += ["--hub_path", wanted.hub_path]
    failed = RunFailed(
        f"training is done and {run.result(config)} is complete, but the export failed: {error.message}",
        f"{error.hint}\n`{shlex.join(command)}` makes it again.".strip(),
    )
    failed.trace = error.trace
    return failed
