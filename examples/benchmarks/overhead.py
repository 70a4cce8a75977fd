"""What parallel-tune costs over a bare SFTTrainer script: the same model, rows, order and arrangement, both eager.

    python examples/benchmarks/overhead.py                        # Qwen3-1.7B shape on one GPU, both engines
    python examples/benchmarks/overhead.py --engines unsloth --repeat 3
    python examples/benchmarks/overhead.py --repeat 4 --cold_turns 4 --steps 8    # how much later a first run starts
    python examples/benchmarks/overhead.py --small                # a tiny model on the CPU

Both train in turn; bare goes first in the first turn, ours in the second, and so on. A step of ours is held against the
bare script's step on the same rows; the figure is the median of these ratios over all steps after the first few. The
first turns (--cold_turns) begin with empty caches and are the cold ones of the time to the first step, which counts
from the start of the command; the later ones are warm. Both losses are kept beside each other. Writes
results/overhead.HARDWARE.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))
from children import end_orderly  # noqa: E402
from ordering import write_in_order  # noqa: E402
from rows import make_rows  # noqa: E402
from running import (  # noqa: E402
    Record,
    add_common,
    apart,
    call,
    hardware_name,
    random_model,
    say,
    train,
    train_bare,
    tried,
    work_folder,
)

CHECKPOINTING = {"unsloth": "unsloth", "transformers": "none"}
"""What each engine's users have: Unsloth's own, and what transformers does unasked."""


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen3-1b")
    parser.add_argument("--model", type=Path, help="a folder that holds the shape already")
    parser.add_argument("--engines", default="unsloth,transformers")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--warm_up", type=int, default=6, help="steps of each run that do not count")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--cold_turns", type=int, default=1, help="so many turns begin with empty caches")
    parser.add_argument("--small", action="store_true")
    add_common(parser)
    return parser.parse_args(arguments)


def measure(
    folder: Path, options: argparse.Namespace, has: Callable[[str], bool] = lambda _: False
) -> Iterator[dict[str, Any]]:
    """All runs, in turn, but those that are there; one that fails gives a row that says so."""
    model = options.model or random_model(options.shape, folder / options.shape)
    length, samples = 512, options.batch * options.accumulation
    rows = make_rows(model, folder / "rows.jsonl", samples * options.steps)
    ordered = folder / "ordered.jsonl"
    write_in_order(model, rows, ordered, options.steps, options.batch, options.accumulation, length)
    optimizer = "adamw_torch" if options.small else "adamw_8bit"
    same = [f"--max_seq_length={length}", f"--optim={optimizer}", "--lr_scheduler_type=constant_with_warmup"]
    for engine, turn in product(options.engines.split(","), range(options.repeat)):
        sides = {side: f"{side}-{engine}-{turn}" for side in ("bare", "ours")}
        cold = turn < options.cold_turns
        if all(map(has, sides.values())):
            continue
        if turn == 0 and not options.small:
            # Once, so that the first to run does not read the libraries from the disk for the second one; pip compiles
            # packages as it installs them, ours among them, and a checkout's are compiled by their first import.
            say(f"{engine}: libraries are read")
            libraries = f"import {'unsloth, ' * (engine == 'unsloth')}trl, peft, datasets, parallel_tune.__main__"
            libraries += ", parallel_tune.commands, parallel_tune.decision, parallel_tune.live, parallel_tune.worker"
            with suppress(RuntimeError):  # the runs will say it
                call([sys.executable, "-c", libraries], folder, timeout=options.run_seconds)

        def bare(engine: str = engine, name: str = sides["bare"], cold: bool = cold) -> dict[str, Any]:
            found = train_bare(
                "bare_sft.py", model, ordered, options.steps, folder / f"{name}.json",
                f"--engine={engine}", f"--batch={options.batch}", f"--accumulation={options.accumulation}",
                f"--checkpointing={CHECKPOINTING[engine]}", "--in_order", "--padded", *same,
                folder=folder, environment=_caches(folder / f"caches-{engine}-bare", cold, options.small),
                timeout=options.run_seconds,
            )  # fmt: skip
            return {name: found[name] for name in ("seconds", "losses", "first_step_seconds")}

        def ours(engine: str = engine, name: str = sides["ours"], cold: bool = cold) -> dict[str, Any]:
            metrics, report = train(
                folder / name, model, rows, "--strategy=ddp", f"--engine={engine}", "--max_devices=1",
                f"--per_device_train_batch_size={options.batch}",
                f"--gradient_accumulation_steps={options.accumulation}", "--capture=off", "--padding_free=off",
                f"--use_gradient_checkpointing={CHECKPOINTING[engine]}", f"--max_steps={options.steps}",
                "--warmup_steps=5", *same, *(["--hardware=cpu:1"] if options.small else []),
                environment=_caches(folder / f"caches-{engine}-ours", cold, options.small),
                timeout=options.run_seconds,
            )  # fmt: skip
            return {
                "seconds": [row["seconds"] for row in metrics],
                "losses": [row["loss"] for row in metrics],
                "first_step_seconds": report["startup_seconds"]["total"],
                "startup_seconds": report["startup_seconds"],
                "versions": report["versions"],
            }

        for side, run in (("bare", bare), ("ours", ours))[:: 1 if turn % 2 == 0 else -1]:
            if not has(sides[side]):
                yield tried(sides[side], run, engine=engine, turn=turn)


def _caches(folder: Path, cold: bool, small: bool) -> dict[str, str]:
    """Variables that put all that is kept from run to run into a folder, empty for a cold start."""
    if cold:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    names = {
        "XDG_CACHE_HOME": "xdg",
        "HF_DATASETS_CACHE": "datasets",
        "TRITON_CACHE_DIR": "triton",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "UNSLOTH_COMPILE_LOCATION": "unsloth",
    }
    kept = {name: str(folder / place) for name, place in names.items()}
    # Threads of tiny matrix products only wait for each other.
    return {**kept, "OMP_NUM_THREADS": "1"} if small else kept


def figures(rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Overheads as shares, over all engines and each engine's own."""
    found: dict[str, Any] = {"overhead": None, "first_step_cold": None, "first_step_warm": None}
    for engine in options.engines.split(","):
        sides: dict[str, dict[int, dict[str, Any]]] = {"bare": {}, "ours": {}}
        for row in rows:
            if row["engine"] == engine and "failed" not in row:
                sides[row["what"].split("-")[0]][row["turn"]] = row
        turns = sorted(sides["bare"].keys() & sides["ours"].keys())
        pairs = [(sides["bare"][turn], sides["ours"][turn]) for turn in turns]
        if not pairs:
            continue
        steps = range(min(options.warm_up, options.steps - 1), options.steps)
        bare, ours = (
            [statistics.median(pair[side]["seconds"][step] for pair in pairs) for step in steps] for side in (0, 1)
        )
        starts = {
            turn: pair[1]["first_step_seconds"] / pair[0]["first_step_seconds"] - 1
            for turn, pair in zip(turns, pairs, strict=True)
        }
        cold = [share for turn, share in starts.items() if turn < options.cold_turns]
        warm = [share for turn, share in starts.items() if turn >= options.cold_turns]
        found |= {
            f"overhead_{engine}": statistics.median(b / a for a, b in zip(bare, ours, strict=True)) - 1,
            f"step_seconds_bare_{engine}": statistics.median(bare),
            f"step_seconds_ours_{engine}": statistics.median(ours),
            f"first_step_cold_{engine}": statistics.median(cold) if cold else None,
            f"first_step_cold_spread_{engine}": [min(cold), max(cold)] if cold else None,
            f"first_step_warm_{engine}": statistics.median(warm) if warm else None,
            f"losses_apart_{engine}": apart(pairs[0][1]["losses"], pairs[0][0]["losses"]),
        }
    for name in ("overhead", "first_step_cold", "first_step_warm"):
        known = [found[f"{name}_{engine}"] for engine in options.engines.split(",") if f"{name}_{engine}" in found]
        known = [value for value in known if value is not None]
        found[name] = max(known, default=None)
    return found


def main(arguments: list[str]) -> Path:
    """Run the benchmark; returns the file written."""
    options = parse(arguments)
    if options.small:
        options.shape = "tiny"
    record = Record("overhead", hardware_name(), options.results, arguments, options.go_on, shape=options.shape)
    with work_folder(options.work) as folder:
        for row in measure(folder, options, record.has):
            record.add(row, lambda rows: figures(rows, options))
            shown = {name: row[name] for name in row if name not in ("losses", "versions", "seconds")}
            print(json.dumps(shown), flush=True)
    print(json.dumps(record.content["figures"], indent=1))
    return record.path


if __name__ == "__main__":
    end_orderly()
    main(sys.argv[1:])
