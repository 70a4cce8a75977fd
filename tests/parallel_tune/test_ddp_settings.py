"""What ddp is set to: seen in the wrapper of a real run of two processes, in its trace, and in summed gradients."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from parallel_tune.launch import torchrun_arguments

STRATEGY = """
import gc
import json
import os

import torch
from torch.nn.parallel import DistributedDataParallel

from parallel_tune.unneeded import QUANTIZERS, leave_out
from strategies.ddp import DDP
from strategies.sessions import ReplicaSession, open_replica


class Looking(ReplicaSession):
    def place(self, model):
        super().place(model)
        self._model, self._walks, walk = model, [], type(model).train
        model.train = lambda mode=True: self._walks.append(mode) or walk(model, mode)

    def close(self):
        wrappers = [each for each in gc.get_objects() if isinstance(each, DistributedDataParallel)]
        (wrapper,) = [each for each in wrappers if each.module is self._model]
        said = {name: value for name, value in wrapper._get_ddp_logging_data().items() if isinstance(value, (int, str))}
        gradients = [each.grad for each in wrapper.parameters() if each.requires_grad]
        said["gradients_in_buckets"] = all(each is not None and each._is_view() for each in gradients)
        said["walks"] = self._walks
        name = f"{self._reduce_dtype}-{self.rank}.json"
        with open(os.path.join(os.environ["NOTES"], name), "w") as file:
            json.dump(said, file)
        super().close()


class LookedAt(DDP):
    name = "looked_at"
    auto_order = 140

    def open(self, plan, timeout_seconds):
        leave_out(QUANTIZERS)
        open_replica(plan, timeout_seconds)
        return Looking(plan)
"""


ACCUMULATIONS = {"float32": 1, "bfloat16": 3}
"""Micro-batches a step, by the dtype of the summed gradients."""


@pytest.fixture(scope="module")
def looked_at(
    tune: Any, package: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Any, list[dict[str, Any]]]]:
    """Runs with each dtype, and what both ranks saw."""
    installed, notes = tmp_path_factory.mktemp("looking"), tmp_path_factory.mktemp("notes")
    env = package(installed, "looked_at = other:LookedAt", STRATEGY) | {"NOTES": str(notes)}
    base = ("--strategy=ddp", "--hardware=cpu:2", "--profile_steps=1")
    each = (
        (*base, f"--ddp_reduce_dtype={dtype}", f"--per_device_train_batch_size={6 // accumulation}")
        for dtype, accumulation in ACCUMULATIONS.items()
    )
    runs = tune.in_turn(*each, strategy="looked_at", env=env)
    return {
        dtype: (run, [json.loads(path.read_text()) for path in sorted(notes.glob(f"torch.{dtype}-*.json"))])
        for dtype, run in zip(ACCUMULATIONS, runs, strict=True)
    }


@pytest.mark.parametrize("reduce_dtype", ACCUMULATIONS)
def test_the_wrapper_is_set_for_dense_adapters(
    reduce_dtype: str, ddp_run: Any, looked_at: dict[str, tuple[Any, list[dict[str, Any]]]]
) -> None:
    accumulation = ACCUMULATIONS[reduce_dtype]
    run, notes = looked_at[reduce_dtype]
    assert run.plan["strategy"] == "looked_at"
    assert len(notes) == 2
    for said in notes:
        assert said["gradient_as_bucket_view"] == 1
        assert said["gradients_in_buckets"], "a step that lets go of its gradients makes a second copy in the next"
        assert said["find_unused_parameters"] == 0
        assert said["walks"] == [False, True] * 3, "through all modules: for three evaluations, no micro-batch"
        assert said.get("static_graph", 0) == (accumulation == 1)
        assert ("bfloat16" in said.get("comm_hook", "")) == (reduce_dtype == "bfloat16")
    # Several micro-batches a step, whose gradients are summed once, and a flag of the signals' watch.
    assert run.plan["gradient_accumulation_steps"] == accumulation
    with gzip.open(run.run / "profile" / "rank-0.trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("c10d::allreduce_") == 2
    if reduce_dtype == "float32":
        assert run.losses == pytest.approx(ddp_run.losses, rel=1e-5)
    else:
        # Rounded gradients train nearly, and not exactly, as well.
        assert run.losses != pytest.approx(ddp_run.losses, rel=1e-7)
        assert run.losses == pytest.approx(ddp_run.losses, rel=1e-2)


PROGRAM = """
import json
import os
import sys

import torch
import torch.distributed as dist

from strategies.gradients import FlatGradients
from strategies.sessions import join_processes

join_processes(False, 0, 77)
rank = dist.get_rank()
backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
found = {"timeout": backend.options._timeout.total_seconds()}
for name in ("float32", "bfloat16"):
    weight = torch.nn.Parameter(torch.zeros(2))
    gradients = FlatGradients([weight], 2, getattr(torch, name))
    gradients.begin()
    # 1 + 2**-10 needs more bits than bfloat16 has; 0.5 and 2 do not.
    weight.grad += torch.tensor([1 + 2**-10, 0.5 if rank else 2.0])
    gradients.average()
    found[name] = weight.grad.tolist()
    assert weight.grad.dtype == torch.float32
if rank == 0:
    json.dump(found, open(sys.argv[1], "w"))
dist.barrier()
os._exit(0)
"""


def test_gradients_of_captured_steps_are_summed_in_the_dtype_asked_for(
    environment: dict[str, str], tmp_path: Path
) -> None:
    program, result = tmp_path / "program.py", tmp_path / "result.json"
    program.write_text(PROGRAM)
    root = str(Path(__file__).parents[2])
    subprocess.run(
        [sys.executable, *torchrun_arguments(2), str(program), str(result)],
        env={**environment, "PYTHONPATH": root, "GLOO_SOCKET_IFNAME": "lo"}, check=True, timeout=240,
    )  # fmt: skip
    found = json.loads(result.read_text())
    assert found["timeout"] == 77
    assert found["float32"] == [1 + 2**-10, 1.25]
    assert found["bfloat16"] == [1.0, 1.25]


def test_the_dtype_reaches_the_plan_and_is_off_by_default(tune: Any) -> None:
    options = ("plan", "--hardware=cpu:2", "--strategy=ddp", "--json")
    assert json.loads(tune(*options).out)["reduce_dtype"] == "float32"
    assert json.loads(tune(*options, "--ddp_reduce_dtype=bf16").out)["reduce_dtype"] == "bfloat16"
