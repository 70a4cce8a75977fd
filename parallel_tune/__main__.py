"""`python -m parallel_tune`, and the start of the command `parallel-tune`."""

from __future__ import annotations

import sys
from pathlib import Path

from parallel_tune.shadowing import find_shadow


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


if __name__ == "__main__":
    main()
