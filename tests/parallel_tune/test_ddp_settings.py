"""What ddp is set to: seen in the wrapper of a real run of two processes, in its trace, and in summed gradients."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from dataclasses import replace
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
    def close(self):
        (wrapper,) = [each for each in gc.get_objects() if isinstance(each, DistributedDataParallel)]
        said = {name: value for name, value in wrapper._get_ddp_logging_data().items() if isinstance(value, (int, str))}
        gradients = [each.grad for each in wrapper.parameters() if each.requires_grad]
        said["gradients_in_buckets"] = all(each is not None and each._is_view() for each in gradients)
        with open(os.path.join(os.environ["NOTES"], f"rank-{self.rank}.json"), "w") as file:
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


@pytest.fixture(scope="module")
def looked_at(package: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which the strategy is installed."""
    found: dict[str, str] = package(tmp_path_factory.mktemp("looking"), "looked_at = other:LookedAt", STRATEGY)
    return found


@pytest.mark.parametrize(("reduce_dtype", "accumulation"), [("float32", 1), ("bfloat16", 3)])
def test_the_wrapper_is_set_for_dense_adapters(
    reduce_dtype: str,
    accumulation: int,
    tune: Any,
    ddp_run: Any,
    looked_at: dict[str, str],
    read_notes: Any,
    tmp_path: Path,
) -> None:
    base = tuple(option for option in tune.base if "per_device" not in option)
    run = replace(tune, base=(*base, f"--per_device_train_batch_size={6 // accumulation}"))(
        "--strategy=looked_at", "--hardware=cpu:2", f"--ddp_reduce_dtype={reduce_dtype}", "--profile_steps=1",
        env={**looked_at, "NOTES": str(tmp_path)},
    )  # fmt: skip
    notes = read_notes(tmp_path)
    assert len(notes) == 2
    for said in notes:
        assert said["gradient_as_bucket_view"] == 1
        assert said["gradients_in_buckets"], "a step that lets go of its gradients makes a second copy in the next"
        assert said["find_unused_parameters"] == 0
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
