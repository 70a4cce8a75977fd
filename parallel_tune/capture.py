"""Whether a run's steps may be captured as CUDA graphs: what is known before anything is loaded. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parallel_tune.config import TrainConfig
from parallel_tune.engines import EngineName
from parallel_tune.memory.facts import ModelFacts
from parallel_tune.padding_free import Padding
from strategies.contracts import Hardware
from strategies.errors import ConfigError

RECOMPUTED = "activations that are recomputed are not captured, and without recomputing them the run does not fit"
NO_ROOM = "the memory that recordings keep leaves room for smaller micro-batches only, or for none"
"""Reasons that shorter rows may do away with."""


def why_not_captured(
    config: TrainConfig, facts: ModelFacts, engine: EngineName, hardware: Hardware, padding: Padding
) -> str:
    """Why steps run eagerly; empty where they may be captured.

    Raises:
        ConfigError: capturing was asked for and cannot be.
    """
    if config.capture == "off":
        return "--capture off"
    reason = _impossible(config, facts, engine, hardware, padding)
    if reason and config.capture == "on":
        raise cannot_capture(reason)
    return reason


def cannot_capture(reason: str) -> ConfigError:
    """What to raise where capturing was asked for and cannot be."""
    return ConfigError(f"--capture on: a step cannot be captured, since {reason}", "Use --capture auto or off.")


def replayed(captured: Mapping[str, Any]) -> str:
    """A line for the log: what of a run was replayed, and why no more.

    Args:
        captured: as in report.json, `strategies.replay.ReplayReport`.
    """
    share = captured["replayed_elements"] / captured["elements"] if captured["elements"] else 0.0
    said = f"replayed {share:.1%} of all tokens, recording took {captured['capture_seconds']:.1f} s"
    if captured.get("uncompiled_reason"):
        said = f"{said}; layers were not compiled, since {captured['uncompiled_reason']}"
    return said if captured["reason"] is None else f"{said}; steps are no longer captured, since {captured['reason']}"


def _impossible(
    config: TrainConfig, facts: ModelFacts, engine: EngineName, hardware: Hardware, padding: Padding
) -> str:
    if hardware.kind != "cuda":
        return "CUDA graphs need a GPU"
    if not padding.free:
        return f"rows are padded ({padding.reason or '--padding_free off'})"
    if engine == "transformers" and config.attn_implementation != "sdpa":
        return f"--attn_implementation {config.attn_implementation} looks for rows from the host"
    if not facts.closed_form_known:
        return f"no {facts.model_type} model has been tried"
    if facts.num_experts:
        return "how many tokens reach each expert changes from step to step"
    if config.full_finetuning:
        return "a full fine-tune's gradients are better summed while its backward pass still runs"
    if config.lora_dropout:
        return "with dropout no replay could be held against the same step run eagerly"
    if engine == "unsloth" and facts.sliding_window and facts.sliding_window < config.max_seq_length:
        return f"Unsloth's attention windows of {facts.sliding_window} tokens read row boundaries from the host"
    if config.use_gradient_checkpointing not in ("auto", "none"):
        return "recomputed activations are not captured"
    return ""
