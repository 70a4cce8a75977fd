"""What is compared: the same rows and global batch under each way of laying them on the devices."""

from __future__ import annotations

import difflib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from parallel_tune.config import TrainConfig
from parallel_tune.decision import check_present, decide
from strategies.batching import DEFAULT_ACCUMULATION, DEFAULT_MICRO_BATCH
from strategies.contracts import Hardware, Plan
from strategies.errors import ConfigError, ParallelTuneError
from strategies.registry import load_registry
from strategies.selector import no_strategy_fits

SINGLE, DDP, NAIVE, LANES = "single", "ddp", "naive", "lanes"
BUILT_IN = (SINGLE, DDP, NAIVE, LANES)
LABELS = {SINGLE: "one device", DDP: "ddp", NAIVE: "model_parallel, naive", LANES: "model_parallel, lanes"}


@dataclass(frozen=True)
class Arm:
    """One way to do the work.

    Attributes:
        plan: None where it is not run.
        reason: why it is not run.
        plan_seconds: what planning took.
        lines: what there was to say while planning.
    """

    name: str
    config: TrainConfig
    plan: Plan | None
    reason: str = ""
    plan_seconds: float = 0.0
    lines: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return LABELS.get(self.name, self.name)


def wanted_names(strategies: str | None, strategy: str) -> tuple[str, ...]:
    """The names of the arms that were asked for; all built-in ones if none were.

    Args:
        strategies: comma-separated; model_parallel stands for naive and lanes.
        strategy: the training option, which is compared with a single device.

    Raises:
        ConfigError: there is no such strategy.
    """
    asked = [name.strip() for name in (strategies or "").split(",") if name.strip()]
    if strategies is not None and not asked:
        raise ConfigError("--strategies names none", "Leave it out to compare all.")
    if not asked:
        asked = [*BUILT_IN] if strategy == "auto" else [SINGLE, strategy]
    names: list[str] = []
    known = (*BUILT_IN, "model_parallel", *(item.name for item in load_registry().in_auto_order()))
    for name in asked:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"--strategies: there is no {name!r}",
                f"Did you mean {near[0]}?" if near else f"There are {', '.join(dict.fromkeys(known))}.",
            )
        names += [NAIVE, LANES] if name == "model_parallel" else [name]
    return tuple(dict.fromkeys(names))


def shared_config(config: TrainConfig, num_devices: int) -> TrainConfig:
    """The settings that all arms share: one global batch, and nothing but training.

    Without a global batch it is what ddp on all devices would make of the micro-batch and the accumulation.
    """
    micro = config.per_device_train_batch_size or DEFAULT_MICRO_BATCH
    steps = config.gradient_accumulation_steps or DEFAULT_ACCUMULATION
    return config.replace(
        global_batch_size=config.global_batch_size or micro * steps * num_devices,
        gradient_accumulation_steps=None,  # it follows from the batch and the number of processes
        val_size=0.0, eval_strategy=None, eval_steps=0, early_stopping_patience=None, early_stopping_threshold=0.0,
        load_best_model_at_end=False, save_strategy=None, save_steps=0, save_total_limit=None, logging_steps=1,
        report_to=["none"], save_model=False, save_gguf=False, push_model=False, push_gguf=False, save_path=None,
        hub_path=None, hub_token=None, output_dir=None, run_name=None,
    )  # fmt: skip


def make_arm(name: str, config: TrainConfig, hardware: Hardware) -> Arm:
    """Plan one arm as a real run of these settings would be planned; what cannot be run says why.

    Raises:
        ConfigError: the devices are only declared.
    """
    began = time.monotonic()
    if name != SINGLE and min(len(hardware.devices), config.max_devices or len(hardware.devices)) == 1:
        return Arm(name, config, None, "there is one device")
    try:
        config = _config_of(name, config)
        plan, lines = decide(config, hardware, "missing", with_data=True)
    except ParallelTuneError as error:
        return Arm(name, config, None, error.message)
    seconds = time.monotonic() - began
    reason = _why_not(name, plan, config)
    if reason:
        return Arm(name, config, None, reason, seconds, tuple(lines))
    check_present(plan, hardware)
    return Arm(name, config, plan, "", seconds, tuple(lines))


def _config_of(name: str, config: TrainConfig) -> TrainConfig:
    if name in (NAIVE, LANES):
        capture = "auto" if config.capture == "on" else config.capture
        lanes = config.lanes if name == LANES else None
        pipeline = "on" if name == LANES else "off"
        return config.replace(strategy="model_parallel", pipeline=pipeline, lanes=lanes, capture=capture)
    if name not in (SINGLE, DDP):
        return config.replace(strategy=name)
    alone = 1 if name == SINGLE else config.max_devices
    return config.replace(
        strategy="ddp", max_devices=alone, device_map=None, stages=None, lanes=None, pipeline="auto"
    )  # fmt: skip


def _why_not(name: str, plan: Plan, config: TrainConfig) -> str:
    if not plan.fits:
        return no_strategy_fits(plan, config.strategy).message
    if name == DDP and plan.processes == 1:
        return "one process is all that it can use here, which is the same as one device: " + " ".join(plan.reasons[:1])
    if name == LANES and plan.lanes < 2:
        return "no micro-batches can overlap here: " + " ".join(plan.reasons[:1])
    return ""


def runnable(arms: Sequence[Arm]) -> list[Arm]:
    """The arms that are run."""
    return [arm for arm in arms if arm.plan is not None]
