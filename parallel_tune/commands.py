"""What the verbs do: settings to plan to run."""

from __future__ import annotations

import io
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click
import psutil

from parallel_tune import checkpoint, export_after, planning, refusal, replan, rundir
from parallel_tune.alone import alone
from parallel_tune.config import TrainConfig, make_config, read_yaml
from parallel_tune.decision import check_present, decide, find_hardware
from parallel_tune.display import open_display, summary
from parallel_tune.launch import launch_spec
from parallel_tune.needs import check_needs
from parallel_tune.plan_view import render_plan
from parallel_tune.report import read as read_report
from parallel_tune.reporting.run_page import try_to_write_page
from parallel_tune.startup import clocks, process_began
from parallel_tune.watcher import Watcher
from strategies.contracts import Plan
from strategies.errors import ConfigError


def read_config(recipe: str | None, options: dict[str, Any]) -> TrainConfig:
    """Defaults, then the recipe, then the command line."""
    return make_config(read_yaml(Path(recipe)) if recipe else {}, options)


def plan(config: TrainConfig, as_json: bool, measure: bool = False) -> None:
    """Print the plan; exit code 3 if it does not fit.

    Args:
        measure: measure this machine's constants first, known or not.
    """
    refusal.check_settings(config.strategy, config.device_map)
    made, lines = decide(config, find_hardware(config), "always" if measure else "never")
    if as_json:
        click.echo(made.to_json())
    else:
        for line in lines:
            click.echo(line)
        click.echo(render_plan(made))
    planning.require_fit(made, config.strategy, shown=True)


def train(config: TrainConfig) -> None:
    """Plan, start, watch, and show the result."""
    launch = refusal.find_launch(os.environ)
    refusal.check_settings(config.strategy, config.device_map, launch)
    if launch is not None and launch.world_size > 1:
        from parallel_tune.joined import train_as_rank

        train_as_rank(config, launch)
    if launch is not None:
        click.echo(launch.dropping)
        for name in launch.variables:
            os.environ.pop(name, None)
    check_needs(config)
    hardware = find_hardware(config)
    made, lines = decide(config, hardware, "missing", with_data=True)
    for line in lines:
        click.echo(line)
    planning.require_fit(made, config.strategy)
    check_present(made, hardware)
    click.echo(render_plan(made))
    run = rundir.create(config, made)
    click.echo(f"run directory: {run.path}")
    start(made, run, None, config.hub_token)


def start(
    plan: Plan,
    run: rundir.RunDir,
    last_checkpoint: Path | None,
    hub_token: str | None = None,
    began: float | None = None,
) -> None:
    """Run the processes to their end, print the summary, and make the exports that were asked for.

    Args:
        began: when the command began, on the monotonic clock; when this process did, if left out.
    """
    began = process_began() if began is None else began
    cores = psutil.cpu_count(logical=True) or 1
    spec = launch_spec(plan, run, os.environ | clocks(began), cores, last_checkpoint)
    try:
        with open_display(plan, run) as display:
            Watcher(plan.processes, run, spec, display.poll).run()
        _say(summary(read_report(run.report), run.path))
    finally:
        try_to_write_page(run.path)
    export_after.export_result(run, hub_token)


def _say(text: str) -> None:
    """Print; where nobody reads any more, all that is still to be printed goes nowhere, and the work goes on."""
    try:
        click.echo(text)
    except OSError:
        sys.stdout = io.StringIO()


def resume(
    path: Path, hub_token: str | None = None, changes: replan.Changes | None = None, began: float | None = None
) -> None:
    """Go on with a run from its last complete checkpoint, or make the export that a finished one lacks.

    Args:
        changes: plan the rest anew, with these; None keeps the plan.
        began: as `start` takes it.

    Raises:
        ConfigError: the run is finished or still trained, or has no complete checkpoint, or several processes would
            resume it at once, or its devices are gone.
        NoStrategyFits: the rest was to be planned anew, and nothing fits.
    """
    launch = refusal.find_launch(os.environ)
    if launch is not None and launch.world_size > 1:
        raise ConfigError(
            f"{launch.launcher} started {launch.world_size} processes, and `resume` starts the run's own",
            f"Run `parallel-tune resume {shlex.quote(str(path))}` by itself.",
        )
    run = rundir.RunDir(path.absolute())
    config, made = run.read()
    _refuse_finished(run, config)
    with alone(run):
        config, made = run.read()  # which another command may have planned anew meanwhile, or finished
        _refuse_finished(run, config)
        if run.result(config).exists():
            check_needs(config.replace(hub_token=hub_token), run.path)
            click.echo(f"training is done, {run.result(config).name}/ is there; making the export that was asked for")
            export_after.export_result(run, hub_token, is_locked=True)
            return
        last = _last_checkpoint(run)
        for name in checkpoint.remove_unfinished(run.path):
            click.echo(f"{name} was never completed, and is removed", err=True)
        check_needs(config.replace(hub_token=hub_token), run.path)
        if changes is None:
            replan.check_still_here(made, path)
        else:
            config, made, lines = replan.replan(config, made, changes)
            replan.keep(run, checkpoint.step_of(last), config, made)
            for line in (*lines, render_plan(made)):
                click.echo(line)
    click.echo(f"resuming from {last.name}")
    start(made, run, last, hub_token, began)


def _refuse_finished(run: rundir.RunDir, config: TrainConfig) -> None:
    result = run.result(config)
    if result.exists() and export_after.missing_export(config, run.path) is None:
        raise ConfigError(f"{run.path} is finished: {result} is there", "Start a new run to train on.")


def _last_checkpoint(run: rundir.RunDir) -> Path:
    complete = checkpoint.complete_checkpoints(run.path)
    while complete and (damaged := checkpoint.damaged_file(complete[-1])):
        click.echo(f"{complete[-1].name} is passed over: {damaged} is not what was written", err=True)
        complete.pop()
    if not complete:
        raise ConfigError(
            f"{run.path} has no complete checkpoint to go on from",
            "Start again with --save_steps N to have checkpoints, and with another --output_dir or that one removed.",
        )
    return complete[-1]
