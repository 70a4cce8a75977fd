"""Settings of ddp that only NCCL shows: the timeout that a user gives, and gradients summed in bfloat16.

`pytest -m gpu tests/gpu/test_gpu_ddp_settings.py` runs it: some ten seconds on one GPU, whose group is of one process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parallel_tune.launch import torchrun_arguments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("default"),
]

PROGRAM = """
import json
import os
import sys

import torch
import torch.distributed as dist

from strategies.reduction import reduce_in_bfloat16
from strategies.sessions import join_processes

rank = int(os.environ["LOCAL_RANK"])
join_processes(True, rank, 77)
group = dist.distributed_c10d._get_default_group()
found = {
    device: group._get_backend(torch.device(device)).options._timeout.total_seconds() for device in ("cpu", "cuda")
}
weight = torch.nn.Linear(2, 1, bias=False).cuda()
model = torch.nn.parallel.DistributedDataParallel(weight, device_ids=[rank], gradient_as_bucket_view=True)
model.register_comm_hook(None, reduce_in_bfloat16)
model(torch.tensor([[1 + 2**-10, 0.5]], device="cuda")).sum().backward()
found["gradient"] = weight.weight.grad.tolist()
if rank == 0:
    json.dump(found, open(sys.argv[1], "w"))
dist.barrier()
os._exit(0)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_nccl_has_the_timeout_and_sums_what_it_is_given(
    processes: int, checkout: dict[str, str], tmp_path: Path
) -> None:
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    program, result = tmp_path / "program.py", tmp_path / "result.json"
    program.write_text(PROGRAM)
    subprocess.run(
        [sys.executable, *torchrun_arguments(processes), str(program), str(result)],
        env=checkout, check=True, timeout=240,
    )  # fmt: skip
    assert json.loads(result.read_text()) == {"cpu": 77, "cuda": 77, "gradient": [[1.0, 0.5]]}
