"""The command and the environment of a plan's training processes. Pure: what starts them is watcher.py."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from parallel_tune.allocator import allocator_variables
from parallel_tune.rundir import RunDir
from strategies.contracts import Device, DevicePlan, Plan

RENDEZVOUS = "parallel_tune_loopback"
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "GROUP_", "ROLE_")


@dataclass(frozen=True)
class LaunchSpec:
    """A command and its whole environment."""

    argv: tuple[str, ...]
    env: Mapping[str, str]


def worker_argv(plan: Plan, run_path: str, checkpoint: Path | None = None) -> tuple[str, ...]:
    """The command that trains: the worker itself, or torch.distributed.run around it."""
    worker = ("-m", "parallel_tune.worker", run_path, *([str(checkpoint)] if checkpoint else []))
    if plan.processes == 1:
        return (sys.executable, *worker)
    return (sys.executable, *torchrun_arguments(plan.processes), *worker)


def torchrun_arguments(processes: int) -> tuple[str, ...]:
    """What starts that many processes of this machine on our loopback rendezvous; their command follows."""
    return (
        "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={processes}",
        f"--rdzv-backend={RENDEZVOUS}", "--rdzv-endpoint=127.0.0.1", "--max-restarts=0",
    )  # fmt: skip


def launch_spec(
    plan: Plan, run: RunDir, environ: Mapping[str, str], cores: int, checkpoint: Path | None = None
) -> LaunchSpec:
    """Command and environment of a run. Pure.

    Args:
        environ: the environment to start from; an outer launcher's variables are dropped from it.
        cores: CPU cores of the machine, shared among the processes of a CPU run.
    """
    env = process_environment(plan.devices, plan.processes, environ, cores)
    # The working directory must not be searched for modules: a `strategies` folder there would shadow ours.
    env["PYTHONSAFEPATH"] = "1"
    return LaunchSpec(worker_argv(plan, str(run.path), checkpoint), env)


def process_environment(
    devices: Sequence[Device | DevicePlan], processes: int, environ: Mapping[str, str], cores: int
) -> dict[str, str]:
    """The environment of processes that shall see these devices and no others. Pure."""
    env = without_launcher(environ)
    env["PYTHONUNBUFFERED"] = "1"
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    if devices[0].kind == "cuda":
        visible = [part for part in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
        # Two stages of a split may share a device.
        indices = dict.fromkeys(device.index for device in devices)
        chosen = [visible[index] if visible else str(index) for index in indices]
        env["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
        env.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        env.update(allocator_variables(env))
    else:
        env["CUDA_VISIBLE_DEVICES"] = ""
        env.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
        # Threads that wait without sleeping take the cores from whatever else runs: steps became ten times as slow.
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if processes > 1:
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
        env.setdefault("NCCL_SOCKET_IFNAME", "lo")
    return env


def without_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what torchrun or accelerate would have set."""
    return {
        name: value
        for name, value in environ.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
    }
