"""CUDA graphs of stages: what records the segments of a split model's micro-batches on GPUs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from strategies.randomness import leave_capture


class StageGraphs:
    """CUDA graphs on the stages' devices; a `StageRecorder`.

    Graphs of one lane and stage share a pool of memory, whatever their size, since a lane carries one micro-batch at a
    time: from its forward to its backward nothing else is replayed there. A micro-batch enters and leaves the last
    stage while its lane holds that device's token, so that one pool serves all lanes there.

    Args:
        devices: of the stages, all GPUs.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = tuple(devices)
        # One stream a device: a backward pass runs on the stream of its forward pass, so both are captured there.
        self._streams = {device: torch.cuda.Stream(device) for device in self._devices}  # type: ignore[no-untyped-call]
        self._pools: dict[tuple[int, int], Any] = {}
        self._graphs: list[torch.cuda.CUDAGraph] = []  # A pool lives as long as one of its graphs
        self._open: torch.cuda.CUDAGraph | None = None
        self._outside: tuple[int, torch.cuda.Stream] | None = None

    def ready(self) -> None:
        for device in self._streams:
            torch.cuda.synchronize(device)
        gc.collect()
        torch.cuda.empty_cache()

    def begin(self, lane: int, stage: int) -> None:
        device = self._devices[stage]
        owner = 0 if stage == len(self._devices) - 1 else lane
        if (owner, stage) not in self._pools:
            self._pools[owner, stage] = torch.cuda.graph_pool_handle()
        self._outside = torch.cuda.current_device(), torch.cuda.current_stream(device)
        self._open = torch.cuda.CUDAGraph()
        torch.cuda.set_stream(self._streams[device])  # which makes its device the current one
        # Other threads, which load data, may call CUDA meanwhile.
        self._open.capture_begin(pool=self._pools[owner, stage], capture_error_mode="thread_local")

    def end(self) -> Callable[[], None]:
        graph, self._open = self._open, None
        assert graph is not None
        try:
            graph.capture_end()
        finally:
            self._leave()
        self._graphs.append(graph)
        return graph.replay

    def abandon(self) -> None:
        graph, self._open = self._open, None
        if graph is not None:
            with suppress(Exception):  # what went wrong is known; a capture that failed cannot be ended in peace
                graph.capture_end()
            self._leave()
        for device in self._streams:
            leave_capture(device)

    def forget(self) -> None:
        self._graphs.clear()
        self._pools.clear()

    def _leave(self) -> None:
        assert self._outside is not None
        device, stream = self._outside
        torch.cuda.set_stream(stream)
        torch.cuda.set_device(device)
