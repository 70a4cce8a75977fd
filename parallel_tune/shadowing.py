"""Whether another package named `strategies` would be imported in place of ours."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def find_shadow() -> Path | None:
    """The folder of a package `strategies` that would be imported instead of ours; it is not imported here."""
    spec = importlib.util.find_spec("strategies")
    found = [Path(place).resolve() for place in (spec.submodule_search_locations or [])] if spec else []
    ours = Path(__file__).resolve().parent.parent / "strategies"
    if not found:
        return Path(spec.origin) if spec and spec.origin else None
    return None if ours in found[:1] else found[0]
