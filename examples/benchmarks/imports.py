"""What do garbage collections cost while a worker imports its libraries, and what do quantizers that it has no use for?
All ways in turn, each in a fresh process: with collections ("on"), without ("off"), without both ("lean").

python examples/benchmarks/imports.py [--repeat 7] [--engines transformers,unsloth] [--results FOLDER]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from running import Record, hardware_name

from parallel_tune.report import versions

WAYS = ("on", "off", "lean")
PROGRAM = """
import contextlib, gc, os, resource, sys, time
from parallel_tune.engines import open_engine
from parallel_tune.process import importing
from parallel_tune.unneeded import QUANTIZERS, leave_out
if sys.argv[2] == "lean":
    leave_out(QUANTIZERS)
began = time.monotonic()
with contextlib.nullcontext() if sys.argv[2] == "on" else importing():
    open_engine(sys.argv[1]).prepare()
    import parallel_tune.training
seconds = time.monotonic() - began
began = time.monotonic()
gc.collect()
later = time.monotonic() - began
print("row", seconds, later, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)
os._exit(0)
"""


def one_import(engine: str, collections: str) -> dict[str, Any]:
    """Seconds of the imports and of one full collection after them, and the process's largest size."""
    command = [sys.executable, "-P", "-c", PROGRAM, engine, collections]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    said = next(line for line in done.stderr.splitlines() if line.startswith("row "))
    seconds, later, size = map(float, said.split()[1:])
    return {
        "engine": engine, "collections": collections, "import_seconds": round(seconds, 3),
        "collection_seconds_after": round(later, 4), "resident_peak_bytes": int(size),
    }  # fmt: skip


def conclude(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and spread of each engine all ways, and the shares of the time that are spared."""
    figures: dict[str, Any] = {}
    for engine in dict.fromkeys(row["engine"] for row in rows):
        for collections in WAYS:
            chosen = [row for row in rows if (row["engine"], row["collections"]) == (engine, collections)]
            if not chosen:
                continue
            seconds = sorted(row["import_seconds"] for row in chosen)
            figures[f"{engine}_{collections}"] = {
                "import_seconds": statistics.median(seconds),
                "fastest_and_slowest_seconds": [seconds[0], seconds[-1]],
                "collection_seconds_after": statistics.median(row["collection_seconds_after"] for row in chosen),
                "resident_peak_bytes": int(statistics.median(row["resident_peak_bytes"] for row in chosen)),
            }
        if f"{engine}_off" in figures:
            ratio = figures[f"{engine}_off"]["import_seconds"] / figures[f"{engine}_on"]["import_seconds"]
            figures[f"{engine}_spared"] = round(1 - ratio, 3)
        if f"{engine}_lean" in figures:
            ratio = figures[f"{engine}_lean"]["import_seconds"] / figures[f"{engine}_off"]["import_seconds"]
            figures[f"{engine}_spared_by_lean"] = round(1 - ratio, 3)
    return figures


def main(arguments: list[str]) -> Path:
    """Run, print a line a row, and return the path of the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--engines", default="transformers")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    record = Record("imports", hardware_name(), options.results, arguments)
    for engine in options.engines.split(","):
        one_import(engine, "on")  # files read once, bytecode written
        for _ in range(options.repeat):
            for collections in WAYS if engine == "transformers" else WAYS[:2]:  # Unsloth needs both quantizers
                row = one_import(engine, collections)
                print(row, flush=True)
                record.add({**row, "versions": versions()}, conclude)
    print(record.content["figures"])
    return record.path


if __name__ == "__main__":
    main(sys.argv[1:])
