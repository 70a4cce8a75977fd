"""`--profile_steps`: a few steady steps traced by torch's profiler, and what they do. Runs in workers only.

RUN/profile holds, of each rank, rank-K.trace.json.gz (for https://ui.perfetto.dev or chrome://tracing), rank-K.txt (the
operations that take most) and rank-K.json (`StepCounts`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from parallel_tune.rundir import write_atomically
from strategies.base import Session

FIRST_PROFILED = 10
"""Steps before the first one that is looked at: those compile, and record what is captured."""

ROWS = 25
"""Operations in the table."""

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "hipStreamSynchronize")
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "hipLaunchKernel", "hipModuleLaunchKernel")


@dataclass(frozen=True)
class StepCounts:
    """What one step does, the mean of those profiled. The profiler itself makes the host slower.

    Attributes:
        operations: that the host issues through torch's dispatcher.
        kernels: that ran on the device; those of a CUDA graph count each.
        launches: of single kernels by the host.
        graph_launches: of whole CUDA graphs.
        device_milliseconds: sum over kernels and copies.
        host_milliseconds: in operations and the driver, waiting for the device not counted.
        waits: calls in which the host waits for the device.
        waiting_milliseconds: the time in these.
        reads: of a value by the host (`aten::item`); those of tensors on the device are among the waits too.
        copies_to_host: from the device.
    """

    steps: int
    operations: float
    kernels: float
    launches: float
    graph_launches: float
    device_milliseconds: float
    host_milliseconds: float
    waits: float
    waiting_milliseconds: float
    reads: float
    copies_to_host: float


def count(events: Iterable[FunctionEvent], steps: int) -> StepCounts:
    """The counts of a trace of so many steps."""
    totals = dict.fromkeys((name for name in StepCounts.__dataclass_fields__ if name != "steps"), 0.0)
    for event in events:
        if event.is_user_annotation:
            continue
        name = event.name
        if event.device_type != DeviceType.CPU:
            totals["device_milliseconds"] += event.self_device_time_total / 1e3
            totals["kernels"] += not name.startswith(("Memcpy", "Memset"))
            totals["copies_to_host"] += name.startswith("Memcpy DtoH")
            continue
        waits = name in WAITS
        totals["waits"] += waits
        totals["waiting_milliseconds" if waits else "host_milliseconds"] += event.self_cpu_time_total / 1e3
        totals["launches"] += name.startswith(LAUNCHES)
        totals["graph_launches"] += name.startswith("cudaGraphLaunch")
        totals["operations"] += name.startswith("aten::")
        totals["reads"] += name == "aten::item"
    return StepCounts(steps, **{name: total / steps for name, total in totals.items()})


class ProfileSteps(TrainerCallback):  # type: ignore[misc]
    """Traces from the end of one step to the end of another, so with all that lies between them, logging too."""

    def __init__(self, folder: Path, steps: int, session: Session) -> None:
        self._folder = folder
        self._steps = steps
        self._session = session
        self._profiler: profile | None = None
        self._starts_after = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # The last ones of a run that is over too soon.
        left = state.max_steps - state.global_step
        self._steps = min(self._steps, left - 1)
        self._starts_after = state.global_step + max(1, min(FIRST_PROFILED, left - self._steps))
        if self._steps < 1:
            print("nothing was profiled: a run of one step has no steady one")
        elif self._session.device.type == "cuda":
            # Graphs that are recorded before the tracing library is loaded would show as a whole.
            with self._open():
                pass

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._steps >= 1 and state.global_step == self._starts_after:
            self._synchronize()
            self._profiler = self._open()
            self._profiler.start()
        elif self._profiler is not None and state.global_step == self._starts_after + self._steps:
            self._finish()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._profiler is not None:  # a run that was stopped
            self._steps = state.global_step - self._starts_after
            self._finish()

    def _open(self) -> profile:
        cuda = self._session.device.type == "cuda"
        return profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])])

    def _synchronize(self) -> None:
        if self._session.device.type == "cuda":
            schedule = self._session.schedule
            for device in schedule.devices if schedule is not None else [self._session.device]:
                torch.cuda.synchronize(device)

    def _finish(self) -> None:
        profiler, self._profiler = self._profiler, None
        assert profiler is not None
        self._synchronize()
        profiler.stop()
        if self._steps < 1:
            return
        try:
            self._write(profiler)
        except OSError as error:
            print(f"the profile could not be written: {error}; training goes on")

    def _write(self, profiler: profile) -> None:
        rank = self._session.rank
        self._folder.mkdir(exist_ok=True)
        events = profiler.events() or ()  # type: ignore[no-untyped-call]
        counts = count(events, self._steps)
        write_atomically(self._folder / f"rank-{rank}.json", json.dumps(asdict(counts), indent=1))
        device = self._session.device.type
        averages = profiler.key_averages()
        table = averages.table(sort_by=f"self_{device}_time_total", row_limit=ROWS)
        write_atomically(self._folder / f"rank-{rank}.txt", table)
        profiler.export_chrome_trace(str(self._folder / f"rank-{rank}.trace.json.gz"))
        print(
            f"{self._steps} steps profiled, each with {counts.operations:,.0f} operations, "
            f"{counts.kernels:,.0f} kernels, {counts.device_milliseconds:.1f} ms on the device, "
            f"{counts.host_milliseconds:.1f} ms on the host, {counts.waits:.0f} waits, {counts.reads:.0f} values read: "
            f"{self._folder}"
        )
