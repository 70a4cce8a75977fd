"""`parallel-tune bench`: plan each arm, run all in turn, and keep what was measured after each run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from parallel_tune import refusal
from parallel_tune.bench.arms import Arm, make_arm, runnable, shared_config, wanted_names
from parallel_tune.bench.reference import WORDS, reference_argv, run_reference
from parallel_tune.bench.running import Interrupted, run_arm
from parallel_tune.bench.summary import Measured, ReferenceMeasured, arm_figures, compare, reference_figures
from parallel_tune.bench.view import text_table, write_views
from parallel_tune.bench.work import Work, lay_out
from parallel_tune.config import TrainConfig
from parallel_tune.data.loading import local_files
from parallel_tune.decision import find_hardware
from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.lookup import load_model_facts
from parallel_tune.needs import check_needs
from parallel_tune.plan_view import headline
from parallel_tune.report import versions
from parallel_tune.reporting.pictures import have_matplotlib
from parallel_tune.rundir import new_folder, write_atomically
from parallel_tune.watcher import stop_signals
from strategies.contracts import Hardware
from strategies.errors import ConfigError, NoStrategyFits, ParallelTuneError, RunFailed, StrategiesCombined


@dataclass(frozen=True)
class Request:
    """What was asked for beside the training options.

    Attributes:
        steps: optimizer steps of each run.
        skipped: steps at the beginning that do not count; None for a quarter, at least two.
        repeat: runs of each arm, all arms in turn.
        strategies: comma-separated names of arms; None for all.
        reference: a command line to run beside ours.
    """

    steps: int = 20
    skipped: int | None = None
    repeat: int = 3
    strategies: str | None = None
    reference: str | None = None

    @property
    def num_skipped(self) -> int:
        return max(2, self.steps // 4) if self.skipped is None else self.skipped

    def check(self) -> None:
        """Refuse numbers that leave nothing to measure.

        Raises:
            ConfigError: too few steps or repetitions.
        """
        if self.repeat < 1:
            raise ConfigError(f"--repeat {self.repeat} measures nothing", "Give 1 or more; 3 show the spread.")
        if self.num_skipped < 1:
            # The first step compiles, loads kernels and fills caches: it says nothing of the others.
            raise ConfigError(f"--skip_steps {self.num_skipped}: the first step is never typical", "Give 1 or more.")
        if self.steps <= self.num_skipped:
            raise ConfigError(
                f"--steps {self.steps} leaves no step to count, since the first {self.num_skipped} are skipped",
                f"Give --steps {self.num_skipped + 10} or so.",
            )


class Bench:
    """One benchmark: what was asked for, and what has been measured so far."""

    def __init__(
        self, config: TrainConfig, request: Request, hardware: Hardware, arms: list[Arm], work: Work, folder: Path
    ) -> None:
        assert config.global_batch_size is not None
        self._config = config
        self._samples = config.global_batch_size
        self._request = request
        self._hardware = hardware
        self._facts: ModelFacts = load_model_facts(config.model)
        self._arms = arms
        self._work = work
        self._folder = folder
        self._measured = [Measured(arm) for arm in runnable(arms)]
        self._reference = ReferenceMeasured(request.reference) if request.reference else None
        self._turns = 0

    def run(self) -> None:
        """All repetitions, each of all arms in turn, so that what drifts on a machine meets all alike.

        Raises:
            Interrupted: a signal ended it.
        """
        for turn in range(1, self._request.repeat + 1):
            for measured in self._measured:
                if not measured.failed:
                    self._run_arm(measured, turn)
            if self._reference is not None and not self._reference.failed:
                self._run_reference(self._reference, turn)
            self._turns = turn
        self.write()

    def _run_arm(self, measured: Measured, turn: int) -> None:
        folder = self._folder / "runs" / f"{measured.arm.name}-{turn}"
        try:
            run = run_arm(measured.arm, self._request.steps, self._request.num_skipped, folder)
        except Interrupted:
            raise
        except ParallelTuneError as error:
            measured.failed = error.message
            click.echo(f"run {turn} of {measured.arm.label} failed: {error.message}\n{error.hint}", err=True)
        else:
            measured.runs.append(run)
            click.echo(f"run {turn} of {measured.arm.label}: {run.tokens_per_second:,.0f} tokens/s")
        self.write()

    def _run_reference(self, reference: ReferenceMeasured, turn: int) -> None:
        result, log = self._folder / f"reference-{turn}.json", self._folder / "reference.log"
        words = {
            "model": _absolute(self._config.model), "rows": self._work.rows, "steps": self._request.steps,
            "global_batch": self._samples, "max_seq_length": self._config.max_seq_length, "result": result,
        }  # fmt: skip
        argv = reference_argv(reference.command, words)
        try:
            run = run_reference(argv, result, log, self._work, self._samples, self._request.num_skipped)
        except Interrupted:
            raise
        except ParallelTuneError as error:
            reference.failed = error.message
            click.echo(f"run {turn} of the reference failed: {error.message}\n{error.hint}", err=True)
        else:
            reference.runs.append(run)
            speed = f"{run.timed.tokens_per_second:,.0f} tokens/s" if run.timed else f"{run.whole_seconds:.1f} s in all"
            click.echo(f"run {turn} of the reference: {speed}")
        self.write()

    def results(self) -> dict[str, Any]:
        """All that is known so far."""
        ran = [item for item in self._measured if item.runs]
        arms = [arm_figures(item, self._facts, self._hardware, self._work) for item in ran]
        reference = None
        if self._reference is not None:
            reference = reference_figures(self._reference, self._work, self._samples)
        compare(arms, reference)
        not_run = [{"name": arm.name, "label": arm.label, "reason": arm.reason} for arm in self._arms if not arm.plan]
        not_run += [
            {"name": item.arm.name, "label": item.arm.label, "reason": f"it failed: {item.failed}"}
            for item in self._measured
            if item.failed and not item.runs
        ]
        counted = Counter(device.name for device in self._hardware.devices)
        return {
            "name": "bench",
            "hardware": ", ".join(f"{number} x {name}" for name, number in counted.items()),
            "on_cpu": self._hardware.kind == "cpu",
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "versions": versions(),
            "model": self._config.model,
            "data": self._config.data_source,
            "global_batch": self._samples,
            "steps": self._request.steps,
            "skipped": self._request.num_skipped,
            "repeat": self._request.repeat,
            "turns": self._turns,
            "finished": self._turns == self._request.repeat,
            "tokens": self._work.tokens,
            "arms": arms,
            "reference": reference,
            "not_run": not_run,
        }

    def write(self) -> None:
        """Keep what was measured so far, so that nothing that comes can take it away."""
        write_atomically(self._folder / "bench.json", json.dumps(self.results(), indent=1))

    @property
    def failures(self) -> int:
        """How many of what was to be run failed."""
        failed = [bool(item.failed) for item in self._measured]
        return sum(failed) + bool(self._reference and self._reference.failed)


def bench(config: TrainConfig, request: Request) -> None:
    """Compare, print the table, and write bench.json, bench.html and bench.png.

    Raises:
        ConfigError: settings are wrong, or there are too few steps.
        StrategiesCombined: it was started under a launcher.
        NoStrategyFits: nothing of what was asked for can be run.
        RunFailed: something failed, or a signal ended it; what was measured is on disk.
    """
    request.check()
    launch = refusal.find_launch(os.environ)
    if launch is not None and launch.world_size > 1:
        raise StrategiesCombined(
            f"bench starts its processes itself, and {launch.launcher} has started {launch.world_size} already",
            "Run `parallel-tune bench` by itself.",
        )
    if request.reference is not None:
        reference_argv(request.reference, dict.fromkeys(WORDS, ""))  # before hours are spent
    names = wanted_names(request.strategies, config.strategy)
    hardware = find_hardware(config)
    # What is wrong with the model or the data is wrong for all arms, and is better said once.
    load_model_facts(config.model)
    if config.raw_text is None:
        local_files(config.dataset, config.dataset_split, config.dataset_config)
    folder = _make_folder(config)
    if config.gradient_accumulation_steps is not None:
        click.echo("accumulation steps follow from the global batch and the processes of each strategy")
    config = shared_config(config, min(len(hardware.devices), config.max_devices or len(hardware.devices)))
    check_needs(config)
    arms = []
    for name in names:
        arm = make_arm(name, config, hardware)
        arms.append(arm)
        for line in arm.lines:
            click.echo(line)
        click.echo(f"{arm.label}: {headline(arm.plan) if arm.plan else f'not run: {arm.reason}'}")
    if not runnable(arms):
        with contextlib.suppress(OSError):  # it held something before
            folder.rmdir()
        raise NoStrategyFits(
            "nothing of what was to be compared can be run here: "
            + "; ".join(f"{arm.label}: {arm.reason}" for arm in arms),
            "`parallel-tune plan` shows what would fit.",
        )
    work = lay_out(config, request.steps, folder)
    made = Bench(config, request, hardware, arms, work, folder)
    _run_and_show(made, folder)


def _run_and_show(made: Bench, folder: Path) -> None:
    interrupted = False
    # Whatever runs at that moment, its processes are ended and what was measured is shown.
    before = {number: signal.signal(number, _interrupt) for number in stop_signals()}
    try:
        made.run()
    except (Interrupted, KeyboardInterrupt):
        interrupted = True
        made.write()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    results = made.results()
    if results["arms"]:
        click.echo("")
        text_table(results, Console())
        for path in (folder / "bench.json", *write_views(results, folder)):
            click.echo(f"written: {path}")
        if not have_matplotlib():
            click.echo("no bench.png: matplotlib is not installed (pip install 'parallel-tune[plots]')")
    if interrupted:
        raise RunFailed("the benchmark was stopped by a signal", f"What was measured until then is in {folder}.")
    if made.failures:
        raise RunFailed(f"{made.failures} of what was to be compared failed", f"Logs and figures are in {folder}.")


def _interrupt(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def _make_folder(config: TrainConfig) -> Path:
    if config.output_dir is not None:
        folder = Path(config.output_dir)
        if (folder / "bench.json").exists() or (folder / "runs").exists():
            raise ConfigError(f"{folder} holds a benchmark already", "Choose another --output_dir.")
    else:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config.model).name)
        folder = new_folder(f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-bench")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make {folder}: {error.strerror}", "Choose another --output_dir.") from error
    return folder.absolute()


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name
