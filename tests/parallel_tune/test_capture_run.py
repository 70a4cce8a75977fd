"""A whole run whose steps are recorded and replayed, in one process and in two: the losses of eager ones.

A CPU has no CUDA graphs; what takes their place repeats the recorded work on the same tensors, which shows that nothing
but a micro-batch's tensors decides a replay.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

STRATEGY = """
from dataclasses import replace

import torch

from parallel_tune.unneeded import QUANTIZERS, leave_out
from strategies.ddp import DDP
from strategies.replay import Replay
from strategies.sessions import ReplicaSession, open_replica


class Again:
    def record(self, work):
        result = torch.zeros(())
        return lambda: result.copy_(work()), result

    def make_room(self):
        pass


class RecordedReplica(ReplicaSession):
    def place(self, model):
        def trained():
            return [parameter for parameter in model.parameters() if parameter.requires_grad]

        self._replay = Replay(trained, self.device, Again(), self.world_size)


class RecordedDDP(DDP):
    name = "recorded_ddp"
    auto_order = 130

    def plan(self, workload, hardware, estimate):
        return replace(super().plan(workload, hardware, estimate), captured=True)

    def open(self, plan, timeout_seconds):
        leave_out(QUANTIZERS)
        open_replica(plan, timeout_seconds)
        return RecordedReplica(plan)
"""


@pytest.fixture(scope="module")
def recorded(package: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which the strategy is installed."""
    found: dict[str, str] = package(tmp_path_factory.mktemp("recorded"), "recorded_ddp = other:RecordedDDP", STRATEGY)
    return found


@pytest.fixture(scope="module")
def on_two(tune: Any, recorded: dict[str, str]) -> Any:
    """A run of two processes, with checkpoints."""
    return tune("--strategy=recorded_ddp", "--hardware=cpu:2", "--save_steps=4", env=recorded)


@pytest.mark.parametrize("processes", [1, 2])
def test_recorded_steps_train_as_eager_ones(
    processes: int, tune: Any, recorded: dict[str, str], on_two: Any, single_run: Any, ddp_run: Any
) -> None:
    run = on_two if processes == 2 else tune("--strategy=recorded_ddp", "--hardware=cpu:1", env=recorded)
    eager = single_run if processes == 1 else ddp_run
    assert run.losses == pytest.approx(eager.losses, rel=1e-5)
    assert run.report["held_out_loss_after"] == pytest.approx(eager.report["held_out_loss_after"], rel=1e-5)
    found = run.report["captured"]
    assert found["reason"] is None
    assert found["recordings"] == len(found["sizes"]) >= 1
    assert found["replayed_elements"] > found["elements"] / 2
    assert found["gradient_error"] < 1e-4
    log = (run.run / "logs" / "rank-0.log").read_text()
    assert f"steps are captured at {', '.join(map(str, found['sizes']))}" in log


def test_a_recorded_run_is_resumed(
    tune: Any, recorded: dict[str, str], on_two: Any, ddp_run: Any, tmp_path: Path
) -> None:
    run = shutil.copytree(on_two.run, tmp_path / "run")
    for name in ("adapter", "checkpoint-10"):
        shutil.rmtree(run / name)
    resumed = tune("resume", str(run), base=False, env=recorded)
    assert "resuming from checkpoint-8" in resumed.out
    assert resumed.losses[-1] == pytest.approx(ddp_run.losses[-1], rel=1e-5)
    assert (resumed.run / "adapter" / "adapter_model.safetensors").exists()
