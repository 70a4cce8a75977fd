"""Holds memory of every card until its input ends: `python examples/benchmarks/ballast.py GIB`.

A model that one card could hold then does not fit one, as on a smaller card; speeds stay those of the large one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from children import bound, end


@contextmanager
def ballast(gib: float) -> Iterator[list[int]]:
    """Within it, a process of its own holds so much of each card; gives the bytes then free on each. 0 holds nothing.

    Raises:
        RuntimeError: there is no card, or not so much is free.
    """
    if not gib:
        yield []
        return
    process = subprocess.Popen(
        bound([sys.executable, __file__, str(gib)]),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stderr is not None
        said = process.stdout.readline()
        if not said:
            raise RuntimeError(f"{gib} GiB of each card cannot be held: {process.stderr.read()[-500:].strip()}")
        yield json.loads(said)
    finally:
        end(process)
        process.communicate()


def hold(gib: float) -> None:
    """Take the memory, say what is left, and wait."""
    import torch

    cards = range(torch.cuda.device_count())
    if not cards:
        sys.exit("there is no GPU")
    held = [torch.empty(int(gib * 2**30), dtype=torch.uint8, device=f"cuda:{card}") for card in cards]
    print(json.dumps([torch.cuda.mem_get_info(card)[0] for card in cards]), flush=True)
    sys.stdin.read()
    del held


if __name__ == "__main__":
    hold(float(sys.argv[1]))
