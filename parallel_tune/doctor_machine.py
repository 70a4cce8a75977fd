"""The GPUs, who holds memory on them, and whether processes can meet on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from parallel_tune import launch, nvml
from parallel_tune.doctor_check import GIB, Check
from parallel_tune.hardware import parse_hardware, probe_details
from parallel_tune.machine import know
from parallel_tune.memory.machine_key import ABSENT, torch_versions
from parallel_tune.process import die_with_parent
from strategies.contracts import Device

MEETING_SECONDS = 120.0
"""How long two processes may take to import torch and to meet; it takes five where torch is in the file cache."""
MUCH_SHARE = 0.05
"""Of a card's memory: if others hold more, a plan is smaller for it."""


@dataclass(frozen=True)
class Holder:
    """A process that holds memory of a GPU; `used_bytes` is None where the driver does not say."""

    gpu: int
    pid: int
    name: str
    used_bytes: int | None


def cards() -> Sequence[nvml.NvmlGpu]:
    """All GPUs of the machine."""
    return nvml.read_nvml()


def gpus(environ: Mapping[str, str]) -> list[Check]:
    """The GPUs that a run would see, what else uses them, and whether torch can.

    Raises:
        ConfigError: CUDA_VISIBLE_DEVICES names what is not there.
    """
    probe = probe_details(environ)
    if probe.hardware.kind == "cpu":
        return [Check("GPUs", "note", " ".join(probe.notes))]
    devices = probe.hardware.devices
    lines = [Check("GPUs", "ok", f"{_list(devices)}; driver {nvml.driver_version()}")]
    lines += [Check("GPUs", "note", note) for note in probe.notes]
    lines += busy(devices, holders(probe.uuids))
    torch, cuda = torch_versions()
    if torch != ABSENT and cuda == ABSENT:
        said = f"torch {torch} is built without CUDA and cannot use them"
        lines.append(Check("GPUs", "problem", said, "Install torch's CUDA build."))
    return [*lines, *(Check("constants", "note", said) for said in know(probe.hardware).said)]


def busy(devices: Sequence[Device], held: Sequence[Holder]) -> list[Check]:
    """A warning for each device of which others hold a good part."""
    checks = []
    for device in devices:
        taken = device.capacity_bytes - device.free_bytes
        if taken > MUCH_SHARE * device.capacity_bytes:
            names = ", ".join(_words(holder) for holder in held if holder.gpu == device.index)
            said = f"{taken / GIB:.1f} GiB of device {device.index} ({device.name}) are taken"
            checks.append(
                Check("GPUs", "warning", f"{said}: {names or 'by a process that is not seen from here'}",
                      "A plan counts what is free now; end what is not needed first.")
            )  # fmt: skip
    return checks


def holders(uuids: Sequence[str]) -> list[Holder]:
    """Processes that hold memory of these GPUs, numbered in this order."""
    import pynvml

    found = []
    pynvml.nvmlInit()
    try:
        for index, uuid in enumerate(uuids):
            with contextlib.suppress(pynvml.NVMLError):
                handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                    found.append(Holder(index, process.pid, _name(process.pid), process.usedGpuMemory))
    finally:
        pynvml.nvmlShutdown()
    return found


def meeting(environ: Mapping[str, str]) -> list[Check]:
    """Whether processes, started as a run of ddp starts them, add a number up: two on the CPU, and one or two on GPUs.

    Raises:
        ConfigError: CUDA_VISIBLE_DEVICES names what is not there.
    """
    checks = [meet("gloo", parse_hardware("cpu:2").devices, environ)]
    hardware = probe_details(environ).hardware
    if hardware.kind == "cuda":
        # On one GPU too: it shows whether torch can use it.
        checks.append(meet("nccl", hardware.devices[:2], environ))
    return checks


def meet(
    backend: str, devices: Sequence[Device], environ: Mapping[str, str], timeout_seconds: float = MEETING_SECONDS
) -> Check:
    """Start a process a device and see whether they agree on a sum."""
    env = launch.process_environment(devices, len(devices), environ, os.cpu_count() or 1)
    env["PYTHONSAFEPATH"] = "1"
    command = (
        sys.executable, *launch.torchrun_arguments(len(devices)), "-m", "parallel_tune.doctor_worker", backend
    )  # fmt: skip
    answer = _answer(command, env, timeout_seconds)
    count = len(devices)
    who = f"{count} process{'es' if count > 1 else ''} on the loopback, by {backend}"
    if answer.get("sum") == count * (count + 1) / 2:
        return Check("processes", "ok", f"{who}: meet and sum")
    said = f"{who}, did not sum: {answer.get('error', answer)}"
    if "ended" in answer:
        hint = f"See whether torch loads: {sys.executable} -c 'import torch'"
        return Check("processes", "problem", f"{who}, ended without an answer: {answer['ended']}", hint)
    set_by_user = [name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name in environ]
    hint = f"Unset {' and '.join(set_by_user)}, or" if set_by_user else "First"
    return Check("processes", "problem", said, f"{hint} see that the interface lo is up and open: ddp needs it.")


def _answer(command: Sequence[str], env: Mapping[str, str], timeout_seconds: float) -> dict[str, Any]:
    with subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        errors="replace", start_new_session=True, preexec_fn=die_with_parent,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            return {"error": f"no answer within {timeout_seconds:.0f} s"}
        finally:
            # The workers die with their launcher.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    for line in out.splitlines():
        with contextlib.suppress(ValueError):
            answer = json.loads(line)
            if isinstance(answer, dict):
                return answer
    last = err.strip().splitlines()[-1:] or ["they said nothing"]
    return {"ended": f"code {process.returncode}, {last[0]}"}


def _list(devices: Sequence[Device]) -> str:
    return ", ".join(
        f"{device.index} {device.name} {device.free_bytes / GIB:.1f} of {device.capacity_bytes / GIB:.1f} GiB free"
        for device in devices
    )


def _words(holder: Holder) -> str:
    size = "" if holder.used_bytes is None else f" {holder.used_bytes / GIB:.1f} GiB"
    return f"{holder.name} ({holder.pid}){size}"


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "a process of another user or container"
