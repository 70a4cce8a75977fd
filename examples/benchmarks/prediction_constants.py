"""The card's constants for rows that run side by side: measured once, with nothing else on the card."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

from prediction_process import environment, outcome, start
from prediction_watch import ProcessMemory
from shapes import SHAPES

SHAPE = "qwen2-1.5b"
MEASURING_SECONDS = 300
PROGRAM = (sys.executable, "-m", "parallel_tune")
KEPT = Path("parallel-tune") / "constants"
TAUGHT = (Path("parallel-tune") / "corrections", Path("parallel-tune") / "stages")


def measured_constants(folder: Path, gpu: str, program: tuple[str, ...] = PROGRAM, nvml: Any = None) -> Path:
    """A cache folder that has the card's constants; measured unless they are there.

    The measuring process also shows whether NVML tells what a process holds, which rows side by side are scored by.

    Raises:
        SystemExit: it does not, or the measurement failed.
    """
    if any((folder / KEPT).glob("*.json")):
        return folder
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    kind, sizes = SHAPES[SHAPE]
    (model / "config.json").write_text(json.dumps({"model_type": kind, **sizes}))
    process = start([*program, "plan", "--measure", "--model", str(model)], environment(gpu, str(folder)))
    with ProcessMemory(gpu, nvml, process.pid) as watched:
        code, output = outcome(process, MEASURING_SECONDS, threading.Event())
    if code != 0 or not any((folder / KEPT).glob("*.json")):
        sys.exit(f"The card's constants could not be measured (exit code {code}): {output[-1500:]}")
    if watched.peak_bytes is None:
        shutil.rmtree(folder)  # else the next command would take the constants for proof
        sys.exit(
            "--jobs needs to know what each process holds on the card, and NVML does not say so here: it hides the "
            "processes, or numbers them as the host does. Leave --jobs out: rows then run one after the other."
        )
    return folder


def prepare_cache(cache: Path, constants: Path | None) -> None:
    """Make a row's cache folder: with constants that were measured before, if any, and without what earlier rows
    taught, which must not decide whether this one is run."""
    for name in TAUGHT:
        shutil.rmtree(cache / name, ignore_errors=True)
    if constants is not None:
        shutil.copytree(constants / KEPT, cache / KEPT, dirs_exist_ok=True)
