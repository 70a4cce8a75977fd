"""`python -m parallel_tune`, and the start of the command `parallel-tune`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def main() -> None:
    """Run the program, unless another package would take the place of one of ours."""
    shadow = find_shadow()
    if shadow is not None:
        expected = Path(__file__).resolve().parent.parent / "strategies"
        print(
            f"parallel-tune: another package named strategies, {shadow}, shadows the one of parallel-tune, {expected}\n"
            "Start parallel-tune from another folder (or with PYTHONSAFEPATH=1), or take that one off PYTHONPATH.",
            file=sys.stderr,
        )
        sys.exit(2)
    from parallel_tune.cli import main as run

    run()


def find_shadow() -> Path | None:
    """The folder of a package `strategies` that would be imported instead of ours; it is not imported here."""
    spec = importlib.util.find_spec("strategies")
    found = [Path(place).resolve() for place in (spec.submodule_search_locations or [])] if spec else []
    ours = Path(__file__).resolve().parent.parent / "strategies"
    if not found:
        return Path(spec.origin) if spec and spec.origin else None
    return None if ours in found[:1] else found[0]


if __name__ == "__main__":
    main()
