"""What a model's split over several GPUs adds on each of them."""

from __future__ import annotations

from parallel_tune.memory.settings import MachineConstants
from strategies.contracts import Arrangement, Part

SPLIT_CONTEXT_BYTES = 118 << 20
LANES_CONTEXT_BYTES = 64 << 20
"""What the context of a process with several GPUs holds beyond that of a process with one, and with lanes on top.
Measured on two H200s (driver 580) in 2 and 18 eager runs, which agree to the MiB; so these are no test of it. Captured
runs hold no more than GRAPHS_CONTEXT_BYTES."""


def split_context_bytes(part: Part, arrangement: Arrangement) -> int:
    """Outside the tensor allocator, on a GPU that holds `part`."""
    if (part.embedding and part.head) or arrangement.captured:
        return 0
    return SPLIT_CONTEXT_BYTES + (LANES_CONTEXT_BYTES if arrangement.lanes > 1 else 0)


def lane_workspace_bytes(constants: MachineConstants, arrangement: Arrangement) -> int:
    """cuBLAS workspaces of the lanes' threads, one each; those measured are two, an only thread's and autograd's."""
    if arrangement.lanes == 1 or arrangement.captured:
        return 0
    return arrangement.lanes * constants.workspace_bytes // 2
