"""The run directory: where everything about a run lies, and what each process says of its end."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from parallel_tune.config import TrainConfig, make_config
from parallel_tune.outcome import Outcome as Outcome
from parallel_tune.outcome import load, log_file, outcome_file, process_id_file, save
from parallel_tune.outcome import write_atomically as write_atomically
from strategies.contracts import Plan
from strategies.errors import ConfigError


@dataclass(frozen=True)
class RunDir:
    """Paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def data(self) -> Path:
        return self.path / "data.json"

    @property
    def timeline(self) -> Path:
        return self.path / "timeline.json"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def result(self, config: TrainConfig) -> Path:
        """Where the trained weights go."""
        return self.model if config.full_finetuning else self.adapter

    def log(self, rank: int) -> Path:
        return log_file(self.logs, rank)

    def outcome(self, rank: int) -> Path:
        return outcome_file(self.logs, rank)

    def process_id(self, rank: int) -> Path:
        """Where a worker writes its process id."""
        return process_id_file(self.logs, rank)

    def read(self) -> tuple[TrainConfig, Plan]:
        """The settings and the plan that the run obeys.

        Raises:
            ConfigError: the folder is no run directory, or its settings or plan are damaged.
        """
        try:
            settings = yaml.safe_load(self.config.read_text(encoding="utf-8"))
            plan = self.plan.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"{self.path} is not a run directory: {error.filename} cannot be read",
                "Give the folder that a training run named as its run directory.",
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise self._damaged(str(error).splitlines()[0]) from error
        if not isinstance(settings, dict):
            raise self._damaged(f"{self.config.name} holds no settings")
        return make_config(settings), Plan.from_json(plan)

    def _damaged(self, how: str) -> ConfigError:
        return ConfigError(
            f"{self.config.name} or {self.plan.name} of {self.path} is damaged: {how}",
            "Put the file back as it was; its checkpoints and results are untouched.",
        )


def create(config: TrainConfig, plan: Plan, now: float | None = None) -> RunDir:
    """Make the run directory and write config and plan into it.

    Raises:
        ConfigError: the directory holds a run already, or cannot be made.
    """
    if config.output_dir is not None:
        path = Path(config.output_dir)
    else:
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config.model).name)
        path = new_folder(f"{stamp}-{name}-{plan.strategy}")
    run = RunDir(path.absolute())
    # A resume may come from another working directory.
    raw_text_file = _absolute(config.raw_text_file) if config.raw_text_file else None
    save_path = str(Path(config.save_path).expanduser().absolute()) if config.save_path else None
    config = config.replace(
        model=_absolute(config.model),
        dataset=_absolute(config.dataset),
        raw_text_file=raw_text_file,
        save_path=save_path,
    )
    try:
        str(run.path).encode()
        is_taken = run.plan.exists() or not _claim(run)
    except UnicodeEncodeError as error:
        # Weights are written by libraries that take UTF-8 alone: the run would fail after its last step.
        raise ConfigError(
            f"the path of the run directory {str(run.path)!r} is not UTF-8", "Choose another --output_dir."
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot use the run directory {path}: {error.strerror}", "Choose another one.") from error
    if is_taken:
        raise ConfigError(
            f"{path} holds a run already",
            f"Go on with it by `parallel-tune resume {shlex.quote(str(path))}`, or choose another --output_dir.",
        )
    try:
        run.logs.mkdir(exist_ok=True)
        write_atomically(run.config, config.to_yaml())
        write_atomically(run.plan, plan.to_json())
    except OSError as error:
        with contextlib.suppress(OSError):
            run.config.unlink()  # the claim: another try may take the directory
        raise ConfigError(
            f"cannot write the run directory {path}: {error.strerror}", "Choose another --output_dir."
        ) from error
    return run


def _claim(run: RunDir) -> bool:
    """Make the directory this command's own; False if it is another's. Of two that ask at once one has it."""
    run.path.mkdir(parents=True, exist_ok=True)
    try:
        run.config.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _absolute(name: str) -> str:
    """A path of something that is there made absolute; any other name, a Hub id say, as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def new_folder(name: str) -> Path:
    """A folder in outputs/ of this name, or numbered where there is one: of two that ask at once each has its own.

    Raises:
        ConfigError: it cannot be made.
    """
    path, number = Path("outputs") / name, 1
    while True:
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1
            path = path.with_name(f"{name}-{number}")
        except OSError as error:
            raise ConfigError(f"cannot make {path}: {error.strerror}", "Choose another --output_dir.") from error


def write_outcome(run: RunDir, rank: int, outcome: Outcome) -> None:
    save(run.outcome(rank), outcome)


def read_outcome(run: RunDir, rank: int) -> Outcome | None:
    """What the rank said, or None if it ended without a word."""
    return load(run.outcome(rank))


def read_metrics(run: RunDir) -> list[dict[str, Any]]:
    """All complete rows of metrics.jsonl; where a resumed run trained steps again, the later row counts."""
    rows: dict[tuple[int, bool], dict[str, Any]] = {}
    try:
        lines = run.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
            step = int(row["step"])
            for again in range(step - int(row.get("steps", 1)) + 1, step):
                rows.pop((again, False), None)
            rows[(step, "eval_loss" in row)] = row
        except (ValueError, KeyError, TypeError):
            continue
    return [rows[key] for key in sorted(rows)]
