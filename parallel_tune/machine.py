"""What is known of this machine beyond its devices' names: its constants, measured here or built in, and said which."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import click

from parallel_tune.config import TrainConfig
from parallel_tune.gpus import known_gpu, plain
from parallel_tune.hardware import probe_details
from parallel_tune.memory import constants, corrections, stage_times
from parallel_tune.memory.constants import Measured, NotMeasured
from parallel_tune.memory.corrections import Corrections
from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.lookup import load_model_facts
from parallel_tune.memory.machine_key import MachineKey, cpu_key, machine_key
from parallel_tune.memory.settings import MachineConstants
from parallel_tune.memory.stage_times import StageTimes
from parallel_tune.nvml import MIB, driver_version, read_nvml
from parallel_tune.planning import in_4bit, training_settings
from strategies.contracts import Hardware, Plan
from strategies.errors import ConfigError, RunFailed

BUILT_IN = "built in (from two NVIDIA H200s)"

When = Literal["never", "missing", "always"]


@dataclass(frozen=True)
class Machine:
    """What a plan takes from the machine.

    Attributes:
        keys: of each GPU model that is here, by the devices' names; empty for declared devices and for a CPU.
        timed: likewise, with the CPU of this machine, which virtual devices are always of.
        measured: constants by the devices' names; a name that is missing has the built-in ones.
        said: for people, where the constants come from.
    """

    keys: Mapping[str, MachineKey] = field(default_factory=dict)
    measured: Mapping[str, MachineConstants] = field(default_factory=dict)
    said: tuple[str, ...] = ()
    timed: Mapping[str, MachineKey] = field(default_factory=dict)

    @property
    def stage_times(self) -> StageTimes:
        """What layers and heads took in past split runs on these devices."""
        return StageTimes(self.timed)

    @property
    def corrections(self) -> Corrections:
        """What past runs on these devices teach."""
        return Corrections(self.keys, frozenset(self.measured))


def know(
    hardware: Hardware,
    when: When = "never",
    measure: Callable[[Sequence[str]], Measured] | None = None,
    in_4bit: bool = False,
) -> Machine:
    """The constants of the devices.

    Args:
        when: to measure: "never" takes seconds off nobody's plan; "missing" is for a training run; "always" because the
            user asked.
        measure: what measures; a child process but for tests.
        in_4bit: the run's weights are, and what they take beside is wanted.

    Raises:
        ConfigError: the user asked, and there is no GPU here, or the devices are declared.
        RunFailed: the user asked, and it failed.
    """
    if hardware.kind == "cpu" or hardware.declared:
        if when == "always":
            what = "the devices are declared" if hardware.declared else "there is no GPU here"
            raise ConfigError(f"--measure measures the GPUs of this machine, and {what}", "Leave --measure out.")
        if hardware.kind == "cpu":
            return Machine(timed={device.name: cpu_key() for device in hardware.devices[:1]})
        return Machine(said=_of_declared(hardware))
    driver = driver_version()
    keys = {device.name: machine_key(device.name, driver) for device in hardware.devices}
    found: dict[str, Measured] = {}
    said: list[str] = []
    for name, key in keys.items():
        known = constants.read(key)
        had_4bit = known is not None and known.nf4_scratch_bytes is not None
        wanted = key.bitsandbytes != "none" and (when == "always" or in_4bit or had_4bit)
        missing = not constants.sufficient(known, len(hardware.devices), wanted)
        if when == "always" or (when == "missing" and missing):
            known, problem = _measure(name, key, hardware, known, measure, wanted)
            if problem and when == "always":
                raise RunFailed(
                    f"the constants of {name} could not be measured: {problem}",
                    "Nothing else may change its use of the card meanwhile. Plans go on with what was known before.",
                )
            said += [f"{name}: could not be measured: {problem}"] if problem else []
        if known is not None:
            found[name] = known
        said.append(_sentence(name, known, in_4bit))
    return Machine(keys, {name: measured.constants for name, measured in found.items()}, tuple(said), keys)


def remember(plan: Plan, report: Mapping[str, Any], config: TrainConfig, run: str) -> None:
    """Keep what a finished run used beyond its prediction, for later plans on this machine.

    Args:
        run: what tells this run from all others.

    Raises:
        OSError: the cache cannot be written.
        ConfigError: the model's config is gone.
    """
    rows = corrections.rows_of(report, plan, kind_of_run(config, load_model_facts(config.model), plan), run)
    # Under --hardware the names are those of the table, and no plan for the cards themselves would ask for them.
    here = {card.name for card in read_nvml()} if rows else set()
    for name in here.intersection(rows):
        corrections.remember(machine_key(name, driver_version()), rows[name])


def remember_stages(plan: Plan, report: Mapping[str, Any], config: TrainConfig, run: str) -> None:
    """Keep what the stages of a finished split took, for later plans on this machine.

    Raises:
        OSError: the cache cannot be written.
        ConfigError: the model's config is gone.
    """
    if "stage_seconds" not in report:
        return
    facts = load_model_facts(config.model)
    settings = training_settings(config, facts, plan.engine, plan.dtype, plan.padding_free)
    rows = stage_times.rows_of(report, plan, stage_times.kind_of(facts, settings), run)
    if plan.devices[0].kind == "cpu":
        keys = {name: cpu_key() for name in rows}
    else:
        here = {card.name for card in read_nvml()} if rows else set()
        keys = {name: machine_key(name, driver_version()) for name in here.intersection(rows)}
    for name, key in keys.items():
        stage_times.remember(key, rows[name])


def kind_of_run(config: TrainConfig, facts: ModelFacts, plan: Plan) -> str:
    """What the corrections of a run are kept under."""
    method = "full" if config.full_finetuning else "lora"
    stages = len(plan.devices) if plan.processes == 1 else 1
    return corrections.kind_of(plan.engine, method, in_4bit(config, facts), plan.processes, stages, plan.estimate)


def _measure(
    name: str,
    key: MachineKey,
    hardware: Hardware,
    known: Measured | None,
    measure: Callable[[Sequence[str]], Measured] | None,
    in_4bit: bool,
) -> tuple[Measured | None, str]:
    """What was measured, or what was known before and why there is nothing newer."""
    click.echo(f"measuring the constants of {key.words}; kept for later runs", err=True)
    uuids = probe_details(dict(os.environ)).uuids
    first = next(device.index for device in hardware.devices if device.name == name)
    # A card of the same model is the better partner for NCCL.
    others = sorted((d for d in hardware.devices if d.index != first), key=lambda device: device.name != name)
    chosen = [uuids[first], *(uuids[device.index] for device in others[:1])]
    try:
        return constants.measure_once(key, chosen, measure or partial(constants.in_child, in_4bit=in_4bit), in_4bit), ""
    except NotMeasured as error:
        return known, str(error)
    except OSError as error:
        return known, f"the cache cannot be written: {error}"


def _sentence(name: str, measured: Measured | None, in_4bit: bool) -> str:
    if measured is None:
        return f"constants of {name}: {BUILT_IN}; a training run, or `plan --measure`, measures this machine's own"
    parts = [f"context {measured.context_bytes // MIB}", f"workspaces {measured.workspace_bytes // MIB}"]
    built_in = []
    for what, size in (("NCCL", measured.nccl_bytes), ("4-bit scratch", measured.nf4_scratch_bytes)):
        if size is None:
            built_in += [what] if in_4bit or what == "NCCL" else []
        else:
            parts.append(f"{what} {size // MIB}")
    rest = f"; {' and '.join(built_in)} built in" if built_in else ""
    notes = f" ({'; '.join(measured.notes)})" if measured.notes else ""
    return f"constants of {name}: measured here on {measured.measured_at[:10]}, MiB: {', '.join(parts)}{rest}{notes}"


def _of_declared(hardware: Hardware) -> tuple[str, ...]:
    """Built-in ones, even where a card of the name is in this machine: the declared one has another stack, for all that
    is known."""
    names = {plain(device.name) for device in hardware.devices}
    here = []
    for card in read_nvml():
        gpu = known_gpu(card.name, card.total_bytes // MIB)
        if gpu is not None and plain(gpu.name) in names:
            here.append(card.name)
    unused = f"; nothing measured on this machine's {here[0]} is used" if here else ""
    return (f"constants {BUILT_IN}; the devices are declared{unused}",)
