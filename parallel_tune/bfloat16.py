"""Which dtype a run computes in: bfloat16 where the cards have it, and what older ones change."""

from __future__ import annotations

from collections.abc import Sequence

from parallel_tune.config import TrainConfig
from strategies.contracts import Device, Hardware
from strategies.errors import ConfigError


def all_have_bfloat16(devices: Sequence[Device]) -> bool:
    """Whether none of them is older than bfloat16, and than the kernels that came with it."""
    return all(device.supports_bf16 for device in devices)


def compute_dtype(config: TrainConfig, hardware: Hardware) -> str:
    """What the user named; else bfloat16 where all cards have it, float16 on older ones, float32 on a CPU.

    Raises:
        ConfigError: float16 was named for a CPU. accelerate scales no loss there, and small gradients become zero: with
            20,000 tokens a step they were half wrong, with 200,000 nearly all zero.
    """
    if config.named_dtype == "float16" and hardware.kind == "cpu":
        raise ConfigError(
            "dtype = 'float16' on a CPU: the loss is not scaled there, and small gradients would become zero",
            "Use --dtype bfloat16, which has float32's range, or leave it out for float32.",
        )
    if config.named_dtype != "auto":
        return config.named_dtype
    if hardware.kind == "cpu":
        return "float32"
    return "bfloat16" if all_have_bfloat16(hardware.devices) else "float16"


def check_bfloat16(dtype: str, devices: Sequence[Device]) -> None:
    """Refuse what Unsloth would change to float16 by itself.

    Raises:
        ConfigError: a card has no bfloat16.
    """
    lacking = sorted({device.name for device in devices if not device.supports_bf16})
    if dtype == "bfloat16" and lacking:
        raise ConfigError(
            f"dtype = 'bfloat16': {', '.join(lacking)} has no bfloat16, and Unsloth would compute in float16",
            "Leave it out, and float16 is planned; --engine transformers computes bfloat16 there all the same, slowly.",
        )
