"""The rest of a run planned anew, for other devices or by another strategy: the same rows in each step."""

from __future__ import annotations

import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from parallel_tune import planning
from parallel_tune.config import TrainConfig
from parallel_tune.decision import check_present, decide, find_hardware
from parallel_tune.hardware import probe
from parallel_tune.rundir import RunDir, write_atomically
from strategies.contracts import Plan
from strategies.errors import ConfigError

LAYOUT: dict[str, None] = dict.fromkeys(
    ("per_device_train_batch_size", "gradient_accumulation_steps", "device_map", "stages", "lanes")
)
"""Settings that were chosen for the devices there were; the global batch stays."""
LEAST_SHARE = 0.98
"""Of a planned card's memory that one in its place must have: drivers report a little more or less of it."""


@dataclass(frozen=True)
class Changes:
    """What the rest of a run shall have otherwise; None for what its settings say.

    Attributes:
        strategy: "ddp", "model_parallel", an installed one, or "auto".
        hardware: devices to declare, e.g. "cpu:2".
        max_devices: no more devices than this.
    """

    strategy: str | None = None
    hardware: str | None = None
    max_devices: int | None = None


def replan(config: TrainConfig, plan: Plan, changes: Changes) -> tuple[TrainConfig, Plan, list[str]]:
    """The settings and the plan that go on with a run, and the lines to say before the plan.

    What decides the training stays: the global batch, the engine and the dtype too, which the first plan may have
    chosen.

    Raises:
        ConfigError: a setting and the devices contradict each other, or the devices are not there.
        NoStrategyFits: nothing fits them, or not the strategy that was named.
    """
    on_cpu = plan.devices[0].kind == "cpu"
    # A map or a number of stages is dropped with the layout, and that it asked for a split is not.
    asks_to_split = config.device_map is not None or config.stages is not None
    strategy = changes.strategy or ("model_parallel" if asks_to_split else config.strategy)
    settings: dict[str, object] = {
        **LAYOUT,
        "global_batch_size": plan.global_batch,
        "engine": plan.engine,
        "dtype": plan.dtype,
        "bf16": False,
        "fp16": False,
        "strategy": strategy,
        # Virtual devices are wherever there is a CPU; cards that were declared may be the ones that are gone.
        "hardware": changes.hardware or (config.hardware if on_cpu else None),
        "max_devices": changes.max_devices or config.max_devices,
    }
    if strategy == "ddp" and config.pipeline == "on":
        settings["pipeline"] = "auto"
    changed = config.replace(**settings)
    hardware = find_hardware(changed)
    made, lines = decide(changed, hardware, "missing", with_data=True)
    planning.require_fit(made, changed.strategy)
    check_present(made, hardware)
    assert made.global_batch == plan.global_batch
    return changed, made, lines


def keep(run: RunDir, step: int, config: TrainConfig, plan: Plan) -> None:
    """Let a run obey another plan from now on; the one before is kept as plan-to-step-STEP.json.

    Whoever calls it holds the run directory's lock.

    Raises:
        ConfigError: the run directory cannot be written.
    """
    try:
        shutil.copyfile(run.plan, run.path / f"plan-to-step-{step}.json")
        write_atomically(run.config, config.to_yaml())
        write_atomically(run.plan, plan.to_json())
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename}: {error.strerror}", "Make it writable.") from error


def check_still_here(plan: Plan, run: Path) -> None:
    """Refuse to go on with a run on devices that are gone, before anything loads.

    Raises:
        ConfigError: fewer GPUs than the plan has, or one with less memory in another's place.
    """
    if plan.devices[0].kind == "cpu":
        return
    here = {device.index: device for device in probe(dict(os.environ)).devices if device.kind == "cuda"}
    hint = (
        f"`parallel-tune resume {shlex.quote(str(run))} --replan` plans the rest for the devices that are here; "
        "each step trains the same rows as before."
    )
    missing = [device for device in plan.devices if device.index not in here]
    if missing:
        raise ConfigError(
            f"the run was planned for {len(plan.visible)} GPUs (device {missing[0].index} is {missing[0].name}), and "
            f"this command sees {len(here) or 'none'}",
            hint,
        )
    for device in plan.devices:
        found = here[device.index]
        if found.capacity_bytes < LEAST_SHARE * device.capacity_bytes:
            raise ConfigError(
                f"the run was planned for {device.name} with {device.capacity_bytes >> 20:,} MiB as device "
                f"{device.index}, which is {found.name} with {found.capacity_bytes >> 20:,} MiB here",
                hint,
            )
