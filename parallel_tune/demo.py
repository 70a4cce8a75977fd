"""The demo: a small real model, a dataset of ours, and what training changed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click

from parallel_tune import refusal, rundir
from parallel_tune.cache import cache_folder
from parallel_tune.commands import start
from parallel_tune.config import TrainConfig, make_config
from parallel_tune.decision import check_present, decide, find_hardware
from parallel_tune.demo_model import fetch_demo_model
from parallel_tune.plan_view import render_plan
from parallel_tune.planning import require_fit
from strategies.errors import ConfigError, StrategiesCombined

PROMPT = "What is the capital of France?"
DATASET = "short_answers.jsonl"


def run_demo(strategy: str, hardware: str | None, model_dir: Path | None, max_steps: int | None) -> None:
    """Fetch the model, plan, train, and show the held-out loss and one answer before and after."""
    from parallel_tune.generation import answer

    folder = model_dir or default_model_dir()
    # What is wrong is said before the model is fetched.
    config = demo_config(folder, strategy, hardware, max_steps)
    launch = refusal.find_launch(os.environ)
    if launch is not None and launch.world_size > 1:
        raise StrategiesCombined(
            f"the demo starts its processes itself, and {launch.launcher} has started {launch.world_size} already",
            f"Run `parallel-tune demo` without {launch.launcher}.",
        )
    devices = find_hardware(config)
    model = fetch_demo_model(folder)
    began = time.monotonic()  # fetching the model is no part of a run
    plan, lines = decide(config, devices)
    for line in lines:
        click.echo(line)
    require_fit(plan, config.strategy)
    check_present(plan, devices)
    click.echo(render_plan(plan))
    run = rundir.create(config, plan)
    start(plan, run, None, began=began)
    click.echo(f"\nprompt: {PROMPT}")
    click.echo(f"before: {answer(model, None, PROMPT)}")
    click.echo(f"after:  {answer(model, run.adapter, PROMPT)}")
    click.echo(f"\nadapter: {run.adapter}")


def demo_config(model: Path, strategy: str, hardware: str | None, max_steps: int | None) -> TrainConfig:
    """The demo's settings: two virtual devices on a machine without GPUs."""
    return make_config(
        {
            "model": model,
            "dataset": example_dataset(),
            "strategy": strategy,
            "hardware": hardware,
            "max_seq_length": 256,
            "global_batch_size": 4,
            "max_steps": 50 if max_steps is None else max_steps,
            "learning_rate": 1e-3,
            "answers_only": True,
            "val_size": 24,
            "eval_steps": 10,
        }
    )


def default_model_dir() -> Path:
    """The user's cache folder."""
    return cache_folder() / "SmolLM2-135M-Instruct"


def example_dataset() -> Path:
    """The dataset in the checkout's examples folder.

    Raises:
        ConfigError: this is an installed package without its checkout.
    """
    path = Path(__file__).resolve().parent.parent / "examples" / DATASET
    if not path.exists():
        raise ConfigError(
            f"the example dataset is not at {path}",
            "Run the demo from a clone of the repository (`make demo`).",
        )
    return path
