"""One of the two processes that `parallel-tune doctor` starts, to see whether they can meet and sum.

python -m torch.distributed.run ... -m parallel_tune.doctor_worker gloo|nccl
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta

from parallel_tune.process import die_with_parent, leave

PATIENCE = timedelta(seconds=60)


def total(backend: str) -> float:
    """The sum over all processes of rank + 1, by this backend."""
    import torch
    import torch.distributed as dist

    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=PATIENCE)
    value = torch.tensor(float(dist.get_rank() + 1), device=device)
    dist.all_reduce(value)
    return float(value.item())


def main(backend: str) -> None:
    """Say the sum, or what went wrong, in a line of JSON. Never returns."""
    die_with_parent()
    try:
        answer: dict[str, float | str] = {"sum": total(backend)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    # One write, so that lines of two processes do not mix.
    sys.stdout.write(json.dumps(answer) + "\n")
    leave(0 if "sum" in answer else 1)


if __name__ == "__main__":
    main(sys.argv[1])
