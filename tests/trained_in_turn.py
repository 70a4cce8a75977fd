"""Several runs, one after the other in the same processes: their libraries are imported once.

python trained_in_turn.py RUN_DIRECTORY...
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from parallel_tune.process import die_with_parent, leave, redirect_output
from parallel_tune.rundir import RunDir
from parallel_tune.worker import train


def main(folders: list[str]) -> NoReturn:
    """Train as each run directory says. Never returns."""
    die_with_parent()
    held = []
    for run in (RunDir(Path(folder)) for folder in folders):
        redirect_output(run.log(int(os.environ.get("RANK", "0"))))
        os.environ.pop("TENSORBOARD_LOGGING_DIR", None)  # the run before has set it to a folder of its own
        held.append(train(run, None))
    leave(0)


if __name__ == "__main__":
    main(sys.argv[1:])
