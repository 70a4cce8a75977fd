"""A run's use of a GPU is its own: neither a desktop's nor another run's on the same card."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from parallel_tune import device_use, joined
from parallel_tune.config import make_config
from parallel_tune.device_use import CardUse, look_before
from parallel_tune.hardware import parse_hardware
from parallel_tune.memory.facts import facts_from_config
from parallel_tune.nvml import Probe
from parallel_tune.planning import make_plan
from parallel_tune.report import measure_devices
from strategies.contracts import Plan
from strategies.errors import ConfigError
from strategies.registry import load_registry

GIB = 1 << 30
UUID = "GPU-11111111-2222-3333-4444-555555555555"


class FakeNvml:
    """A card by its total use and its processes; None for what the driver does not tell."""

    nvmlMemory_v2 = 2  # noqa: N815

    class NVMLError(Exception):
        pass

    def __init__(self, used: int | None, processes: dict[int, int | None] | None) -> None:
        self._used, self._processes = used, processes

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != UUID:
            raise self.NVMLError(uuid)
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str, version: int) -> Any:  # noqa: N802
        if self._used is None:
            raise self.NVMLError(handle)
        return SimpleNamespace(used=self._used)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:  # noqa: N802
        if self._processes is None:
            raise self.NVMLError(handle)
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in self._processes.items()]


@pytest.mark.parametrize(
    ("nvml", "before", "expected"),
    [
        (FakeNvml(9 * GIB, {os.getpid(): 5 * GIB, 1: 4 * GIB}), {UUID: 3 * GIB}, (5 * GIB, "process")),
        (FakeNvml(9 * GIB, {os.getpid(): None, 1: None}), {UUID: 3 * GIB}, (6 * GIB, "card less others")),
        (FakeNvml(9 * GIB, {}), {UUID: 3 * GIB}, (6 * GIB, "card less others")),
        (FakeNvml(9 * GIB, None), {UUID: 3 * GIB}, (6 * GIB, "card less others")),
        # Another's number in the host's count: less than the allocator alone holds.
        (FakeNvml(9 * GIB, {os.getpid(): 1 * GIB}), {UUID: 3 * GIB}, (6 * GIB, "card less others")),
        # What was there before has gone since.
        (FakeNvml(9 * GIB, {}), {UUID: 8 * GIB}, (4 * GIB, "card less others")),
        (FakeNvml(9 * GIB, {}), {}, (9 * GIB, "card")),
        (None, {}, (9 * GIB, "card")),
    ],
)
def test_whose_use_it_is(nvml: Any, before: dict[str, int], expected: tuple[int, str]) -> None:
    assert CardUse(nvml, before).now(UUID, 4 * GIB, 9 * GIB) == expected


def test_cards_are_read_before_a_process_touches_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        device_use, "probe_details", lambda _: Probe(parse_hardware("2xH100-80GB"), (UUID, "GPU-lost"), ())
    )
    assert look_before({}, FakeNvml(3 * GIB, {})).before == {UUID: 3 * GIB}
    assert look_before({}, FakeNvml(None, {})).before == {}  # an old driver


def test_cards_that_nothing_is_planned_for_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> Probe:
        raise ConfigError("CUDA_VISIBLE_DEVICES names a MIG instance")

    monkeypatch.setattr(device_use, "probe_details", refuse)
    assert look_before({}, FakeNvml(3 * GIB, {})).before == {}


def test_a_launchers_process_reads_the_cards_before_it_joins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Joining takes a context, which would be counted as another process's."""
    import torch.distributed as dist

    from strategies import sessions

    order: list[str] = []
    seen = CardUse(None, {UUID: 3 * GIB})
    handed: list[Any] = []

    class Obeyed(Exception):
        pass

    def obey(*arguments: Any) -> None:
        handed.extend(arguments)
        raise Obeyed

    monkeypatch.setattr(joined, "look_before", lambda _: order.append("look") or seen)
    monkeypatch.setattr(sessions, "join_processes", lambda *_: order.append("join"))
    monkeypatch.setattr(dist, "broadcast_object_list", lambda decision, **_: decision[0].update(run=str(tmp_path)))
    monkeypatch.setattr(joined, "_obey", obey)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in ("stdout", "stderr"):  # a rank replaces them
        monkeypatch.setattr(sys, name, getattr(sys, name))
    launch: Any = SimpleNamespace(environment={}, local_rank=1, rank=1, world_size=2)
    with pytest.raises(Obeyed):
        joined.train_as_rank(make_config({}), launch)
    assert order == ["look", "join"]
    assert handed[-1] is seen


@pytest.fixture
def plan() -> Plan:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8}
    facts = facts_from_config({"model_type": "llama", **sizes, "num_key_value_heads": 8, "vocab_size": 1000})
    config = make_config({"model": "x", "strategy": "ddp"})
    return make_plan(config, facts, "transformers", parse_hardware("1xH100-80GB"), load_registry())


def test_a_report_counts_no_other_process(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    figures = {
        "mem_get_info": (60 * GIB, 80 * GIB),
        "memory_reserved": 4 * GIB,
        "max_memory_reserved": 7 * GIB,
        "max_memory_allocated": 6 * GIB,
        "get_device_properties": SimpleNamespace(uuid=UUID.removeprefix("GPU-")),
    }
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda _ordinal, value=value: value)
    session: Any = SimpleNamespace(rank=0, device=torch.device("cuda", 0))
    nvml = FakeNvml(20 * GIB, {os.getpid(): 5 * GIB, 1: 15 * GIB})
    found = measure_devices(plan, session, CardUse(nvml, {UUID: 15 * GIB}))
    # A context of one GiB, and what the allocator had at its peak.
    assert found[0]["used_peak_bytes"] == 8 * GIB
    assert found[0]["used_by"] == "process"
    assert found[0]["reserved_peak_bytes"] == 7 * GIB
