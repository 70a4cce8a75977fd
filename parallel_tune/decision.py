"""The plan of a run on the devices that are there or declared, and whether they are really there."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, replace

from parallel_tune import planning, tracing
from parallel_tune.config import TrainConfig
from parallel_tune.engines import check_attention, choose_engine, missing_packages
from parallel_tune.hardware import parse_hardware, probe
from parallel_tune.known_rows import KnownRows, could_do_better, measure_rows
from parallel_tune.launch import worker_argv
from parallel_tune.machine import Machine, When, kind_of_run, know
from parallel_tune.memory.corrections import correct
from parallel_tune.memory.facts import ModelFacts, facts_from_config
from parallel_tune.memory.lookup import load_model_config
from parallel_tune.memory.timed import TimedEstimator, sentences, timed
from parallel_tune.planning import Estimating
from parallel_tune.prediction import arrangement_of
from strategies.contracts import Hardware, Plan
from strategies.errors import ConfigError
from strategies.registry import load_registry

EAGER = "the formula for tokens/s counts sdpa's attention: eager attention makes the scores of all pairs, and is slower"
"""Said where the attention that was named is not what was measured."""


def find_hardware(config: TrainConfig) -> Hardware:
    """The declared devices, or those of this machine."""
    return parse_hardware(config.hardware) if config.hardware is not None else probe(dict(os.environ))


def decide(
    config: TrainConfig, hardware: Hardware, measure: When = "never", with_data: bool = False
) -> tuple[Plan, list[str]]:
    """The plan and the lines to say before it.

    Args:
        measure: when to measure this machine's constants; see `parallel_tune.machine`.
        with_data: read the dataset where the lengths of its rows may make another plan.
    """
    gpus = hardware.kind == "cuda"
    engine, said = choose_engine(config.engine, gpus, hardware.declared)
    registry = load_registry()
    source, name = load_model_config(config.model)
    facts = facts_from_config(source, name)
    check_attention(config, engine, facts)
    tracing.refuse_unknown(config, facts)
    machine = know(hardware, measure, in_4bit=planning.in_4bit(config, facts))
    with tracing.process_for(config, facts, source) as process:
        facts = process.facts if process is not None else facts
        counted_by = tracing.counted_by(process, facts)
        formula = tracing.estimating_for(process, facts, machine.measured)
        measured = timed(formula, facts, machine.stage_times, hardware.devices)

        def planned(estimating: Estimating, rows: KnownRows | None) -> Plan:
            careful = planning.cautious(estimating, machine.corrections, counted_by)
            return planning.make_plan(config, facts, engine, hardware, registry, careful, rows)

        rows = None
        plan = planned(measured, rows)
        if with_data and _is_present(plan, hardware) and could_do_better(config, plan, len(hardware.devices)):
            rows = measure_rows(config)
            plan = planned(measured, rows)
        if measured is not formula and plan.fits:
            plan = _with_stage_times(
                plan, config, facts, machine, hardware, rows, formula, lambda: planned(formula, rows)
            )
        if process is not None:
            plan = tracing.with_traces(plan, config, process)
    plan, learned = correct(plan, kind_of_run(config, facts, plan), machine.corrections)
    plan = replace(
        plan,
        launch=worker_argv(plan, "RUN_DIRECTORY"),
        constants={name: asdict(constants) for name, constants in machine.measured.items()},
        basis=(*machine.said, *learned, *plan.basis, *([EAGER] if config.attn_implementation == "eager" else [])),
    )
    lines = [line for line in (said, "" if hardware.declared else missing_packages(gpus, engine)) if line]
    lines += registry.warnings()
    if not gpus and not config.hardware:
        lines.append(
            "No GPU was found: training on the CPU as one device (cpu:1). "
            "`--hardware cpu:2` gives two virtual devices to try the strategies on."
        )
    return plan, lines


def _with_stage_times(
    plan: Plan,
    config: TrainConfig,
    facts: ModelFacts,
    machine: Machine,
    hardware: Hardware,
    rows: KnownRows | None,
    formula: Estimating,
    by_formula: Callable[[], Plan],
) -> Plan:
    """The plan, which says what its seconds rest on where past runs have measured them."""
    length = config.max_seq_length if rows is None else round(rows.cut(config.max_seq_length).mean)
    settings = planning.training_settings(config, facts, plan.engine, plan.dtype, plan.padding_free)
    settings = replace(settings, sequence_length=length)
    estimator = TimedEstimator(formula, settings, facts, machine.stage_times, hardware.devices)
    measured = sentences(plan, estimator, arrangement_of(plan), by_formula)
    return replace(plan, basis=(*measured, *plan.basis))


def check_present(plan: Plan, hardware: Hardware) -> None:
    """Refuse to train on devices that were only declared.

    Raises:
        ConfigError: the plan needs GPUs that this machine does not have.
    """
    check_devices(len(plan.visible), plan.devices[0].kind, hardware)


def _is_present(plan: Plan, hardware: Hardware) -> bool:
    try:
        check_present(plan, hardware)
    except ConfigError:
        return False
    return True


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
