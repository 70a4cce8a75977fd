"""Where the time goes between the command and the end of its first training step.

Clocks of different processes are compared, so all is in seconds of the machine's monotonic clock.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

CLOCKS = "PARALLEL_TUNE_CLOCKS"
"""Environment variable of a worker: when its command began, and when that started the processes."""

PHASES = {
    "plan": "plan",
    "launch": "start processes",
    "import": "import",
    "load": "load the model",
    "data": "data",
    "prepare": "prepare",
    "evaluate": "evaluate",
    "first_step": "first step",
}
"""Phases in their order, and their names for people.

plan: the command, until it starts processes. launch: until each runs. import: libraries, and joining the others.
load: the model and its adapters. data: reading and encoding, or taking what is kept. prepare: checks of joined rows and
of captured steps, and the trainer. evaluate: held-out rows before training. first_step: with all that is compiled or
made in it.
"""


def process_began() -> float:
    """When this process was started; now, where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        age = 0.0
    return time.monotonic() - max(0.0, age)


def clocks(began: float) -> dict[str, str]:
    """What tells a worker started now when its command began."""
    return {CLOCKS: f"{began!r} {time.monotonic()!r}"}


class Startup:
    """Times the phases of one worker's start, until its first step is done."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Begin in a worker; one that another program started counts from its own process's start."""
        self.seconds: dict[str, float] = {}
        self.done = False
        try:
            began, launched = map(float, environ.get(CLOCKS, "").split())
            self._last = began
            self._add("plan", launched)
            self.mark("launch")
        except ValueError:
            self._last = process_began()
            self.mark("plan")

    def mark(self, phase: str) -> None:
        """What lay between the last mark and now was this phase."""
        self._add(phase, time.monotonic())

    def finish(self) -> None:
        """The first step is done."""
        if not self.done:
            self.mark("first_step")
            self.done = True

    def report(self) -> dict[str, float]:
        """Seconds of each phase in order, and in all."""
        phases = {name: self.seconds[name] for name in PHASES if name in self.seconds}
        return {**phases, "total": sum(phases.values())}

    def _add(self, phase: str, until: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + max(0.0, until - self._last)
        self._last = until


def startup_line(seconds: Mapping[str, float]) -> str:
    """One line for people, e.g. "first step done after 9.1 s: plan 2.0, import 4.1, ..."."""
    parts = ", ".join(f"{PHASES[name]} {seconds[name]:.1f}" for name in PHASES if name in seconds)
    return f"first step done after {seconds['total']:.1f} s: {parts}"
