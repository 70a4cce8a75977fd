"""Whether a run's micro-batches go without padding: what is known before the model is loaded. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from parallel_tune.config import TrainConfig
from parallel_tune.engines import EngineName
from parallel_tune.memory.facts import ModelFacts
from strategies.contracts import Hardware
from strategies.errors import ConfigError

UNSLOTH_PADS = frozenset({"gemma2", "gpt_oss"})
"""Model types whose attention Unsloth 2026.10 itself never lets work without padding."""


@dataclass(frozen=True)
class Padding:
    """What was decided.

    Attributes:
        free: rows of a micro-batch are joined, not padded.
        reason: why not, empty where they are or where the user said so.
    """

    free: bool
    reason: str = ""


def decide_padding(
    config: TrainConfig, facts: ModelFacts, engine: EngineName, hardware: Hardware, dtype: str
) -> Padding:
    """Joined rows wherever attention can keep to them, unless the user says otherwise.

    Raises:
        ConfigError: packing, or padding-free batches, were asked for and the model cannot have them.
    """
    wanted = config.packing or config.padding_free == "on"
    if not wanted and config.padding_free == "off":
        return Padding(False)
    if impossible := _impossible(facts, engine):
        if wanted:
            raise refusal(config, impossible)
        return Padding(False, impossible)
    if not wanted and (slow := _slow(config, engine, hardware, dtype)):
        return Padding(False, slow)
    return Padding(True)


def refusal(config: TrainConfig, reason: str) -> ConfigError:
    """What to raise where joined rows were asked for and cannot be."""
    option = "--packing" if config.packing else "--padding_free on"
    return ConfigError(
        f"{option} joins rows in one sequence, and this model would mix them: {reason}",
        "Leave the option out, or use --padding_free off: rows are then padded to the longest of a micro-batch.",
    )


def _impossible(facts: ModelFacts, engine: EngineName) -> str:
    if facts.foreign_mixer:
        return f"its config has {facts.foreign_mixer}, which carries tokens on from one row to the next"
    if engine == "unsloth" and facts.model_type in UNSLOTH_PADS:
        return f"Unsloth has no padding-free attention for {facts.model_type}"
    return ""


def _slow(config: TrainConfig, engine: EngineName, hardware: Hardware, dtype: str) -> str:
    if engine == "transformers" and config.attn_implementation == "eager":
        return "eager attention would compute all pairs of a micro-batch's tokens"
    if hardware.kind == "cpu":
        return ""
    if dtype == "float32":
        return "attention over rows of any length has no kernel in float32"
    old = [device.name for device in hardware.devices if not device.supports_bf16]
    if old:
        return f"attention over rows of any length has no kernel on {old[0]}"
    return ""
