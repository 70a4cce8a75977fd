"""`--profile_steps` traces steady steps of a real run, and counts what they do."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from parallel_tune.config import make_config
from parallel_tune.profiling import FIRST_PROFILED, ProfileSteps, count
from strategies.errors import ConfigError


def when(event: dict[str, Any]) -> float:
    """Where an event of a trace begins."""
    return float(event["ts"])


def test_steady_steps_are_traced_on_each_rank_and_change_nothing(compared: Callable[[str], Any]) -> None:
    bare, run = compared("bare"), compared("profiled")
    assert run.losses == pytest.approx(bare.losses, rel=1e-6)
    for rank in (0, 1):
        counts = json.loads((run.run / "profile" / f"rank-{rank}.json").read_text())
        assert counts["steps"] == 1
        assert counts["operations"] > 100 and counts["host_milliseconds"] > 0
        assert counts["kernels"] == counts["graph_launches"] == counts["device_milliseconds"] == 0
        with gzip.open(run.run / "profile" / f"rank-{rank}.trace.json.gz") as file:
            events = sorted((event for event in json.load(file)["traceEvents"] if "ts" in event), key=when)
        names = [str(event.get("name")) for event in events]
        # One optimizer step, and what transformers does around it.
        assert len([name for name in names if name.startswith("Optimizer.step#")]) == 1
        # The next step's rows are put together when this one's work is issued, not when the next one should begin.
        last = {part: max(n for n, name in enumerate(names) if part in name) for part in ("DataLoader", "aten::mm")}
        assert last["aten::mm"] < last["DataLoader"]
        assert "aten::mm" in (run.run / "profile" / f"rank-{rank}.txt").read_text()
    log = (run.run / "logs" / "rank-0.log").read_text()
    assert "1 steps profiled" in log
    # The step after which it began was logged before the trace was written.
    assert log.index("1 steps profiled") > log.index("'loss'")


def test_a_short_run_is_profiled_at_its_end(compared: Callable[[str], Any]) -> None:
    run = compared("profiled, three steps")
    assert f"profile: {run.run / 'profile'}" in run.out
    assert json.loads((run.run / "profile" / "rank-0.json").read_text())["steps"] == 2
    assert FIRST_PROFILED > 3


def test_a_run_of_one_step_is_not_profiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session: Any = SimpleNamespace(rank=0, device=torch.device("cpu"))
    profiled: Any = ProfileSteps(tmp_path / "profile", 1, session)
    profiled.on_train_begin(None, SimpleNamespace(max_steps=1, global_step=0), None)
    assert "nothing was profiled" in capsys.readouterr().out
    for event in (profiled.on_step_end, profiled.on_train_end):
        event(None, SimpleNamespace(max_steps=1, global_step=1), None)
    assert not (tmp_path / "profile").exists()


def test_counts_are_means_over_steps() -> None:
    def event(name: str, device: DeviceType, microseconds: float, annotation: bool = False) -> Any:
        on_device = device == DeviceType.CUDA
        return SimpleNamespace(
            name=name,
            device_type=device,
            is_user_annotation=annotation,
            self_device_time_total=microseconds if on_device else 0,
            self_cpu_time_total=0 if on_device else microseconds,
        )

    events = [
        *[event("aten::mm", DeviceType.CPU, 1000)] * 4,
        *[event("cudaLaunchKernel", DeviceType.CPU, 500)] * 4,
        *[event("cudaGraphLaunch", DeviceType.CPU, 500)] * 2,
        *[event("aten::item", DeviceType.CPU, 0)] * 6,
        *[event("cudaStreamSynchronize", DeviceType.CPU, 9000)] * 2,
        *[event("ampere_gemm", DeviceType.CUDA, 3000)] * 8,
        *[event("Memcpy DtoH (Device -> Pageable)", DeviceType.CUDA, 1000)] * 2,
        event("Optimizer.step#AdamW.step", DeviceType.CUDA, 99_000, annotation=True),
    ]
    found = count(events, 2)
    assert (found.operations, found.launches, found.graph_launches, found.kernels) == (5, 2, 1, 4)
    assert (found.reads, found.waits, found.copies_to_host) == (3, 1, 1)
    assert found.device_milliseconds == 13.0
    assert found.host_milliseconds == 3.5
    assert found.waiting_milliseconds == 9.0


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="profile_steps"):
        make_config({"profile_steps": -1})
