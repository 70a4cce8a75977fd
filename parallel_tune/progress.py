"""How far a run is, from the rows of metrics.jsonl as they are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECENT_ROWS = 20
"""Rows over which speed is averaged."""


class MetricsFollower:
    """Reads what is added to a metrics file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = path.stat().st_size if path.exists() else 0

    def poll(self) -> list[dict[str, Any]]:
        """The rows that were added since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                added = file.read()
        except OSError:
            return []
        complete, newline, _ = added.rpartition(b"\n")
        self._position += len(complete + newline)
        rows = []
        for line in complete.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # torn when its writer died
            if isinstance(row, dict):
                rows.append(row)
        return rows


class Progress:
    """Sums up rows: where the run is, how fast, and how long it still takes."""

    def __init__(self, global_batch: int) -> None:
        self._global_batch = global_batch
        self._recent: list[tuple[int, int, float]] = []
        self.step = 0
        self.max_steps = 0
        self.epoch = 0.0
        self.learning_rate = 0.0
        self.losses: list[float] = []
        self.held_out: float | None = None

    def add(self, row: dict[str, Any]) -> None:
        """Take in one row."""
        if "eval_loss" in row:
            self.held_out = float(row["eval_loss"])
            return
        self.step, self.max_steps = int(row["step"]), int(row["max_steps"])
        self.epoch = float(row.get("epoch") or 0.0)
        self.learning_rate = float(row.get("learning_rate") or 0.0)
        self.losses.append(float(row["loss"]))
        steps = steps_of(row, self._global_batch)
        self._recent = [*self._recent[1 - RECENT_ROWS :], (steps, int(row["tokens"]), float(row["seconds"]))]

    @property
    def tokens_per_second(self) -> float:
        seconds = sum(seconds for _, _, seconds in self._recent)
        return sum(tokens for _, tokens, _ in self._recent) / seconds if seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float:
        steps = sum(steps for steps, _, _ in self._recent)
        seconds = sum(seconds for _, _, seconds in self._recent)
        return (self.max_steps - self.step) * seconds / steps if steps else 0.0


def steps_of(row: dict[str, Any], global_batch: int) -> int:
    """Optimizer steps that a row stands for: with `logging_steps` above 1 it is several."""
    return max(1, round(int(row["samples"]) / global_batch))


def duration(seconds: float) -> str:
    """Minutes and seconds, or hours and minutes."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60}h{minutes % 60:02d}"
