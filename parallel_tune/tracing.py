"""`--trace`: memory counted on the model's own code, to plan with or to hold against the closed form."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import click

from parallel_tune import prediction
from parallel_tune.config import TrainConfig
from parallel_tune.memory.closed_form import ClosedFormEstimator
from parallel_tune.memory.facts import KNOWN_TYPES, ModelFacts, facts_from_config
from parallel_tune.memory.lookup import load_model_config
from parallel_tune.memory.settings import MachineConstants, TrainingSettings
from parallel_tune.memory.traced import TracedEstimator, TraceProcess, as_traced
from parallel_tune.planning import Estimating, closed_form, training_settings
from parallel_tune.prediction import TrainedRows, arrangement_of, part_of
from strategies.contracts import MemoryEstimate, Plan
from strategies.errors import ConfigError


def refuse_unknown(config: TrainConfig, facts: ModelFacts) -> None:
    """Refuse to count a model by formulas that were not made for it.

    Raises:
        ConfigError: its weights are quantised by anything but nf4; or the closed form does not describe its layers, and
            no trace was asked for.
    """
    if facts.other_quantization:
        raise ConfigError(
            f"{config.model} holds its weights quantised by {facts.other_quantization}, which is neither counted nor "
            "trained here",
            "Give the model in 16 bit, with --load_in_4bit to hold it in 4 bit, or a repository that bitsandbytes "
            "quantised to 4 bit.",
        )
    if not facts.closed_form_known and not config.trace:
        raise ConfigError(
            f"{config.model} is a {facts.model_type or 'nameless'} model, and the memory of its layers is known for "
            f"{', '.join(sorted(KNOWN_TYPES))} alone",
            "Add --trace: its own code is then run on tensors without bytes and counted, which takes a minute or so.",
        )


def process_for(
    config: TrainConfig, facts: ModelFacts, source: Mapping[str, Any]
) -> contextlib.AbstractContextManager[TraceProcess | None]:
    """The process that traces a model, or nothing where no trace was asked for.

    Args:
        source: the model's config.json.
    """
    if not config.trace:
        return contextlib.nullcontext()
    click.echo(f"tracing {config.model}", err=True)
    return TraceProcess(facts, source)


def counted_by(process: TraceProcess | None, facts: ModelFacts) -> str:
    """What counts the memory of a plan; see `Plan.estimate`."""
    return "closed_form" if process is None or facts.closed_form_known else "trace"


def estimating_for(
    process: TraceProcess | None, facts: ModelFacts, measured: Mapping[str, MachineConstants]
) -> Estimating:
    """The closed form where it describes the model; else the trace."""
    if process is None or counted_by(process, facts) == "closed_form":
        return closed_form(facts, measured)

    def traced(settings: TrainingSettings) -> TracedEstimator:
        return TracedEstimator(ClosedFormEstimator(facts, settings, measured=measured), process)

    return traced


def with_traces(plan: Plan, config: TrainConfig, process: TraceProcess) -> Plan:
    """The plan with what the trace and the closed form count on each device, side by side.

    Both count the step of transformers, cuBLAS's workspaces aside: what Unsloth's kernels save is the closed form's
    alone to say.
    """
    facts = process.facts
    arrangement = arrangement_of(plan)
    settings = as_traced(
        training_settings(config, facts, plan.engine, plan.dtype, plan.padding_free), arrangement.micro_batch
    )
    formula = ClosedFormEstimator(facts, settings)
    if arrangement.gradient_checkpointing == "unsloth":
        arrangement = replace(arrangement, gradient_checkpointing="full")
    devices = []
    for device in plan.devices:
        part = part_of(device, facts)
        devices.append(
            replace(
                device,
                traced_allocated_bytes=TracedEstimator(formula, process).peak(part, arrangement).allocated_bytes,
                closed_form_allocated_bytes=max(phase.allocated_bytes for phase in formula.phases(part, arrangement)),
            )
        )
    said = _sentences(plan, facts)
    estimate = counted_by(process, facts)
    return replace(plan, devices=tuple(devices), estimate=estimate, basis=(*plan.basis, *said))


def predict_for_rows(config: TrainConfig, plan: Plan, rows: TrainedRows) -> list[MemoryEstimate]:
    """As `prediction.predict_for_rows`, by what counted the plan's memory.

    Raises:
        ParallelTuneError: the model could be traced when it was planned, and cannot be any more.
    """
    if plan.estimate != "trace":
        return prediction.predict_for_rows(config, plan, rows)
    source, name = load_model_config(config.model)
    with TraceProcess(facts_from_config(source, name), source) as process:
        return prediction.predict_for_rows(config, plan, rows, lambda closed: TracedEstimator(closed, process))


def _sentences(plan: Plan, facts: ModelFacts) -> list[str]:
    said = []
    if facts.closed_form_known:
        said.append("memory is the closed form's; the trace beside it counts the step of transformers' own layers")
        if plan.engine == "unsloth":
            said.append("so does the closed form beside it; the plan itself counts Unsloth's kernels")
    else:
        said.append(
            f"memory is traced on transformers' own {facts.model_type} layers; the closed form beside it takes them "
            "for Llama's, and so does the predicted speed"
        )
        if plan.engine == "unsloth":
            said.append("Unsloth's kernels may keep less than the layers that were traced, never more")
    return said
