"""The GPUs that NVML reports and CUDA would show, asked without creating a CUDA context."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parallel_tune.gpus import FALLBACK_FLOAT32_TFLOPS, FALLBACK_PEAK_TFLOPS, known_gpu, sustained
from strategies.contracts import Device, Hardware
from strategies.errors import ConfigError

MIB = 2**20


@dataclass(frozen=True)
class Probe:
    """What was found.

    Attributes:
        uuids: of each device, in the order of `hardware.devices`. As CUDA_VISIBLE_DEVICES of a child they name the
            same cards whatever order CUDA counts in.
        notes: lines for the user.
    """

    hardware: Hardware
    uuids: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class NvmlGpu:
    """One GPU as NVML describes it, in PCI bus order."""

    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int]


def probe_gpus(environment: Mapping[str, str], read: Callable[[], Sequence[NvmlGpu]] | None = None) -> Probe:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves visible; no devices where there is no driver or no GPU.

    Raises:
        ConfigError: CUDA_VISIBLE_DEVICES names a GPU that is not there, or a MIG instance.
    """
    gpus = (read or read_nvml)()
    if not gpus:
        return Probe(Hardware(()), ())
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    chosen = list(gpus) if visible is None else [gpus[i] for i in visible_indices(visible, [g.uuid for g in gpus])]
    notes = []
    if visible is not None and not chosen:
        notes.append(f"CUDA_VISIBLE_DEVICES={visible!r} hides all {len(gpus)} GPUs.")
    order = environment.get("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    by_number = visible is None or not visible.startswith("GPU-")
    if order != "PCI_BUS_ID" and by_number and len({g.name for g in gpus}) > 1:
        notes.append(
            "GPUs of several kinds are numbered by PCI bus, as nvidia-smi does (CUDA_DEVICE_ORDER=PCI_BUS_ID)."
        )
    devices = tuple(_device(i, gpu) for i, gpu in enumerate(chosen))
    return Probe(Hardware(devices), tuple(gpu.uuid for gpu in chosen), tuple(notes))


def visible_indices(visible: str, uuids: Sequence[str]) -> list[int]:
    """Positions of the GPUs that a value of CUDA_VISIBLE_DEVICES names, by number or UUID (a unique start is enough).

    Raises:
        ConfigError: it names a GPU that is not there, one twice, or a MIG instance. CUDA itself would silently use
            fewer GPUs, or none.
    """
    found: list[int] = []
    hint = f"This machine has {len(uuids)} GPU(s), 0 to {len(uuids) - 1}; `nvidia-smi -L` lists them."
    for entry in (e.strip() for e in visible.split(",")):
        if entry in ("", "-1", "NoDevFiles"):
            break  # CUDA ignores what follows
        if entry.startswith("MIG-"):
            raise ConfigError(
                f"CUDA_VISIBLE_DEVICES={visible!r} names a MIG instance, which parallel-tune does not plan for.",
                "Give whole GPUs, by number or by their GPU- UUID.",
            )
        matches = [
            i for i, uuid in enumerate(uuids) if (str(i) == entry) or (len(entry) > 4 and uuid.startswith(entry))
        ]
        if len(matches) != 1:
            what = "no GPU" if not matches else f"{len(matches)} GPUs"
            raise ConfigError(f"CUDA_VISIBLE_DEVICES={visible!r}: {entry!r} is {what} of this machine.", hint)
        if matches[0] in found:
            raise ConfigError(f"CUDA_VISIBLE_DEVICES={visible!r} names GPU {matches[0]} twice.", hint)
        found.append(matches[0])
    return found


def read_nvml() -> list[NvmlGpu]:
    """All GPUs of the machine; none where NVML or its driver is missing."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_read(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def used_bytes(nvml: Any, handle: Any) -> int:
    """What is in use on a GPU without what the driver keeps for itself, as CUDA and the plan count.

    Raises:
        nvml.NVMLError: the GPU cannot be read, or the driver is too old to tell the two apart.
    """
    return int(nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2).used)


def own_bytes(nvml: Any, handle: Any, reserved_bytes: int) -> int | None:
    """What this process has in use on a card; None where NVML does not tell it.

    Args:
        nvml: pynvml, initialized.
        reserved_bytes: by torch's allocator; a smaller figure is that of another process whose number is ours in the
            host's count.
    """
    try:
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError:
        return None
    held = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
    return held[0] if held and held[0] is not None and held[0] >= reserved_bytes else None


def driver_version() -> str:
    """NVIDIA's driver; "none" where there is none."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        return "none"
    except pynvml.NVMLError:
        return "none"
    try:
        return _text(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


def _read(pynvml: Any, index: int) -> NvmlGpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return NvmlGpu(
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        compute_capability=(int(major), int(minor)),
    )


def _text(value: str | bytes) -> str:
    # nvidia-ml-py before 12 gave bytes.
    return value.decode() if isinstance(value, bytes) else value


def _device(index: int, gpu: NvmlGpu) -> Device:
    known = known_gpu(gpu.name, gpu.total_bytes // MIB)
    if known is not None:
        rate, float32_rate = known.matmul_flops_per_second, known.float32_flops_per_second
    else:
        major = gpu.compute_capability[0]
        rate = sustained(FALLBACK_PEAK_TFLOPS.get(major, 60.0))
        float32_rate = sustained(FALLBACK_FLOAT32_TFLOPS.get(major, 8.0))
    return Device(
        index=index,
        name=gpu.name,
        kind="cuda",
        capacity_bytes=gpu.total_bytes,
        free_bytes=gpu.free_bytes,
        supports_bf16=gpu.compute_capability >= (8, 0),
        matmul_flops_per_second=rate,
        float32_flops_per_second=float32_rate,
    )
