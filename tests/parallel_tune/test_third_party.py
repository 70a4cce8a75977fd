"""Strategies that other packages bring: seen by the command, and their faults told.

That one trains, `test_equivalence.py` shows, with the package of third_party/.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODEL = ("--model=unsloth/Llama-3.2-1B-Instruct", "--hardware=cpu:2")


def test_an_installed_strategy_is_planned_by_its_name(tune: Any, third_party: Path) -> None:
    env = {"PYTHONPATH": str(third_party)}
    planned = tune.ended("plan", *MODEL, "--strategy=noted_split", base=False, env=env)
    assert planned.code == 0
    assert "noted_split" in planned.out
    assert "warning" not in planned.out
    unknown = tune.ended("plan", *MODEL, "--strategy=noted", base=False, env=env)
    assert unknown.code == 2
    assert "Registered: ddp, model_parallel, noted_ddp, noted_split" in unknown.err


def test_two_packages_with_one_name_are_refused(tune: Any, package: Any, tmp_path: Path) -> None:
    ended = tune.ended("plan", *MODEL, base=False, env=package(tmp_path, "ddp = other:DDP"))
    assert ended.code == 2
    assert "two packages offer a strategy 'ddp'" in ended.err
    assert "other:DDP" in ended.err
    assert "strategies.ddp:DDP" in ended.err


def test_a_broken_package_is_told_and_disturbs_nobody_else(tune: Any, package: Any, tmp_path: Path) -> None:
    env = package(tmp_path, "mine = other:Mine", "raise RuntimeError('half installed')")
    planned = tune.ended("plan", *MODEL, base=False, env=env)
    assert planned.code == 0
    assert "warning: strategy 'mine' is left out: other:Mine: RuntimeError: half installed" in planned.out
    asked = tune.ended("plan", *MODEL, "--strategy=mine", base=False, env=env)
    assert asked.code == 2
    assert "strategy 'mine' could not be loaded" in asked.err
    assert "half installed" in asked.err
