"""The machine's devices: declared by `--hardware`, or probed without torch."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from parallel_tune.gpus import GPUS, Gpu, plain
from parallel_tune.nvml import Probe, probe_gpus
from strategies.contracts import Device, Hardware
from strategies.errors import ConfigError

MIB = 2**20
CPU_CORE_FLOPS_PER_SECOND = 5e10
"""Float32 matrix rate of one core, for want of a measurement (96 GFLOP/s were seen on one, less where cores share)."""

MAX_DEVICES = 64
_EXAMPLES = "E.g. 2xH100-80GB, 1xA100-40GB+1xRTX3090-24GB, or cpu:2."


def parse_hardware(text: str) -> Hardware:
    """The devices that `--hardware` names, e.g. "2xH100-80GB", "1xA100-40GB+1xRTX3090-24GB", "cpu:2".

    Raises:
        ConfigError: the text names no devices, or none that is known.
    """
    if re.match(r"\s*cpu\b", text, re.IGNORECASE):
        return Hardware(_cpu_devices(_cpu_count(text)), declared=True)
    gpus = [gpu for part in text.split("+") for gpu in _parse_part(part, text)]
    if len(gpus) > MAX_DEVICES:
        raise ConfigError(f"--hardware {text} names {len(gpus)} devices; {MAX_DEVICES} is the most.", _EXAMPLES)
    return Hardware(tuple(_declared_device(i, gpu) for i, gpu in enumerate(gpus)), declared=True)


def probe(environment: Mapping[str, str] | None = None) -> Hardware:
    """The GPUs that this process may use; without any, one virtual device of the CPU (`cpu:1`)."""
    return probe_details(environment).hardware


def probe_details(environment: Mapping[str, str] | None = None) -> Probe:
    """As `probe`, with each GPU's identity for CUDA_VISIBLE_DEVICES, and with what the user should know."""
    found = probe_gpus(os.environ if environment is None else environment)
    if found.hardware.devices:
        return found
    return Probe(Hardware(_cpu_devices(1)), (), (*found.notes, "No GPU: training on the CPU (cpu:1)."))


def available_memory_bytes() -> int:
    """Main memory that is available, a container's limit included."""
    import psutil

    available = int(psutil.virtual_memory().available)
    # A container sees the host's memory but is killed at its own limit.
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            left = int(Path(limit_file).read_text()) - int(Path(used_file).read_text())
        except (OSError, ValueError):
            continue  # not this kind of control group, or no limit ("max")
        available = min(available, max(0, left))
    return available


def _cpu_devices(count: int) -> tuple[Device, ...]:
    share = available_memory_bytes() // count
    rate = CPU_CORE_FLOPS_PER_SECOND * len(os.sched_getaffinity(0)) / count
    # Training on a CPU is in float32: bf16 is emulated on most.
    return tuple(Device(i, "CPU", "cpu", share, share, False, rate) for i in range(count))


def _cpu_count(text: str) -> int:
    match = re.fullmatch(r"\s*cpu(?::(\d+))?\s*", text, re.IGNORECASE)
    count = int(match[1] or 1) if match else 0
    if not 1 <= count <= MAX_DEVICES:
        raise ConfigError(f"--hardware {text!r} is not understood.", f"cpu:N has 1 to {MAX_DEVICES} virtual devices.")
    return count


def _parse_part(part: str, text: str) -> list[Gpu]:
    match = re.fullmatch(r"\s*(?:(\d+)\s*[x*])?\s*([a-z][\w \-]*?)\s*", part, re.IGNORECASE)
    if not match:
        raise ConfigError(f"--hardware {text!r}: {part!r} is not understood.", _EXAMPLES)
    count = int(match[1] or 1)
    if count < 1:
        raise ConfigError(f"--hardware {text!r}: {part!r} names {count} devices.", _EXAMPLES)
    return [_find(match[2], text)] * count


def _find(name: str, text: str) -> Gpu:
    wanted = plain(name)
    exact = [gpu for gpu in GPUS if wanted == plain(gpu.name)]
    variants = exact or [gpu for gpu in GPUS if wanted == plain(gpu.model)]
    if len(variants) == 1:
        return variants[0]
    if variants:
        names = " or ".join(gpu.name for gpu in variants)
        raise ConfigError(f"--hardware {text!r}: {name!r} comes in several sizes.", f"Say {names}.")
    by_plain = {plain(gpu.name): gpu.name for gpu in GPUS}
    near = [by_plain[key] for key in difflib.get_close_matches(wanted, by_plain, n=3, cutoff=0.5)]
    known = ", ".join(gpu.name for gpu in GPUS)
    hint = f"Did you mean {', '.join(near)}? " if near else ""
    raise ConfigError(f"--hardware {text!r}: no GPU {name!r} is known.", f"{hint}Known: {known}, cpu:N.")


def _declared_device(index: int, gpu: Gpu) -> Device:
    return Device(
        index=index,
        name=gpu.name,
        kind="cuda",
        capacity_bytes=gpu.total_mib * MIB,
        free_bytes=(gpu.total_mib - gpu.reserved_mib) * MIB,
        supports_bf16=gpu.supports_bf16,
        matmul_flops_per_second=gpu.matmul_flops_per_second,
        float32_flops_per_second=gpu.float32_flops_per_second,
    )
