"""Training inside processes that torchrun, accelerate launch or srun started: one rank plans, all obey."""

from __future__ import annotations

import contextlib
import os
import traceback
from dataclasses import replace
from typing import Any, NoReturn

import click

from parallel_tune import export_after, planning, rundir
from parallel_tune.allocator import allocator_variables
from parallel_tune.alone import alone
from parallel_tune.config import TrainConfig
from parallel_tune.decision import decide, find_hardware
from parallel_tune.device_use import CardUse, look_before
from parallel_tune.display import summary
from parallel_tune.needs import check_needs
from parallel_tune.plan_view import render_plan
from parallel_tune.process import leave, print_or_drop
from parallel_tune.refusal import Launch
from parallel_tune.report import read as read_report
from parallel_tune.reporting.run_page import try_to_write_page
from strategies.contracts import Hardware, Plan
from strategies.errors import ConfigError, NoStrategyFits, ParallelTuneError, RunFailed


def train_as_rank(config: TrainConfig, launch: Launch) -> NoReturn:
    """Join the launcher's processes, train, and end this one with the run's code."""
    print_or_drop()
    os.environ.update(launch.environment)
    os.environ.update(allocator_variables(os.environ))
    # The plan numbers GPUs so; CUDA by itself would put the fastest first, where they differ.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    hardware = devices_for(config, launch.world_size)  # a rank without a card of its own could not even join
    import torch
    import torch.distributed as dist

    from strategies.sessions import join_processes

    use = look_before(os.environ)  # joining takes a context on the card
    cuda = hardware.kind == "cuda" and torch.cuda.is_available()
    join_processes(cuda, launch.local_rank, config.ddp_timeout)
    held = contextlib.ExitStack()  # until this process is gone, which leaves without unwinding
    decision: list[dict[str, Any]] = [_decide(config, launch, held) if launch.rank == 0 else {}]
    dist.broadcast_object_list(decision, src=0, device=torch.device("cpu"))
    if "code" in decision[0]:
        leave(int(decision[0]["code"]))
    _obey(rundir.RunDir(decision[0]["run"]), launch.rank, config.hub_token, use)


def _decide(config: TrainConfig, launch: Launch, held: contextlib.ExitStack) -> dict[str, Any]:
    """Plan for exactly the processes that are there; what went wrong travels to the others as an exit code.

    Args:
        held: takes the lock of the run directory.
    """
    try:
        check_needs(config)
        plan = plan_for(config, launch.world_size, launch.launcher)
        run = rundir.create(config, plan)
        held.enter_context(alone(run))
    except ParallelTuneError as error:
        click.echo(f"parallel-tune: {error}", err=True)
        return {"code": error.exit_code}
    except Exception:
        # The others wait for word, and the ordinary end of a process in a group may never come.
        traceback.print_exc()
        return {"code": RunFailed.exit_code}
    click.echo(render_plan(plan))
    click.echo(f"run directory: {run.path}")
    return {"run": run.path}


def plan_for(config: TrainConfig, world_size: int, launcher: str) -> Plan:
    """The ddp plan of a given number of processes.

    Raises:
        NoStrategyFits: a replica does not fit each of the devices.
        ConfigError: there are fewer devices than processes.
    """
    used = devices_for(config, world_size)
    if used.kind == "cpu":
        config = config.replace(hardware=f"cpu:{world_size}")
    config = config.replace(strategy="ddp" if config.strategy == "auto" else config.strategy)
    plan, lines = decide(config, used)
    for line in lines:
        click.echo(line)
    try:
        planning.require_fit(plan, config.strategy)
    except NoStrategyFits as error:
        way_out = f"model_parallel is one process: start it without {launcher}."
        raise NoStrategyFits(error.message, f"{error.hint}\n{way_out}") from error
    if plan.processes != world_size:
        raise NoStrategyFits(
            f"{plan.strategy} fits {plan.processes} of the devices, and the launcher started {world_size} processes",
            "Start fewer processes, or let parallel-tune start them itself; model_parallel splits one replica.",
        )
    return plan


def devices_for(config: TrainConfig, world_size: int) -> Hardware:
    """A device for each process.

    Raises:
        ConfigError: there are fewer.
    """
    hardware = find_hardware(config)
    if config.hardware is None and hardware.kind == "cpu":
        hardware = find_hardware(replace(config, hardware=f"cpu:{world_size}"))
    if len(hardware.devices) < world_size:
        raise ConfigError(
            f"the launcher started {world_size} processes and there are {len(hardware.devices)} devices",
            f"Start {len(hardware.devices)} processes, or let parallel-tune start them itself.",
        )
    return Hardware(hardware.devices[:world_size], hardware.declared)


def _obey(run: rundir.RunDir, rank: int, hub_token: str | None, use: CardUse) -> NoReturn:
    from parallel_tune.worker import run_to_its_end

    def tell(outcome: rundir.Outcome) -> None:
        if outcome.code != 0:
            click.echo(f"parallel-tune: rank {rank}: {outcome.message}\n{outcome.hint}", err=True)
        elif rank == 0:
            click.echo(summary(read_report(run.report), run.path))
        if rank == 0:
            try_to_write_page(run.path)
        if rank == 0 and outcome.code == 0:
            try:
                export_after.export_result(run, hub_token, is_locked=True)
            except ParallelTuneError as error:
                click.echo(f"parallel-tune: {error}", err=True)
                leave(error.exit_code)

    run_to_its_end(run, rank, None, tell, use)
