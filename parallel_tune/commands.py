"""What the verbs do: settings to plan to run."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import psutil

from parallel_tune import checkpoint, planning, refusal, rundir, trackers
from parallel_tune.config import TrainConfig, make_config, read_yaml
from parallel_tune.display import open_display, summary
from parallel_tune.engines import choose_engine, missing_packages
from parallel_tune.hardware import parse_hardware, probe
from parallel_tune.launch import Watcher, launch_spec, worker_argv
from parallel_tune.memory.lookup import load_model_facts
from parallel_tune.plan_view import render_plan
from parallel_tune.report import read as read_report
from parallel_tune.reporting.run_page import try_to_write_page
from strategies.contracts import Hardware, Plan
from strategies.errors import ConfigError
from strategies.registry import load_registry


def read_config(recipe: str | None, options: dict[str, Any]) -> TrainConfig:
    """Defaults, then the recipe, then the command line."""
    return make_config(read_yaml(Path(recipe)) if recipe else {}, options)


def find_hardware(config: TrainConfig) -> Hardware:
    """The declared devices, or those of this machine."""
    return parse_hardware(config.hardware) if config.hardware else probe(dict(os.environ))


def decide(config: TrainConfig, hardware: Hardware) -> tuple[Plan, list[str]]:
    """The plan and the lines to say before it."""
    gpus = hardware.kind == "cuda"
    engine, said = choose_engine(config.engine, gpus, hardware.declared)
    registry = load_registry()
    plan = planning.make_plan(config, load_model_facts(config.model), engine, hardware, registry)
    plan = replace(plan, launch=worker_argv(plan, "RUN_DIRECTORY"))
    lines = [line for line in (said, "" if hardware.declared else missing_packages(gpus, engine)) if line]
    lines += registry.warnings()
    if not gpus and not config.hardware:
        lines.append(
            "No GPU was found: training on the CPU as one device (cpu:1). "
            "`--hardware cpu:2` gives two virtual devices to try the strategies on."
        )
    return plan, lines


def plan(config: TrainConfig, as_json: bool) -> None:
    """Print the plan; exit code 3 if it does not fit."""
    refusal.check_settings(config.strategy, config.device_map)
    made, lines = decide(config, find_hardware(config))
    if as_json:
        click.echo(made.to_json())
    else:
        for line in lines:
            click.echo(line)
        click.echo(render_plan(made))
    planning.require_fit(made, config.strategy)


def train(config: TrainConfig) -> None:
    """Plan, start, watch, and show the result."""
    launch = refusal.find_launch(os.environ)
    refusal.check_settings(config.strategy, config.device_map, launch)
    if launch is not None:
        from parallel_tune.joined import train_joined

        train_joined(config, launch)
        return
    trackers.check_installed(config.report_to)
    hardware = find_hardware(config)
    made, lines = decide(config, hardware)
    for line in lines:
        click.echo(line)
    planning.require_fit(made, config.strategy)
    check_present(made, hardware)
    click.echo(render_plan(made))
    run = rundir.create(config, made)
    click.echo(f"run directory: {run.path}")
    start(made, run, None)


def check_present(plan: Plan, hardware: Hardware) -> None:
    """Refuse to train on devices that were only declared.

    Raises:
        ConfigError: the plan needs GPUs that this machine does not have.
    """
    check_devices(len(plan.visible), plan.devices[0].kind, hardware)


def check_devices(needed: int, kind: str, hardware: Hardware) -> None:
    """As `check_present`, for a number of devices."""
    if kind == "cpu":
        return
    present = len(hardware.devices) if not hardware.declared else 0
    if hardware.declared:
        found = probe(dict(os.environ))
        present = len(found.devices) if found.kind == "cuda" else 0
    if present < needed:
        raise ConfigError(
            f"the plan needs {needed} GPUs and this machine has {present}",
            "`parallel-tune plan` shows the plan for declared hardware; train where the GPUs are.",
        )


def start(plan: Plan, run: rundir.RunDir, last_checkpoint: Path | None) -> None:
    """Run the processes to their end and print the summary."""
    cores = psutil.cpu_count(logical=True) or 1
    spec = launch_spec(plan, run, os.environ, cores, last_checkpoint)
    try:
        with open_display(plan, run) as display:
            Watcher(plan.processes, run, spec, display.poll).run()
        click.echo(summary(read_report(run.report), run.path))
    finally:
        try_to_write_page(run.path)


def resume(path: Path) -> None:
    """Go on with a run from its last complete checkpoint.

    Raises:
        ConfigError: the run is finished, or has no complete checkpoint.
    """
    run = rundir.RunDir(path.absolute())
    config, made = run.read()
    if run.result(config).exists():
        raise ConfigError(f"{path} is finished: {run.result(config)} is there", "Start a new run to train on.")
    complete = checkpoint.complete_checkpoints(run.path)
    if not complete:
        raise ConfigError(
            f"{path} has no complete checkpoint to go on from",
            "Start again with --save_steps N to have checkpoints.",
        )
    click.echo(f"resuming from {complete[-1].name}")
    start(made, run, complete[-1])
