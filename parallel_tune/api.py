"""parallel-tune from Python and notebooks: the same planning, and training in processes of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import click

from parallel_tune import planning, refusal, rundir
from parallel_tune.commands import resume as resume_run
from parallel_tune.commands import start
from parallel_tune.config import DEFAULT_DATASET, DEFAULT_MODEL, TrainConfig, make_config
from parallel_tune.decision import check_present, decide, find_hardware
from parallel_tune.in_memory import dataset_path, model_name
from parallel_tune.needs import check_needs
from parallel_tune.option_types import Options
from parallel_tune.plan_view import render_plan
from parallel_tune.replan import Changes
from parallel_tune.report import read as read_report
from strategies.contracts import Plan
from strategies.errors import StrategiesCombined

Dataset = str | os.PathLike[str] | Sequence[Mapping[str, Any]] | Sized
"""A Hub id, a file or a folder; or rows in memory: a list of dicts, a `datasets.Dataset`, a pandas DataFrame."""


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


def describe(plan: Plan) -> str:
    """A plan as the command line shows it: devices and what fills them, batch, speed, and why."""
    return render_plan(plan)


def plan(
    *,
    model: str | os.PathLike[str] = DEFAULT_MODEL,
    dataset: Dataset = DEFAULT_DATASET,
    strategy: str = "auto",
    **options: Unpack[Options],
) -> Plan:
    """What a run with these options would do; one that does not fit comes back with `fits` False and suggestions.

    Args:
        model: Hub id or local folder.
        dataset: as `tune` takes it; its rows are not read here.
        strategy: "ddp", "model_parallel", an installed one, or "auto".
        options: settings under their command-line names, e.g. hardware="2xT4-16GB".

    Raises:
        ConfigError: a setting is unknown or wrong, or contradicts another.
        StrategiesCombined: ddp together with a device_map that splits.
    """
    config = make_config(_named(model, dataset), {**options, "strategy": strategy})
    refusal.check_settings(config.strategy, config.device_map)
    return decide(config, find_hardware(config))[0]


def tune(
    *,
    model: str | os.PathLike[str],
    dataset: Dataset,
    strategy: str = "auto",
    **options: Unpack[Options],
) -> Run:
    """Fine-tune on all GPUs of this machine and return the finished run.

    Training runs in processes of its own: this one may hold CUDA already, as a notebook's kernel does (what it holds
    counts as used). The plan and a line per step are printed as they come. Interrupting it once saves a checkpoint.

    Args:
        model: Hub id or local folder.
        dataset: Hub id, file or folder; or rows in memory, which are written into the cache folder: a list of dicts,
            a `datasets.Dataset`, a pandas DataFrame.
        strategy: "ddp", "model_parallel", an installed one, or "auto".
        options: further settings under their command-line names, e.g. max_steps=60, load_in_4bit=True.

    Raises:
        ConfigError: a setting is unknown or wrong, or contradicts another.
        NoStrategyFits: no strategy fits, or not the one that was named.
        StrategiesCombined: replication and splitting were asked for together.
        RunFailed: training began and did not reach its end.
        Stopped: it was interrupted; a checkpoint is on disk, and `resume` goes on from it.
    """
    began = time.monotonic()
    config = make_config({**_named(model, dataset), **options, "strategy": strategy})
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


def resume(
    run: str | os.PathLike[str] | Run,
    *,
    replan: bool = False,
    strategy: str | None = None,
    max_devices: int | None = None,
    hardware: str | None = None,
    hub_token: str | None = None,
) -> Run:
    """Go on with a run from its last complete checkpoint, and return it finished.

    Args:
        run: its directory.
        replan: plan the rest for the devices that are here now; each step trains the rows that it would have trained.
        strategy: plan the rest anew by this strategy, or by "auto".
        max_devices: plan it for no more devices than this.
        hardware: plan it for declared devices, e.g. "cpu:2".
        hub_token: for a push when it is done.

    Raises:
        ConfigError: the run is finished, has no complete checkpoint, or its devices are gone.
        NoStrategyFits: the rest was to be planned anew, and nothing fits.
        RunFailed: it did not reach its end.
        Stopped: it was interrupted; a checkpoint is on disk.
    """
    began = time.monotonic()
    path = run.path if isinstance(run, Run) else Path(run)
    changes = Changes(strategy, hardware, max_devices)
    resume_run(path, hub_token, changes if replan or changes != Changes() else None, began)
    return Run(path.absolute())


def _named(model: object, dataset: object) -> dict[str, str]:
    return {"model": model_name(model), "dataset": dataset_path(dataset)}
