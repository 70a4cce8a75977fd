"""Strategies as a third party would write them: the built-in two, whose sessions note what they see.

Each rank leaves `rank-K.json` in the folder NOTES: the rows of each forward pass in training, a digest of the trained
weights, and the crossings of each boundary. FAULT=ACTION:RANK:PASS makes a rank raise, kill itself, or hold (until the
file `go` is there) just before that training pass, counted from 1; hold_evaluation once, in the first evaluation after
that pass; or linger for ever after all its work is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from parallel_tune.unneeded import QUANTIZERS, leave_out
from strategies.contracts import Plan
from strategies.ddp import DDP
from strategies.model_parallel import ModelParallel
from strategies.sessions import ReplicaSession, SplitSession, open_replica


class Notes:
    """What one rank saw."""

    def __init__(self, rank: int) -> None:
        self.folder = Path(os.environ["NOTES"])
        self.rank = rank
        self.passes: list[list[list[int]]] = []

    def follow(self, model: Any) -> None:
        self.model = model
        model.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if model.training:
            self.passes.append(rows_of(kwargs))
        self._fault(model.training)

    def _fault(self, training: bool) -> None:
        action, rank, number = os.environ.get("FAULT", ":-1:0").split(":")
        if (int(rank), int(number)) != (self.rank, len(self.passes)) or training == (action == "hold_evaluation"):
            return
        if action == "raise":
            raise ArithmeticError("the third party's fault")
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        (self.folder / "held").touch()
        while not (self.folder / "go").exists():
            time.sleep(0.02)

    def write(self, crossings: list[Any]) -> None:
        digest = hashlib.sha256()
        for parameter in self.model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        seen = {"passes": self.passes, "weights": digest.hexdigest(), "crossings": [asdict(c) for c in crossings]}
        (self.folder / f"rank-{self.rank}.json").write_text(json.dumps(seen))


def rows_of(batch: dict[str, Any]) -> list[list[int]]:
    """Token ids of each row of a batch, padded or joined."""
    if "attention_mask" in batch:
        pairs = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
        return [ids[: sum(mask)] for ids, mask in pairs]
    (ids,), (positions,) = batch["input_ids"].tolist(), batch["position_ids"].tolist()
    starts = [place for place, position in enumerate(positions) if position == 0]
    return [ids[start:end] for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]


class NotedReplica(ReplicaSession):
    """A session of ddp that takes notes."""

    def place(self, model: Any) -> None:
        super().place(model)
        self.notes = Notes(self.rank)
        self.notes.follow(model)

    def close(self) -> None:
        self.notes.write([])
        while os.environ.get("FAULT", "").startswith(f"linger:{self.rank}:"):
            time.sleep(1)
        super().close()


class NotedStages(SplitSession):
    """A session of model_parallel that takes notes."""

    def place(self, model: Any) -> None:
        super().place(model)
        self.notes = Notes(self.rank)
        self.notes.follow(model)

    def close(self) -> None:
        self.notes.write(self._stages.crossings if self._stages else [])
        super().close()


class NotedDDP(DDP):
    """ddp with notes."""

    name = "noted_ddp"
    auto_order = 110

    def open(self, plan: Plan, timeout_seconds: int) -> NotedReplica:
        leave_out(QUANTIZERS)  # a built-in strategy's runs do without them too; importing them takes seconds
        open_replica(plan, timeout_seconds)
        return NotedReplica(plan)


class NotedSplit(ModelParallel):
    """model_parallel with notes."""

    name = "noted_split"
    auto_order = 120

    def open(self, plan: Plan, timeout_seconds: int) -> NotedStages:
        leave_out(QUANTIZERS)
        return NotedStages(plan)
