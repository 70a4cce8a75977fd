"""From settings and hardware to a plan: model facts, estimate, selection, and what would fit if nothing does."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from parallel_tune.allocator import segments_grow
from parallel_tune.bfloat16 import all_have_bfloat16, check_bfloat16, compute_dtype
from parallel_tune.capture import NO_ROOM, RECOMPUTED, cannot_capture, why_not_captured
from parallel_tune.config import TrainConfig
from parallel_tune.engines import EngineName
from parallel_tune.known_rows import KnownRows, RowsEstimator
from parallel_tune.memory.captured import varlen_repeats_heads
from parallel_tune.memory.closed_form import ClosedFormEstimator
from parallel_tune.memory.corrections import CautiousEstimator, Corrections
from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.parameters import expert_parameters
from parallel_tune.memory.positions import beyond_positions
from parallel_tune.memory.settings import MachineConstants, TrainingSettings
from parallel_tune.padding_free import decide_padding
from parallel_tune.targets import check_targets, unadapted
from parallel_tune.unused import unused
from strategies.base import Estimator
from strategies.contracts import (
    Checkpointing,
    Hardware,
    Plan,
    Suggestion,
    Workload,
)
from strategies.errors import ConfigError, NoStrategyFits
from strategies.fit import gib
from strategies.registry import StrategyRegistry
from strategies.selector import closest_plan

LENGTH_STEP = 256
"""Suggested sequence lengths are multiples of it."""
TRIES = 4
"""Plans that are made to come closer to what just fits: to a sixteenth of the gap that halving leaves."""
SPLITTING_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


Estimating = Callable[[TrainingSettings], Estimator]
"""Settings to what estimates memory and time with them."""


def closed_form(facts: ModelFacts, measured: Mapping[str, MachineConstants] | None = None) -> Estimating:
    """The closed form of a model, with the constants that were measured for devices of these names."""
    return lambda settings: ClosedFormEstimator(facts, settings, measured=measured or {})


def cautious(estimating: Estimating, corrections: Corrections, estimate: str = "closed_form") -> Estimating:
    """The same figures, with the room to leave that past runs on this machine teach.

    Args:
        estimate: what counts the memory; see `Plan.estimate`.
    """
    return lambda settings: CautiousEstimator(estimating(settings), settings, corrections, estimate)


@dataclass(frozen=True)
class _Run:
    """What a plan is made for and by; `make_plan` says what each is."""

    config: TrainConfig
    facts: ModelFacts
    engine: EngineName
    hardware: Hardware
    registry: StrategyRegistry
    estimating: Estimating
    rows: KnownRows | None


def make_plan(
    config: TrainConfig,
    facts: ModelFacts,
    engine: EngineName,
    hardware: Hardware,
    registry: StrategyRegistry,
    estimating: Estimating | None = None,
    rows: KnownRows | None = None,
) -> Plan:
    """The plan of a run; one that does not fit comes back with `fits` False and verified suggestions. Pure, but
    for what the environment says of torch's allocator.

    Args:
        estimating: the closed form if left out.
        rows: the training rows' lengths; without them all count as full.

    Raises:
        ConfigError: the settings contradict each other, the model or the hardware.
    """
    run = _Run(config, facts, engine, hardware, registry, estimating or closed_form(facts), rows)
    plan = _plan(run)
    if plan.fits and config.capture == "on" and not plan.captured:
        raise cannot_capture(plan.uncaptured_reason)
    return plan if plan.fits else replace(plan, suggestions=_suggestions(run))


def _plan(run: _Run) -> Plan:
    """A plan, in which cards that it leaves out decide nothing: dtype, padding and capture follow from the oldest."""
    plan, devices = _plan_on(run), run.hardware.devices
    used = tuple(device for device in devices if device.index in plan.visible)
    if not plan.fits or all_have_bfloat16(used) == all_have_bfloat16(devices):
        return plan
    again = _plan_on(replace(run, hardware=replace(run.hardware, devices=used)))
    if not again.fits:
        return plan
    # Only the first plan knows of them.
    return replace(again, reasons=(*again.reasons, *plan.left_out), left_out=(*again.left_out, *plan.left_out))


def _plan_on(run: _Run) -> Plan:
    config, facts, engine, hardware, rows = run.config, run.facts, run.engine, run.hardware, run.rows
    strategy = config.strategy
    if (config.device_map is not None or config.stages is not None) and strategy == "auto":
        strategy = "model_parallel"
    dtype = compute_dtype(config, hardware)
    padding = decide_padding(config, facts, engine, hardware, dtype)
    uncaptured = why_not_captured(config, facts, engine, hardware, padding)
    work = replace(workload(config, facts, engine), capture=not uncaptured, force_capture=config.capture == "on")
    settings = training_settings(config, facts, engine, dtype, padding.free)
    estimator = run.estimating(settings)
    if rows is not None:
        rows = rows.cut(config.max_seq_length)
        work = replace(work, sequence_length=round(rows.mean))
        estimator = RowsEstimator(run.estimating, settings, config, rows)
    plan = closest_plan(work, hardware, estimator, run.registry, strategy)
    if engine == "unsloth":
        check_bfloat16(dtype, [device for device in hardware.devices if device.index in plan.visible])
    known = rows is not None
    beyond = beyond_positions(facts.positions, engine, config.max_seq_length, rows.longest if rows else None)
    plan = replace(
        plan,
        dtype=dtype,
        reduce_dtype=config.ddp_reduce_dtype,
        padding_free=padding.free,
        padded_reason=padding.reason,
        rows_known=known,
        reasons=(
            *plan.reasons,
            *unadapted(config, facts),
            *_unquantised(config, facts, dtype),
            *beyond,
            *unused(config, plan),
        ),
    )
    if not plan.captured:
        plan = replace(plan, uncaptured_reason=_uncaptured(plan, uncaptured))
    if config.torch_compile:
        plan = _compiled(plan)
    if config.device_map is not None:
        said = f"--device_map {config.device_map}: the map is computed here, from predicted use against free memory"
        plan = replace(plan, reasons=(*plan.reasons, said))
    return plan


def _compiled(plan: Plan) -> Plan:
    """The same run with compiled layers; their memory is counted as if they were not, which is no less.

    Raises:
        ConfigError: nothing is captured, or Unsloth's layers would be compiled.
    """
    if plan.engine == "unsloth":
        raise ConfigError("torch_compile: Unsloth has kernels of its own", "Drop it, or use --engine transformers.")
    if plan.fits and not plan.captured:
        raise ConfigError(
            f"torch_compile compiles layers for captured steps, and none are: {plan.uncaptured_reason}", "Drop it."
        )
    return replace(plan, compiled=True)


def _uncaptured(plan: Plan, known: str) -> str:
    if known:
        return known
    if plan.gradient_checkpointing != "none":
        return RECOMPUTED
    if plan.strategy in ("ddp", "model_parallel"):
        return NO_ROOM
    return f"{plan.strategy} has no captured step"


def workload(config: TrainConfig, facts: ModelFacts, engine: EngineName) -> Workload:
    """What the strategies need to know of the settings.

    Raises:
        ConfigError: Unsloth's checkpointing was asked for without Unsloth.
    """
    asked = config.use_gradient_checkpointing
    if asked == "unsloth" and engine != "unsloth":
        raise ConfigError(
            "use_gradient_checkpointing = 'unsloth' needs the unsloth engine, and this run uses transformers",
            "Use --use_gradient_checkpointing full, or --engine unsloth.",
        )
    modes: dict[str, Checkpointing | None] = {"auto": None, "none": "none", "full": "full", "unsloth": "unsloth"}
    return Workload(
        model=config.model,
        engine=engine,
        num_layers=facts.num_layers,
        sequence_length=config.max_seq_length,
        modules=facts.modules,
        global_batch=config.global_batch_size,
        micro_batch=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        gradient_checkpointing=modes[asked],
        tied_embeddings=facts.tied_embeddings,
        pipeline=config.pipeline != "off",
        force_lanes=config.pipeline == "on" or (config.lanes or 1) > 1,
        lanes=config.lanes,
        stages=config.stages,
        max_devices=config.max_devices,
    )


def training_settings(
    config: TrainConfig, facts: ModelFacts, engine: EngineName, dtype: str, padding_free: bool = False
) -> TrainingSettings:
    """What the memory estimate needs to know of the settings.

    Raises:
        ConfigError: peft has not what was asked for, or the model has none of the modules to adapt.
    """
    check_targets(config, facts)
    # Attention that keeps to rows by their boundaries has no mask; eager attention has nothing else.
    unmasked = padding_free and config.attn_implementation != "eager"
    return TrainingSettings(
        method="full" if config.full_finetuning else "lora",
        load_in_4bit=in_4bit(config, facts),
        lora_rank=config.r,
        lora_targets=tuple(config.target_modules),
        lora_dropout=config.lora_dropout,
        use_dora=config.use_dora,
        bias=config.bias,
        compute_dtype=dtype,
        weights_dtype="float32" if config.full_finetuning and dtype == "float16" else None,
        optimizer=config.optim,
        cross_entropy="fused" if _is_fused(config, engine) else "plain",
        engine=engine,
        sequence_length=config.max_seq_length,
        packed=padding_free,
        attention_mask=False if unmasked else None,
        eager_attention=config.attn_implementation == "eager",
        repeats_heads=unmasked and engine == "transformers" and varlen_repeats_heads(),
        segments_grow=segments_grow(os.environ),
    )


def in_4bit(config: TrainConfig, facts: ModelFacts) -> bool:
    """Whether the frozen weights are held in 4 bit: as was asked for, or because the model's files hold them so.

    Raises:
        ConfigError: they would have to train.
    """
    if facts.quantized_4bit and config.full_finetuning:
        raise ConfigError(
            f"full_finetuning: {config.model} holds its weights in 4 bit, which cannot be trained",
            "Drop --full_finetuning, or give the model in 16 bit.",
        )
    return config.load_in_4bit or facts.quantized_4bit


def _unquantised(config: TrainConfig, facts: ModelFacts, dtype: str) -> tuple[str, ...]:
    """What a plan says of weights that 4 bit does not make smaller."""
    experts = sum(expert_parameters(facts, layer) for layer in range(facts.num_layers))
    if not experts or not in_4bit(config, facts):
        return ()
    size, bits = (4, 32) if dtype == "float32" else (2, 16)
    return (
        f"the experts, {gib(size * experts)} of the weights, stay in {bits} bit: bitsandbytes quantises linear layers, "
        "and transformers stacks experts in tensors of another kind",
    )


def _is_fused(config: TrainConfig, engine: EngineName) -> bool:
    return config.cross_entropy == "fused" or (config.cross_entropy == "auto" and engine == "unsloth")


def _suggestions(run: _Run) -> tuple[Suggestion, ...]:
    """Single changes that make the run fit, the smallest of each kind, each planned to be sure."""
    config, hardware = run.config, run.hardware
    found: list[Suggestion] = []

    def fits(change: str, changed: TrainConfig, devices: Hardware = hardware) -> bool:
        try:
            plan = _plan(replace(run, config=changed, hardware=devices))
        except ConfigError:
            return False
        if plan.fits:
            peak = max(device.predicted_peak_bytes for device in plan.devices)
            kind = change.rpartition(" ")[0]
            # A larger value of the same option takes the place of a smaller one.
            found[:] = [item for item in found if not kind.startswith("--") or not item.change.startswith(f"{kind} ")]
            found.append(Suggestion(change, plan.strategy, peak))
        return plan.fits

    if config.strategy != "auto":
        fits("--strategy auto", config.replace(strategy="auto"))
    if not _is_fused(config, run.engine):
        fits("--cross_entropy fused", config.replace(cross_entropy="fused"))
    if not in_4bit(config, run.facts) and not config.full_finetuning:
        fits("--load_in_4bit", config.replace(load_in_4bit=True))
    if config.full_finetuning:
        fits("LoRA instead of --full_finetuning", config.replace(full_finetuning=False))
    if config.use_dora:
        fits("LoRA without --use_dora", config.replace(use_dora=False))
    if config.use_gradient_checkpointing == "none":
        fits("--use_gradient_checkpointing full", config.replace(use_gradient_checkpointing="full"))
    if config.per_device_train_batch_size is not None:
        _largest(
            config.per_device_train_batch_size,
            1,
            lambda micro: fits(
                f"--per_device_train_batch_size {micro}", config.replace(per_device_train_batch_size=micro)
            ),
        )
    _largest(
        config.max_seq_length,
        LENGTH_STEP,
        lambda length: fits(f"--max_seq_length {length}", config.replace(max_seq_length=length)),
    )
    if "8bit" not in config.optim:
        fits("--optim adamw_8bit", config.replace(optim="adamw_8bit"))
    another = replace(hardware.devices[-1], index=len(hardware.devices))
    if hardware.kind == "cuda":
        fits(f"one more {another.name}", config, replace(hardware, devices=(*hardware.devices, another)))
    return tuple(found)


def _largest(refused: int, step: int, fits: Callable[[int], bool]) -> None:
    """Look for the largest multiple of `step` below `refused` that fits, where less always does if more does: halve
    until something fits, then close in by a few more tries."""
    above, value = refused, refused // 2
    while value >= step and not fits(value // step * step):
        above, value = value, value // 2
    below = value // step * step
    for _ in range(TRIES):
        middle = (below + above) // 2 // step * step
        if below < step or middle <= below:
            return
        below, above = (middle, above) if fits(middle) else (below, middle)


def require_fit(plan: Plan, strategy: str, shown: bool = False) -> None:
    """Refuse a plan that does not fit.

    Args:
        shown: whoever reads the refusal has the whole plan above it.

    Raises:
        NoStrategyFits: with the shortfall of each device and the changes that would fit.
    """
    if plan.fits:
        return
    from strategies.selector import SHOW_PLAN, no_strategy_fits

    error = no_strategy_fits(plan, strategy)
    hints = [error.hint] if error.hint != SHOW_PLAN or not shown else []
    if plan.suggestions:
        hints.append("One of these alone would fit:")
        hints += [
            f"  {item.change} ({item.strategy}, {item.predicted_peak_bytes / 2**30:.1f} GiB)"
            for item in plan.suggestions
        ]
    elif error.hint == SHOW_PLAN:
        hints.append("No single change of these settings would fit: take more or larger devices, or a smaller model.")
    raise NoStrategyFits(error.message, "\n".join(hints))


def read_device_map(name: str) -> dict[str, int | str] | None:
    """The map in a JSON file, or None for a word such as "balanced".

    Raises:
        ConfigError: the file cannot be read or is no map.
    """
    if name in SPLITTING_MAPS:
        return None
    try:
        loaded = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--device_map {name}: {error}", f"Give {', '.join(SPLITTING_MAPS)} or a JSON file of module -> device."
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, int | str) for value in loaded.values()):
        raise ConfigError(f"--device_map {name} is not a map of module -> device", 'Write {"model.layers.0": 0, ...}.')
    return loaded
