"""Do runs survive faults? Processes are killed, stopped and asked to end at random; what resumes must train the same.

    python examples/benchmarks/soak.py --minutes 20              # this machine's GPUs, a Llama of 1.2B
    python examples/benchmarks/soak.py --small --minutes 20      # two virtual devices, a tiny model in float32

Each kind of run is trained once without a fault. It is then begun again and harmed at a random moment of its course,
its start included, up to a few times: `resume` goes on, at times by the other strategy. A run that was harmed before
its first checkpoint begins again. At its end the losses of all steps and the trained weights are held against those of
the undisturbed run. Writes results/soak.HARDWARE.json beside this file.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))
from children import bound, end, end_orderly, naming  # noqa: E402
from rows import make_rows  # noqa: E402
from running import QUIET, Record, add_common, hardware_name, random_model, say, work_folder  # noqa: E402
from soak_faults import FAULTS, STOPPED_SECONDS  # noqa: E402

WAYS: dict[str, tuple[str, ...]] = {
    "ddp": ("--strategy=ddp",),
    "split": ("--strategy=model_parallel", "--pipeline=on"),
    "full": ("--strategy=ddp", "--full_finetuning", "--learning_rate=1e-3"),
}
OTHER = {"ddp": "model_parallel", "split": "ddp", "full": "model_parallel"}
OTHERWISE = 0.25
"""Share of resumes that go on by the other strategy."""
LEAVING_SECONDS = 30
"""In which all processes of a run that has ended must be gone."""
NO_CHECKPOINT, CODES = 2, (0, 1, 75, -1, -9, -15)
"""Exit codes: of a resume without a checkpoint; those of a harmed run, negative where a signal ended the command
itself, which it does before there is a run to stop in order."""
NOTHING = "none: nothing to harm yet, or any more"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--ways", default=",".join(WAYS), help="of: " + ", ".join(WAYS))
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--save_steps", type=int, default=20)
    parser.add_argument("--most_faults", type=int, default=4, help="in one run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--small", action="store_true")
    add_common(parser)
    return parser.parse_args(arguments)


class Soak:
    """The model, the rows, and the settings that all runs share."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        self.options = options
        model = random_model("tiny" if options.small else "llama-1b", folder / "model")
        rows = make_rows(model, folder / "rows.jsonl", 6 * options.steps)
        self._settings = [
            f"--model={model}", f"--dataset={rows}", "--global_batch_size=6", f"--max_steps={options.steps}",
            "--max_seq_length=256", f"--save_steps={options.save_steps}", "--save_total_limit=3", "--report_to=none",
            "--learning_rate=1e-3", "--max_devices=2",
            *(["--hardware=cpu:2", "--dtype=float32"] if options.small else []),
        ]  # fmt: skip

    def emptied(self, name: str) -> Path:
        """The place of a run, without what an earlier call of this benchmark left there."""
        run = self.folder / name
        shutil.rmtree(run, ignore_errors=True)
        run.with_suffix(".log").unlink(missing_ok=True)
        return run

    def command(self, run: Path, way: str) -> list[str]:
        """What begins a run of this kind."""
        return [*PROGRAM, *self._settings, *WAYS[way], f"--output_dir={run}"]

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[Any]:
        with log.open("a") as file:
            return subprocess.Popen(
                bound(command), env={**os.environ, **QUIET, **({"OMP_NUM_THREADS": "1"} if self.options.small else {})},
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip

    def ended(self, process: subprocess.Popen[Any]) -> int | None:
        """The exit code; None for one that hung, which is ended."""
        try:
            return process.wait(self.options.run_seconds)
        except subprocess.TimeoutExpired:
            end(process)
            return None


PROGRAM = (sys.executable, "-P", "-m", "parallel_tune")


def harmed(soak: Soak, whole: Path, way: str, number: int, seconds: float, draw: random.Random) -> dict[str, Any]:
    """One run with its faults, to its end; a row of the record."""
    run = soak.emptied(f"run-{number}")
    log = run.with_suffix(".log")
    began = time.monotonic()
    faults: list[dict[str, Any]] = []
    row: dict[str, Any] = {"what": f"run-{number}", "way": way, "faults": faults, "hung": 0, "left_processes": 0}
    most = draw.randint(1, soak.options.most_faults)
    command = soak.command(run, way)
    while True:
        process = soak.start(command, log)
        due = len(faults) < most
        if due:
            faults.append(fault(process, run, seconds, draw))
        code = soak.ended(process)
        if due:
            faults[-1]["code"] = code
        row["hung"] += code is None
        row["left_processes"] += still_there(run)
        if code == 0:
            break
        if code == NO_CHECKPOINT and "resume" in command:
            if due:
                faults.pop()
            faults[-1]["goes_on"] = "from the beginning"
            shutil.rmtree(run, ignore_errors=True)
            command = soak.command(run, way)
            continue
        if code not in CODES or not due:
            return {**row, "failed": f"ended with {code}: {log.read_text()[-1500:]}"}
        otherwise = [f"--strategy={OTHER[way]}"] if draw.random() < OTHERWISE else []
        faults[-1]["goes_on"] = otherwise[0] if otherwise else "as planned"
        command = [*PROGRAM, "resume", str(run), *otherwise]
    return {**row, "seconds": time.monotonic() - began, **held_against(run, whole)}


def fault(process: subprocess.Popen[Any], run: Path, seconds: float, draw: random.Random) -> dict[str, Any]:
    """Harm a run at a random moment of its course, unless it has ended before; what was done."""
    kind, after = draw.choice(list(FAULTS)), draw.uniform(0.0, seconds)
    deadline = time.monotonic() + after
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    done = process.poll() is None and FAULTS[kind](process, run, draw)
    return {"kind": kind if done else NOTHING, "after_seconds": after}


def still_there(run: Path) -> int:
    """Processes of an ended run that do not go away; they are ended here."""
    deadline = time.monotonic() + LEAVING_SECONDS
    while (pids := naming(run)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in pids:
        os.kill(pid, 9)
    return len(pids)


def held_against(run: Path, whole: Path) -> dict[str, Any]:
    """How far a finished run's losses and weights lie from those of the undisturbed one."""
    from safetensors.torch import load_file

    from parallel_tune.rundir import RunDir, read_metrics

    losses, expected = (
        {row["step"]: row["loss"] for row in read_metrics(RunDir(path)) if "loss" in row} for path in (run, whole)
    )
    if losses.keys() != expected.keys():
        return {"failed": f"steps {sorted(losses.keys() ^ expected.keys())} are in one of the two runs alone"}
    differences = []
    for path in sorted(whole.glob("[am]*/*.safetensors")):
        weights, others = load_file(run / path.relative_to(whole)), load_file(path)
        differences += [
            float((weights[name].double() - other.double()).norm() / other.double().norm().clamp_min(1e-12))
            for name, other in others.items()
        ]
    return {
        "steps": len(losses),
        "losses_apart": max(abs(losses[step] / loss - 1) for step, loss in expected.items()),
        "weights_apart": max(differences),
        "temporary_files": [str(path.relative_to(run)) for path in run.rglob(".*.part")],
    }


def measure(soak: Soak) -> Iterator[dict[str, Any]]:
    """The undisturbed runs, then harmed ones until the time is over."""
    ways = soak.options.ways.split(",")
    draw = random.Random(soak.options.seed)
    wholes: dict[str, tuple[Path, float]] = {}
    if unknown := set(ways) - WAYS.keys():
        raise SystemExit(f"--ways: {', '.join(sorted(unknown))} is none of {', '.join(WAYS)}")
    for way in ways:
        run = soak.emptied(f"whole-{way}")
        say(f"{way}: undisturbed")
        began = time.monotonic()
        code = soak.ended(soak.start(soak.command(run, way), run.with_suffix(".log")))
        if code != 0:
            raise RuntimeError(f"the undisturbed run ended with {code}: {run.with_suffix('.log').read_text()[-3000:]}")
        wholes[way] = run, time.monotonic() - began
    deadline = time.monotonic() + 60 * soak.options.minutes
    for number in count():
        way = ways[number % len(ways)]
        yield harmed(soak, wholes[way][0], way, number, wholes[way][1], draw)
        shutil.rmtree(soak.folder / f"run-{number}", ignore_errors=True)
        if time.monotonic() > deadline:
            return


def figures(rows: list[dict[str, Any]], minutes: float, tolerance: float) -> dict[str, Any]:
    """What comes out of all runs."""
    good = [row for row in rows if "failed" not in row]
    faults = [fault for row in good for fault in row["faults"] if fault["kind"] != NOTHING]
    return {
        "minutes": minutes,
        "runs": len(rows),
        "failed": len(rows) - len(good),
        "faults_survived": len(faults),
        "by_kind": {kind: sum(fault["kind"] == kind for fault in faults) for kind in FAULTS},
        "went_on_by_the_other_strategy": sum("--strategy" in fault.get("goes_on", "") for fault in faults),
        "losses_apart": max((row["losses_apart"] for row in good), default=None),
        "weights_apart": max((row["weights_apart"] for row in good), default=None),
        "losses_equal": len(good) == len(rows) and all(row["losses_apart"] <= tolerance for row in good),
        "tolerance": tolerance,
        "hung": sum(row["hung"] for row in rows),
        "left_processes": sum(row["left_processes"] for row in rows),
        "temporary_files": sum(len(row["temporary_files"]) for row in good),
    }


def main(arguments: list[str]) -> Path:
    """Run the benchmark; returns the file written."""
    from parallel_tune.report import versions

    options = parse(arguments)
    hardware = "cpu" if options.small else hardware_name(2)
    record = Record("soak", hardware, options.results, arguments, stopped_seconds=STOPPED_SECONDS)
    # Float32 on a CPU adds up in the same order; bfloat16 on a GPU rounds in another one each time.
    tolerance = 1e-5 if options.small else 2e-2
    with work_folder(options.work) as folder:
        began = time.monotonic()
        for row in measure(Soak(folder, options)):
            minutes = round((time.monotonic() - began) / 60, 1)
            record.add({**row, "versions": versions()}, lambda rows, minutes=minutes: figures(rows, minutes, tolerance))
            say(f"{row['what']}, {row['way']}: {row.get('failed') or row['losses_apart']} {row['faults']}")
    print({name: value for name, value in record.content["figures"].items() if name != "by_kind"})
    return record.path


if __name__ == "__main__":
    end_orderly()
    main(sys.argv[1:])
