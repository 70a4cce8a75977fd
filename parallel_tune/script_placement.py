"""Where this process stands in a launch, for a script that wants to follow the plan.

Reads the plan's file and the launcher's variables only: it runs inside a user's script, where `strategies` may be the
user's own package, and imports neither that nor torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLAN_VARIABLE = "PARALLEL_TUNE_PLAN"
"""Names the plan.json that `parallel-tune launch` wrote."""


@dataclass(frozen=True)
class Placement:
    """One process of a launch.

    Attributes:
        strategy: "ddp", "model_parallel", or "none" for a plain process.
        rank: this process's number among all of them.
        local_rank: its number on this machine, which is its GPU.
        device_map: what to give `from_pretrained`; None where the model needs none (on a CPU, or without a launch).
        micro_batch: the planned per_device_train_batch_size; None where nothing was planned.
        gradient_accumulation_steps: as planned; None where nothing was planned.
    """

    strategy: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device_map: dict[str, int] | None = None
    micro_batch: int | None = None
    gradient_accumulation_steps: int | None = None


def placement() -> Placement:
    """This process's place in the plan of `parallel-tune launch`; outside a launch, that of a plain process.

    Raises:
        RuntimeError: the plan that the environment names cannot be read.
    """
    path = os.environ.get(PLAN_VARIABLE)
    plan = _read(Path(path)) if path else {}
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return Placement(
        strategy=plan.get("strategy", "ddp" if world_size > 1 else "none"),
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        device_map=device_map(plan, local_rank),
        micro_batch=plan.get("micro_batch"),
        gradient_accumulation_steps=plan.get("gradient_accumulation_steps"),
    )


def device_map(plan: Mapping[str, Any], local_rank: int) -> dict[str, int] | None:
    """The map that a process loads its model with: the plan's devices are the visible ones, in the plan's order."""
    devices = plan.get("devices", [])
    if not devices or devices[0]["kind"] != "cuda":
        return None
    if plan["strategy"] != "model_parallel":
        return {"": local_rank}
    position = {device["index"]: place for place, device in enumerate(devices)}
    return {name: position[index] for name, index in plan["device_map"].items()} or None


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RuntimeError(f"{PLAN_VARIABLE}={path} cannot be read: {error}. Unset it, or launch again.") from error
