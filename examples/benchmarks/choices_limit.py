"""Processes held to a smaller card than the one that is there, by torch's allocator."""

from __future__ import annotations

import subprocess
import sys

from children import bound
from prediction_process import environment

from strategies.contracts import Device, Plan

VARIABLE = "PYTORCH_ALLOC_CONF"
SETTING = "expandable_segments:True,per_process_memory_fraction:{:.6f}"
"""Segments grow as they do by default in parallel-tune's runs. torch knows the fraction since 2.10."""

SEEN_SECONDS = 120
PROGRAM = """
import torch
for card in range(torch.cuda.device_count()):
    total = torch.cuda.get_device_properties(card).total_memory
    try:
        torch.empty(total // 50, dtype=torch.uint8, device=f"cuda:{card}")
    except torch.OutOfMemoryError:
        print(total)
"""
"""Run with a hundredth of each card: says the bytes of those of which it gets no fiftieth."""


def tensor_bytes(device: Device, plan: Plan) -> int:
    """What the smaller card leaves for tensors: its free memory, less what the plan puts outside torch's allocator."""
    return device.free_bytes - max(planned.memory.context_bytes for planned in plan.devices)


def limited_to(num_bytes: int, total_bytes: int) -> dict[str, str]:
    """What to add to the environment of processes that shall have so much of each card.

    Args:
        total_bytes: of a card that is there, as torch counts it.
    """
    return {VARIABLE: SETTING.format(num_bytes / total_bytes)}


def limited_bytes(gpus: list[str], cache: str) -> int:
    """The memory of a card as torch counts it, when its allocator has been seen to keep to a share of each.

    Raises:
        SystemExit: it does not.
    """
    variables = environment(",".join(gpus), cache) | limited_to(1, 100)
    done = subprocess.run(
        bound([sys.executable, "-c", PROGRAM]),
        env=variables, capture_output=True, text=True, check=False, timeout=SEEN_SECONDS,
    )  # fmt: skip
    totals = [int(word) for word in done.stdout.split()] if done.returncode == 0 else []
    if len(totals) != len(gpus):
        said = f"{done.stdout}{done.stderr[-1500:]}"
        sys.exit(f"torch's allocator does not keep to {VARIABLE}={variables[VARIABLE]} on these cards: {said}")
    return min(totals)
