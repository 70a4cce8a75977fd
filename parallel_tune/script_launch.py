"""`parallel-tune launch`: a user's script, read, planned for as far as its model is known, then run and watched."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import psutil

from parallel_tune import planning, refusal, rundir
from parallel_tune.config import TrainConfig, make_config
from parallel_tune.decision import check_devices, decide, find_hardware
from parallel_tune.launch import LaunchSpec, process_environment, torchrun_arguments
from parallel_tune.plan_view import render_plan
from parallel_tune.script import MODEL_VARIABLE
from parallel_tune.script_placement import PLAN_VARIABLE
from parallel_tune.script_reading import Reading, check, check_order, read_script
from parallel_tune.script_watch import OutputFollower, ScriptWatcher
from strategies.contracts import Device, DevicePlan, Hardware, Plan
from strategies.errors import ConfigError, StrategiesCombined


@dataclass(frozen=True)
class ScriptLaunch:
    """How a script is run.

    Attributes:
        plan: None where the model's size is not known; then every device is used as asked.
        model: the model that the plan is for.
        lines: what to say before the start.
    """

    strategy: str
    processes: int
    devices: Sequence[Device | DevicePlan]
    plan: Plan | None
    model: str | None
    lines: tuple[str, ...] = ()

    def to_json(self) -> str:
        """What plan.json holds; without a plan, as much as is known, under the same names."""
        if self.plan is not None:
            return self.plan.to_json()
        known: dict[str, Any] = {
            "strategy": self.strategy,
            "processes": self.processes,
            "devices": [dataclasses.asdict(device) for device in self.devices],
            "device_map": {"": "local_rank"} if self.strategy == "ddp" else {},
            "micro_batch": None,
            "gradient_accumulation_steps": None,
        }
        return json.dumps(known, indent=2)


def launch_script(script: Path, arguments: Sequence[str], options: Mapping[str, Any]) -> None:
    """Read the script, decide, start its processes and wait for them.

    Raises:
        StrategiesCombined: the script does by itself what the strategy excludes, with file and line.
        RunFailed: a process of it failed.
    """
    config = make_config(options)
    _refuse_outer_launcher()
    reading = read_script(script)
    check_order(script, arguments, options)
    hardware = find_hardware(config)
    chosen = choose(config, options.get("model"), reading, hardware, options)
    check(reading, chosen.strategy, len(chosen.devices) if chosen.devices[0].kind == "cuda" else 0)
    check_devices(len(chosen.devices), chosen.devices[0].kind, hardware)
    for line in chosen.lines:
        click.echo(line)
    if chosen.plan is not None:
        click.echo(render_plan(dataclasses.replace(chosen.plan, launch=())))
    run = make_folder(config.output_dir, script, chosen)
    click.echo(f"logs: {run.logs}")
    spec = script_spec(chosen, run, script, arguments, os.environ, psutil.cpu_count(logical=True) or 1)
    with OutputFollower(run.log(0), sys.stdout) as follower:
        ScriptWatcher(chosen.processes, run, spec, follower.poll).run()


def choose(
    config: TrainConfig, model: str | None, reading: Reading, hardware: Hardware, given: Collection[str] = ()
) -> ScriptLaunch:
    """Strategy, processes and devices of a script.

    Args:
        model: what the user named; else the script may write it out.
        given: names of the settings that the user gave; others are taken from the script where it writes them out.

    Raises:
        ConfigError: the model's size is needed and not known.
        NoStrategyFits: it is known, and too large.
    """
    strategy, lines = config.strategy, []
    split = reading.split()
    if strategy == "auto" and split is not None:
        strategy = "model_parallel"
        lines.append(
            f"{reading.path}:{split.line}: {split.what} asks for a split, so model_parallel is taken; "
            "leave it out and auto decides by the model's size."
        )
    check(reading, strategy)
    written = reading.models[0] if len(reading.models) == 1 else None
    if model is None and (strategy == "ddp" or (strategy == "model_parallel" and (split or hardware.kind == "cpu"))):
        # As asked, on all devices: nothing about the size needs to be known.
        return _without_plan(strategy, hardware, lines)
    name = model or written
    if name is None:
        found = f"names {len(reading.models)} models" if reading.models else "does not write its model out"
        needs = "how the model is split" if strategy == "model_parallel" else "which strategy fits"
        raise ConfigError(
            f"{reading.path} {found}, and {needs} depends on its size",
            "Give --model NAME, or --strategy ddp to start it on every device as it is.",
        )
    if model is None:
        lines.append(f"{reading.path} loads {name}: the plan is for that model.")
    config = _as_loaded(config.replace(strategy=strategy, model=name), reading, hardware, given)
    plan, said = decide(config, hardware)
    planning.require_fit(plan, strategy)
    lines += said
    trained = "all weights" if config.full_finetuning else f"adapters of rank {config.r}"
    lines.append(
        f"The plan counts {trained}{' on 4-bit weights' if config.load_in_4bit else ''} and rows of "
        f"{config.max_seq_length} tokens, trained as parallel-tune itself would; what the script trains is its own."
    )
    if plan.strategy == "model_parallel" and hardware.kind == "cpu" and len(plan.devices) > 1:
        lines.append(_CPU_SPLIT)
    return ScriptLaunch(plan.strategy, plan.processes, plan.devices, plan, name, tuple(lines))


def _as_loaded(config: TrainConfig, reading: Reading, hardware: Hardware, given: Collection[str]) -> TrainConfig:
    """The settings as the script loads its model; 4 bit and full fine-tuning as one: they exclude each other."""
    loads = {name: value for name, value in reading.loads.items() if name not in given}
    if hardware.kind == "cpu" or {"load_in_4bit", "full_finetuning"} & set(given):
        loads = {name: value for name, value in loads.items() if name == "max_seq_length"}
    if loads.get("full_finetuning"):
        loads["load_in_4bit"] = False
    return config.replace(**loads)


_CPU_SPLIT = (
    "model_parallel on a CPU: transformers knows one CPU only, so no map is handed over; "
    "the script runs in one process with the whole model."
)


def _without_plan(strategy: str, hardware: Hardware, lines: list[str]) -> ScriptLaunch:
    devices = hardware.devices
    if strategy == "ddp":
        return ScriptLaunch("ddp", len(devices), devices, None, None, tuple(lines))
    if hardware.kind == "cpu" and len(devices) > 1:
        lines.append(_CPU_SPLIT)
    return ScriptLaunch(strategy, 1, devices, None, None, tuple(lines))


def script_spec(
    chosen: ScriptLaunch,
    run: rundir.RunDir,
    script: Path,
    arguments: Sequence[str],
    environ: Mapping[str, str],
    cores: int,
) -> LaunchSpec:
    """Command and environment of a script's processes. Pure.

    `-P` keeps the working directory off the path of our own imports; as a variable the script's children would
    inherit it.
    """
    env = process_environment(chosen.devices, chosen.processes, environ, cores)
    env[PLAN_VARIABLE] = str(run.plan)
    env.pop(MODEL_VARIABLE, None)
    if chosen.devices[0].kind == "cpu":
        # Without it accelerate takes two processes on a CPU for two runs: each trains for itself, and says nothing.
        env["ACCELERATE_USE_CPU"] = "true"
        # TRL's losses are Triton kernels, which a CPU runs only through Triton's interpreter.
        env.setdefault("TRITON_INTERPRET", "1")
    if chosen.model is not None:
        env[MODEL_VARIABLE] = chosen.model
    command = (sys.executable, "-P", "-m", "parallel_tune.script", str(run.path), str(script.absolute()), *arguments)
    if chosen.processes == 1:
        return LaunchSpec(command, env)
    return LaunchSpec((sys.executable, "-P", *torchrun_arguments(chosen.processes), "--no-python", *command), env)


def make_folder(asked: str | None, script: Path, chosen: ScriptLaunch) -> rundir.RunDir:
    """The folder of a launch, with its plan.json and logs/.

    Raises:
        ConfigError: it holds a run already, or cannot be made.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = Path(asked) if asked else rundir.new_folder(f"{stamp}-{script.stem}-{chosen.strategy}")
    run = rundir.RunDir(path.absolute())
    if run.plan.exists():
        raise ConfigError(f"{path} holds a run already", "Choose another --output_dir.")
    try:
        run.logs.mkdir(parents=True, exist_ok=True)
        rundir.write_atomically(run.plan, chosen.to_json())
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}", "Choose another --output_dir.") from error
    return run


def _refuse_outer_launcher() -> None:
    outer = refusal.find_launch(os.environ)
    if outer is not None and outer.world_size > 1:
        raise StrategiesCombined(
            f"parallel-tune launch starts a script's processes itself, and {outer.launcher} has started "
            f"{outer.world_size} already. They cannot be combined.",
            f"Run parallel-tune launch without {outer.launcher}, or the script under {outer.launcher} by itself.",
        )
