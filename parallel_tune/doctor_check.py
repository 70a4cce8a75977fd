"""One thing that `parallel-tune doctor` looked at, and what it says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GIB = 2**30
INSTALL = "pip install -c constraints.txt ."

State = Literal["ok", "note", "warning", "problem"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        state: "ok"; "note", which only informs; "warning", with which a run starts; "problem", with which none does.
        said: what was found.
        hint: what to do about it; empty where there is nothing to do.
    """

    name: str
    state: State
    said: str
    hint: str = ""
