"""Whether a model's graph can be cut at its stages, found by running one micro-batch and looking."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from strategies.cuts import CannotCutError, Cuts, Passage, copies_on
from strategies.randomness import get_states, set_states
from strategies.stages import Stages


@dataclass(frozen=True)
class Finding:
    """What the probe saw.

    Attributes:
        reason: why the graph cannot be cut; None if it can.
        random_devices: devices whose random numbers the forward used.
    """

    reason: str | None
    random_devices: frozenset[torch.device]


def probe(stages: Stages, forward: Callable[[], Tensor]) -> Finding:
    """Run `forward` once with its graph cut, no backward, and see whether each stage's graph keeps to its own weights.

    Shared keys and values, per-layer inputs made from the embedding, or auxiliary losses of earlier stages' routers
    reach over a cut: their gradients would be lost or mixed up. Random generators are left as they were.
    """
    states = get_states(stages.devices)
    with torch.enable_grad():  # which the cuts go by, also where the run itself is without
        cuts = Cuts(stages, _HookCheck(_saved_tensor_hooks()))
    try:
        with stages.uncounted(), torch.enable_grad(), stages.carried_by(cuts):
            loss = forward()
        reason = None if cuts.stage == len(stages) - 1 else f"the forward ended in stage {cuts.stage}"
        reason = reason or _foreign_gradient(stages, cuts, loss)
    except CannotCutError as error:
        reason = error.message
    finally:
        after = get_states(stages.devices)
        set_states(states)
    used = frozenset(device for device in states if not torch.equal(states[device], after[device]))
    return Finding(reason, used)


def _saved_tensor_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


class _HookCheck(Passage):
    """A passage that looks whether saved-tensor hooks, as checkpoints have them, reach over a boundary."""

    def __init__(self, outside: Any) -> None:
        self._outside = outside

    def go(self, stage: int, backward: bool) -> None:
        if _saved_tensor_hooks() != self._outside:
            raise CannotCutError(
                f"stage {stage} begins under saved-tensor hooks: a checkpoint that spans several layers, or offloading"
            )

    def carry(self, tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        return copies_on(tensors, device)

    def arrive(self) -> None:
        """Nothing is timed."""


def _foreign_gradient(stages: Stages, cuts: Cuts, loss: Tensor) -> str | None:
    """The first gradient that would flow over a cut, in words."""
    owner = {id(p): (stage, name) for stage, owned in enumerate(stages.parameters) for name, p in owned.items()}
    visited: dict[Any, int] = {}
    last = len(stages) - 1
    for stage in range(len(stages)):
        roots = [loss] if stage == last else [source for source, _ in cuts.pairs[stage + 1]]
        for node in _nodes([torch.autograd.graph.get_gradient_edge(r).node for r in roots if r.requires_grad]):
            variable = getattr(node, "variable", None)
            if variable is None and visited.setdefault(node, stage) != stage:
                near = next((owner[id(n.variable)][1] for n in _nodes([node]) if _owned(n, owner)), "no weight")
                return f"stage {stage} uses a result of stage {visited[node]} past its inputs: {node.name()} on {near}"
            home, name = owner.get(id(variable), (stage, ""))
            if home != stage:
                return f"stage {stage} sends a gradient to {name} of stage {home}, past its inputs"
    return None


def _owned(node: Any, owner: Mapping[int, Any]) -> bool:
    return id(getattr(node, "variable", None)) in owner


def _nodes(starts: Sequence[Any]) -> Iterator[Any]:
    """All nodes of the graph behind `starts`, nearest first, each once."""
    waiting = deque(starts)
    seen: set[Any] = set()
    while waiting:
        node = waiting.popleft()
        if node not in seen:
            seen.add(node)  # which also keeps Python's object for it, hence its identity
            yield node
            waiting.extend(parent for parent, _ in node.next_functions if parent is not None)
