"""parallel-tune from Python and notebooks: the same planning, and training in processes of its own."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from parallel_tune import planning, refusal, rundir
from parallel_tune.commands import check_needs, start
from parallel_tune.config import TrainConfig, make_config
from parallel_tune.decision import check_present, decide, find_hardware
from parallel_tune.plan_view import render_plan
from parallel_tune.report import read as read_report
from strategies.contracts import Plan
from strategies.errors import StrategiesCombined


@dataclass(frozen=True)
class Run:
    """A finished run, read from its directory."""

    path: Path

    @property
    def report(self) -> dict[str, Any]:
        """report.json: what came out beside what was predicted."""
        return read_report(self._directory.report)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl: step, loss, tokens_per_second and so on, ready for a DataFrame."""
        return rundir.read_metrics(self._directory)

    @property
    def adapter(self) -> Path:
        """The folder of the trained weights: the adapter, or the model after full fine-tuning."""
        return self.path / str(self.report["result"])

    @property
    def plan(self) -> Plan:
        return self._directory.read()[1]

    @property
    def config(self) -> TrainConfig:
        return self._directory.read()[0]

    @property
    def _directory(self) -> rundir.RunDir:
        return rundir.RunDir(self.path)


def plan(**options: Any) -> Plan:
    """What a run with these options would do; one that does not fit comes back with `fits` False and suggestions.

    Args:
        options: settings under their command-line names, e.g. model="Qwen/Qwen3-8B", hardware="2xT4-16GB".

    Raises:
        ConfigError: a setting is unknown or wrong, or contradicts another.
        StrategiesCombined: ddp together with a device_map that splits.
    """
    config = make_config(options)
    refusal.check_settings(config.strategy, config.device_map)
    return decide(config, find_hardware(config))[0]


def tune(*, model: str | Path, dataset: str | Path, strategy: str = "auto", **options: Any) -> Run:
    """Fine-tune on all GPUs of this machine and return the finished run.

    Training runs in processes of its own: this one may hold CUDA already, as a notebook's kernel does (what it holds
    counts as used). The plan and a line per step are printed as they come. Interrupting it once saves a checkpoint.

    Args:
        model: Hub id or local folder.
        dataset: Hub id, file or folder.
        strategy: "ddp", "model_parallel" or "auto".
        options: further settings under their command-line names, e.g. max_steps=60, load_in_4bit=True.

    Raises:
        ConfigError: a setting is unknown or wrong, or contradicts another.
        NoStrategyFits: no strategy fits, or not the one that was named.
        StrategiesCombined: replication and splitting were asked for together.
        RunFailed: training began and did not reach its end.
        Stopped: it was interrupted; a checkpoint is on disk, and `parallel-tune resume` goes on from it.
    """
    began = time.monotonic()
    config = make_config({**options, "model": str(model), "dataset": str(dataset), "strategy": strategy})
    outer = refusal.find_launch(os.environ)
    refusal.check_settings(config.strategy, config.device_map, outer)
    if outer is not None and outer.world_size > 1:
        raise StrategiesCombined(
            f"tune() starts its processes itself, and {outer.launcher} has started {outer.world_size} already",
            f"Call tune() from a plain process, or run `parallel-tune` under {outer.launcher}.",
        )
    check_needs(config)
    hardware = find_hardware(config)
    made, lines = decide(config, hardware, "missing", with_data=True)
    planning.require_fit(made, config.strategy)
    check_present(made, hardware)
    run = rundir.create(config, made)
    for line in (*lines, render_plan(made), f"run directory: {run.path}"):
        click.echo(line)
    start(made, run, None, config.hub_token, began)
    return Run(run.path)
