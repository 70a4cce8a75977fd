"""What a training process holds open: its place among the processes, and its devices. Runs in workers only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from strategies.contracts import Plan
from strategies.recording import Recorded, TimedSchedule
from strategies.visit import busy_shares
from strategies.workspaces import settle_workspaces

if TYPE_CHECKING:
    from strategies.pipeline import Lanes
    from strategies.replay import Replay
    from strategies.stage_capture import StageCapture
    from strategies.stage_recording import StageRecorder
    from strategies.stages import Stages


class ReplicaSession:
    """One process of ddp: a whole replica on one device, gradients averaged over all processes."""

    def __init__(self, plan: Plan) -> None:
        self._cuda = plan.devices[0].kind == "cuda"
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.is_main = self.rank == 0
        if self.world_size != plan.processes:
            raise AssertionError(f"the plan has {plan.processes} processes, the launcher started {self.world_size}")
        self._captured, self._compiled = plan.captured, plan.compiled
        self._reduce_dtype: torch.dtype = getattr(torch, plan.reduce_dtype)
        self._accumulates = plan.gradient_accumulation_steps > 1
        self._static_graph = False
        self._replay: Replay | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if self._cuda else torch.device("cpu")

    @property
    def schedule(self) -> Replay | None:
        return self._replay

    def device_map(self) -> dict[str, int | str]:
        return {"": self.local_rank if self._cuda else "cpu"}

    def place(self, model: Any) -> None:
        """The whole model was loaded onto this process's device; a captured step needs to know its parameters."""
        # torch's reducer (2.13) fails an assertion where a static graph's first pass is one of several of a step.
        self._static_graph = not self._accumulates and not _may_leave_parts_out(model)
        if not self._captured:
            return
        from strategies.compiled_layers import CompiledLayers
        from strategies.replay import CudaGraphs, Replay
        from strategies.stages import dissect

        self._replay = Replay(
            lambda: [parameter for parameter in model.parameters() if parameter.requires_grad],
            self.device,
            CudaGraphs(self.device),
            self.world_size,
            self._reduce_dtype,
            CompiledLayers(dissect(model).layers) if self._compiled else None,
        )

    def training_arguments(self) -> dict[str, Any]:
        return {
            "use_cpu": not self._cuda,
            # transformers would search each pass for them under any adapter, and checkpoints then count twice.
            "ddp_find_unused_parameters": False,
            "ddp_static_graph": self._static_graph,
            "ddp_broadcast_buffers": False,
        }

    def any(self, flag: bool) -> bool:
        return self.sum([float(flag)])[0] > 0

    def sum(self, values: Sequence[float]) -> list[float]:
        total = torch.tensor(list(values), dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def gather(self, value: Any) -> list[Any]:
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        # A sum of CPU tensors goes through gloo and leaves the GPUs alone.
        self.sum([0.0])

    def report(self) -> dict[str, Any]:
        return {"captured": vars(self._replay.report).copy()} if self._replay is not None else {}

    def close(self) -> None:
        """Nothing: tearing a process group down can abort or wait for ever; the process's end releases it."""


def _may_leave_parts_out(model: Any) -> bool:
    """Whether passes may differ in what they compute: tokens choose their experts, or layers are dropped at random."""
    config = model.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "layerdrop")
    return any(getattr(config, name, None) for name in names)


class SplitSession:
    """The one process of model_parallel: one model, consecutive layers on each device."""

    rank = 0
    world_size = 1
    is_main = True

    def __init__(self, plan: Plan) -> None:
        if (started := int(os.environ.get("WORLD_SIZE", "1"))) != 1:
            raise AssertionError(f"a split is one process, and the launcher started {started}")
        self._plan = plan
        self._cuda = plan.devices[0].kind == "cuda"
        self._stages: Stages | None = None
        self._lanes: Lanes | None = None
        self._captured: StageCapture | None = None
        self._recorded: Recorded | None = None
        if self._cuda:
            torch.cuda.set_device(0)
            settle_workspaces(dict.fromkeys(self._stage_devices()))

    def _stage_devices(self) -> list[torch.device]:
        return [torch.device("cuda", at) if self._cuda else torch.device("cpu") for at in self._plan.ordinals]

    @property
    def device(self) -> torch.device:
        return self._stage_devices()[0]

    def device_map(self) -> dict[str, int | str]:
        if not self._cuda:
            return {"": "cpu"}
        # Only the plan's devices are visible to this process, in the plan's order.
        return {name: self._plan.visible.index(int(index)) for name, index in self._plan.device_map.items()}

    def place(self, model: Any) -> None:
        from strategies.compiled_layers import CompiledLayers
        from strategies.pipeline import Lanes
        from strategies.stage_capture import StageCapture
        from strategies.stages import split
        from strategies.turns import Turns

        cuts = [device.layers[0] for device in self._plan.devices]
        self._stages = split(model, cuts, self._stage_devices())
        if self._plan.captured:
            self._captured = StageCapture(
                self._stages,
                lambda: [parameter for parameter in model.parameters() if parameter.requires_grad],
                self.stage_recorder(self._stages),
                CompiledLayers(self._stages.anatomy.layers) if self._plan.compiled else None,
            )
        # A step begins with idle devices anyway: waiting for them costs nothing and makes timelines exact.
        turns = Turns(self._stages, align_clocks=True)
        if self._plan.lanes > 1 or self._captured is not None:
            self._lanes = Lanes(self._stages, self._plan.lanes, align_clocks=True, captured=self._captured)
        lanes = self._lanes

        def schedule() -> TimedSchedule:
            return turns if lanes is None or lanes.reason is not None else lanes

        # Virtual devices are all the CPU, which has cores for so many stages at once.
        places = list(self._plan.ordinals) if self._cuda else [0] * len(self._plan.devices)
        at_once = 1.0 if self._cuda else max(1.0, len(os.sched_getaffinity(0)) / torch.get_num_threads())
        self._recorded = Recorded(schedule, places, lambda inputs: int(inputs["input_ids"].numel()), at_once)

    def stage_recorder(self, stages: Stages) -> StageRecorder:
        """What records the work of stages for replays: CUDA graphs."""
        from strategies.stage_graphs import StageGraphs

        return StageGraphs(stages.devices)

    @property
    def schedule(self) -> Recorded | None:
        return self._recorded

    def training_arguments(self) -> dict[str, Any]:
        return {"use_cpu": not self._cuda}

    def any(self, flag: bool) -> bool:
        return flag

    def sum(self, values: Sequence[float]) -> list[float]:
        return [float(value) for value in values]

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        """One process never waits for another."""

    def report(self) -> dict[str, Any]:
        if self._stages is None:
            return {}
        found: dict[str, Any] = {
            "lanes": self._plan.lanes,
            "lanes_reason": self._lanes.reason if self._lanes else None,
            "crossings": [vars(crossings).copy() for crossings in self._stages.crossings],
        }
        if self._captured is not None:
            found["captured"] = vars(self._captured.report).copy()
        if self._recorded and (timeline := self._recorded.timeline()):
            shares = busy_shares(timeline, len(self._stages))
            found["stages"] = [{"busy_share": share} for share in shares]
            found["timeline"] = [vars(segment).copy() for segment in timeline]
        if self._recorded and (measured := self._recorded.stage_seconds()):
            found["stage_seconds"] = vars(measured).copy()
        return found

    def close(self) -> None:
        if self._lanes is not None:
            self._lanes.close()


def join_processes(cuda: bool, local_rank: int, timeout_seconds: int) -> None:
    """Join the process group that the launcher's variables describe, unless this process is in it already.

    The device is chosen before anything can use another one. Tensors on a CPU go through gloo, those on GPUs through
    NCCL.
    """
    if cuda:
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if cuda else "gloo",
            timeout=timedelta(seconds=timeout_seconds),
            device_id=torch.device("cuda", local_rank) if cuda else None,
        )


def open_replica(plan: Plan, timeout_seconds: int) -> ReplicaSession:
    """Take this process's place among the replicas."""
    session = ReplicaSession(plan)
    cuda = plan.devices[0].kind == "cuda"
    if session.world_size > 1:
        join_processes(cuda, session.local_rank, timeout_seconds)
    elif cuda:
        torch.cuda.set_device(session.local_rank)
    if cuda:
        settle_workspaces([session.device])
    return session


def open_split(plan: Plan) -> SplitSession:
    """Take all devices of the plan for this one process."""
    return SplitSession(plan)
