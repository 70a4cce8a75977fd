"""Stage times of past split runs: kept for a machine, used by later plans, said, and never trusted blindly."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from parallel_tune import decision, machine
from parallel_tune.cli import program
from parallel_tune.config import make_config
from parallel_tune.memory.closed_form import ClosedFormEstimator
from parallel_tune.memory.lookup import load_model_facts
from parallel_tune.memory.machine_key import MachineKey, cpu_key, machine_key
from parallel_tune.memory.settings import TrainingSettings
from parallel_tune.memory.stage_times import (
    FORMAT,
    Observation,
    StageTimes,
    fit,
    kind_of,
    observations,
    path_of,
    remember,
    rows_of,
)
from parallel_tune.memory.timed import TimedEstimator, timed
from parallel_tune.nvml import NvmlGpu, Probe
from strategies.contracts import Arrangement, Device, Hardware, Part, Plan

GIB = 1 << 30
KEY = MachineKey("NVIDIA H200", "580.65.06", "2.11.0+cu130", "13.0", "0.50.2")
KIND = "a kind"
CARDS = tuple(Device(i, "NVIDIA H200", "cuda", 150 * GIB, 149 * GIB, True, 5e14) for i in range(2))
MODEL = "unsloth/Meta-Llama-3.1-8B-Instruct"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "parallel-tune" / "stages"


def row(layer: float = 0.01, head: float = 0.05, layers: tuple[int, int] = (20, 12), **more: Any) -> dict[str, Any]:
    """The line of a two-stage run on equal devices."""
    return {
        "format": FORMAT, "kind": KIND, "run": "run", "at": "2026-11-24 10:00:00", "checkpointing": "full", "lanes": 2,
        "micro_batch_tokens": 4096, "row_tokens": 2048, "layers": [*layers], "head": [False, True],
        "seconds": [layers[0] * layer, layers[1] * layer + head], "layer_host_seconds": layer, **more,
    }  # fmt: skip


def formula(run: Observation, layers: int, head: bool) -> float:
    return (layers + 3 * head) * run.micro_batch_tokens * 1e-6


def found(tokens: float = 4096, checkpointing: str = "full") -> tuple[float, float, str, float, int]:
    costs = fit(observations(KEY, KIND), checkpointing, tokens, formula)
    assert costs is not None
    seconds = round(costs.layer_seconds, 9), round(costs.head_seconds, 9)
    return *seconds, costs.checkpointing, costs.micro_batch_tokens, costs.runs


def test_a_layer_and_the_head_come_from_the_stages_of_a_run() -> None:
    assert fit([], "full", 4096, formula) is None
    remember(KEY, row())
    assert found() == (0.01, 0.05, "full", 4096, 1)
    assert observations(replace(KEY, driver="590"), KIND) == []
    assert observations(KEY, "another kind") == []


def test_the_median_of_the_latest_runs() -> None:
    for number in range(15):
        remember(KEY, row(layer=9.0 if number < 5 else 0.01 * (number - 4)))
    assert found() == (0.055, 0.05, "full", 4096, 10)


def test_the_nearest_conditions_are_taken() -> None:
    remember(KEY, row())
    remember(KEY, row(layer=0.002, head=0.01, micro_batch_tokens=512))
    remember(KEY, row(layer=0.0022, head=0.01, micro_batch_tokens=540))
    remember(KEY, row(layer=0.007, checkpointing="none", micro_batch_tokens=600))
    assert found(tokens=700) == (0.0021, 0.01, "full", 526, 2)
    assert found(tokens=20_000) == (0.01, 0.05, "full", 4096, 1)
    assert found(tokens=4096, checkpointing="none") == (0.007, 0.05, "none", 600, 1)
    assert found(tokens=600, checkpointing="unsloth") == (0.0021, 0.01, "full", 526, 2)


def test_a_device_that_holds_the_head_alone_is_off_by_one_factor() -> None:
    remember(KEY, {**row(), "layers": [12], "head": [True], "seconds": [15 * 4096e-6 * 2]})
    layer, head, *_ = found()
    assert (layer, head) == (pytest.approx(2 * 4096e-6), pytest.approx(2 * 3 * 4096e-6))
    path_of(KEY).unlink()
    remember(KEY, {**row(), "layers": [12], "head": [False], "seconds": [12 * 0.02]})
    layer, head, *_ = found()
    assert head / layer == pytest.approx(3)


def test_a_head_that_cost_less_than_nothing_costs_nothing() -> None:
    remember(KEY, row(seconds=[0.2, 0.1]))
    assert found()[:2] == (0.01, 0.0)


BAD: list[dict[str, Any]] = [
    {"format": FORMAT + 1},
    {"seconds": [0.2]},
    {"seconds": [0.2, float("nan")]},
    {"seconds": [float("inf"), 0.2]},
    {"seconds": [0.2, -0.1]},
    {"seconds": [0.2, 0.0]},
    {"seconds": [0.2, 1e6]},
    {"seconds": [0.2, 10**400]},
    {"seconds": [0.2, "fast"]},
    {"seconds": None},
    {"layers": [20, 0]},
    {"layers": [20, 12.5]},
    {"layers": [20, True]},
    {"layers": [], "head": [], "seconds": []},
    {"layer_host_seconds": float("nan")},
    {"layer_host_seconds": None},
    {"head": [False, 1]},
    {"micro_batch_tokens": 0},
    {"micro_batch_tokens": 1e300},
    {"row_tokens": -5},
    {"row_tokens": []},
    {"kind": None},
]


@pytest.mark.parametrize("change", BAD, ids=str)
def test_absurd_lines_are_passed_over(change: dict[str, Any]) -> None:
    remember(KEY, {**row(), **change})
    assert observations(KEY, KIND) == []
    remember(KEY, row())
    assert found()[-1] == 1


def test_torn_lines_cost_only_themselves() -> None:
    remember(KEY, row(layer=0.01))
    with path_of(KEY).open("ab") as file:
        file.write(b'\xff\xfe\n[]\n"a"\n{"format": 1}\n' + b"[" * 100_000 + b'\n{"half')
    remember(KEY, row(layer=0.03))
    assert found() == (0.02, 0.05, "full", 4096, 2)


def test_runs_that_end_at_once_all_leave_their_line() -> None:
    code = (
        "import sys\nfrom parallel_tune.memory.stage_times import remember\n"
        "from parallel_tune.memory.machine_key import MachineKey\n"
        f"for i in range(40): remember({KEY!r}, {row()!r} | {{'run': sys.argv[1] + str(i)}})\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "abcd"]
    assert [writer.wait(120) for writer in writers] == [0] * 4
    rows = [json.loads(line) for line in path_of(KEY).read_text().splitlines()]
    assert len({row["run"] for row in rows}) == len(rows) == 160


def test_what_is_read_follows_the_file() -> None:
    times = StageTimes({"NVIDIA H200": KEY})
    assert not times.of(KIND)
    remember(KEY, row())
    assert len(times.of(KIND)["NVIDIA H200"]) == 1
    # One of two models of card measured: the other's formula could not be compared with it.
    assert not StageTimes({"NVIDIA H200": KEY, "Tesla T4": replace(KEY, gpu="Tesla T4")}).of(KIND)


def test_kinds_keep_apart_what_takes_different_times() -> None:
    facts = load_model_facts(MODEL)
    base = TrainingSettings()
    settings = [
        base, replace(base, method="full"), replace(base, load_in_4bit=True), replace(base, lora_rank=64),
        replace(base, lora_targets=("q_proj",)), replace(base, compute_dtype="float32"),
        replace(base, engine="unsloth"), replace(base, cross_entropy="fused"), replace(base, use_dora=True),
        replace(base, lora_dropout=0.1),
    ]  # fmt: skip
    kinds = {kind_of(facts, each) for each in settings} | {kind_of(replace(facts, hidden_size=5120), base)}
    assert len(kinds) == len(settings) + 1
    assert kind_of(replace(facts, num_layers=80), base) == kind_of(facts, base)
    assert kind_of(facts, replace(base, sequence_length=512)) == kind_of(facts, base)


def estimator_after(*rows: dict[str, Any], settings: TrainingSettings | None = None) -> tuple[TimedEstimator, Any]:
    """A measured 8B model's estimator, and the closed form."""
    facts, settings = load_model_facts(MODEL), settings or TrainingSettings()
    for each in rows:
        remember(KEY, {**each, "kind": kind_of(facts, settings)})
    times = StageTimes({"NVIDIA H200": KEY})
    made = timed(lambda s: ClosedFormEstimator(facts, s), facts, times, CARDS)(settings)
    assert isinstance(made, TimedEstimator)
    return made, ClosedFormEstimator(facts, settings)


def test_seconds_are_those_measured_and_memory_is_the_formulas() -> None:
    estimator, closed = estimator_after(row())
    first, last = Part(0, 19, True, False), Part(20, 31, False, True)
    split = Arrangement(1, 2, 8, "full", 2, 2)
    assert estimator.micro_batch_seconds(first, split, CARDS[0]) == pytest.approx(0.2)
    assert estimator.micro_batch_seconds(last, split, CARDS[1]) == pytest.approx(0.17)
    assert estimator.memory(last, split, CARDS[1]) == closed.memory(last, split, CARDS[1])
    # Elsewhere the formula goes on from there.
    more = replace(split, micro_batch=4)
    ratio = closed.micro_batch_seconds(first, more, CARDS[0]) / closed.micro_batch_seconds(first, split, CARDS[0])
    assert estimator.micro_batch_seconds(first, more, CARDS[0]) == pytest.approx(0.2 * ratio)
    for other in (replace(split, processes=2), replace(split, captured=True)):
        assert estimator.micro_batch_seconds(first, other, CARDS[0]) == closed.micro_batch_seconds(
            first, other, CARDS[0]
        )


def test_a_host_never_takes_longer_than_a_run_has_shown() -> None:
    estimator, closed = estimator_after(row(layer=0.001), row(layer=0.002))
    part, split = Part(0, 19, True, False), Arrangement(1, 2, 8, "full", 2, 2)
    assert closed.host_seconds(part, split) > 0.1
    assert estimator.host_seconds(part, split) == pytest.approx(0.02)
    # Of another checkpointing nothing was shown.
    none = replace(split, gradient_checkpointing="none")
    assert estimator.host_seconds(part, none) == closed.host_seconds(part, none)
    path_of(KEY).unlink()
    estimator, closed = estimator_after(row(layer=0.1))
    assert estimator.host_seconds(part, split) == closed.host_seconds(part, split)
    path_of(KEY).unlink()
    estimator, closed = estimator_after()
    assert estimator.host_seconds(part, split) == closed.host_seconds(part, split)


def here(monkeypatch: pytest.MonkeyPatch) -> tuple[Hardware, MachineKey]:
    """Make two cards those of this machine."""
    hardware = Hardware(CARDS)
    cards = [NvmlGpu(f"GPU-{d.index}", d.name, d.capacity_bytes, d.free_bytes, (9, 0)) for d in CARDS]
    monkeypatch.setattr(machine, "read_nvml", lambda: cards)
    monkeypatch.setattr(machine, "probe_details", lambda _: Probe(hardware, tuple(c.uuid for c in cards)))
    monkeypatch.setattr(machine, "driver_version", lambda: "580.65.06")
    monkeypatch.setattr(decision, "probe", lambda _: hardware)
    return hardware, machine_key(CARDS[0].name, "580.65.06")


OPTIONS: dict[str, Any] = {
    "model": MODEL, "strategy": "model_parallel", "engine": "transformers", "global_batch_size": 16,
    "per_device_train_batch_size": 2, "use_gradient_checkpointing": "full",
}  # fmt: skip


def report_of(plan: Plan, seconds: tuple[float, ...], steps: int = 10) -> dict[str, Any]:
    measured = {"seconds": seconds, "micro_batch_tokens": 4096, "steps": steps}
    told = {"lanes": plan.lanes, "lanes_reason": None, "samples": 100, "tokens": 204_800}
    return {"stage_seconds": measured, **told}


def counts(plan: Plan) -> list[int]:
    return [device.layers[1] - device.layers[0] + 1 for device in plan.devices]


def test_a_measured_head_moves_the_cut_and_the_plan_says_what_the_formula_said(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    hardware, _ = here(monkeypatch)
    config = make_config(OPTIONS)
    before = decision.decide(config, hardware)[0]
    assert not [said for said in before.basis if "stage times" in said]
    # A layer of 10 ms, and a head as slow as ten of them: 21 / 11 is even.
    first, last = counts(before)
    machine.remember_stages(before, report_of(before, (first * 0.01, last * 0.01 + 0.1)), config, "run 1")
    after = decision.decide(config, hardware)[0]
    assert counts(after) == [21, 11]
    assert after.lanes == 2
    # Eight micro-batches of two full rows. The host has shown to keep up with the stage that was the slowest.
    assert after.predicted_tokens_per_second == pytest.approx(16 * 2048 / (8 * (last * 0.01 + 0.1)), rel=1e-3)
    machine.remember_stages(after, report_of(after, (0.21, 0.21)), config, "run 2")
    again = decision.decide(config, hardware)[0]
    assert counts(again) == [21, 11]
    assert again.predicted_tokens_per_second == pytest.approx(16 * 2048 / (0.42 + 7 * 0.21), rel=1e-3)
    costs, both = after.basis[-2:] if "stage times" in after.basis[-2] else after.basis[:2]
    assert "a layer takes 10 ms and the head with its loss 100 ms for 4,096 tokens, measured by 1 past run" in costs
    assert "the formula says" in costs
    assert f"by the formula alone: {first} / {last} layers, micro-batch 2, 2 lanes, " in both
    assert f"{before.predicted_tokens_per_second:,.0f} tokens/s; as planned, by the measured times: 21 / 11" in both

    declared = decision.decide(config, decision.parse_hardware("2xH200-141GB"))[0]
    assert not [said for said in declared.basis if "stage times" in said]
    other = decision.decide(config.replace(r=32), hardware)[0]
    assert not [said for said in other.basis if "stage times" in said]
    shutil.rmtree(cache)
    assert decision.decide(config, hardware)[0] == before


@pytest.mark.parametrize("what", ["short", "unmeasured", "empty"])
def test_what_teaches_nothing(what: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    hardware, _ = here(monkeypatch)
    config = make_config(OPTIONS)
    plan = decision.decide(config, hardware)[0]
    report = report_of(plan, (0.2, 0.2), steps=2 if what == "short" else 10)
    if what == "unmeasured":
        del report["stage_seconds"]
    if what == "empty":
        report["samples"] = 0
    assert rows_of(report, plan, KIND, "run") == {}
    machine.remember_stages(plan, report, config, "run")
    assert not cache.exists()


def test_unequal_cards_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware, _ = here(monkeypatch)
    plan = decision.decide(make_config(OPTIONS), hardware)[0]
    unequal = replace(plan, devices=(plan.devices[0], replace(plan.devices[1], name="Tesla T4")))
    rows = rows_of(report_of(plan, (0.2, 0.3)), unequal, KIND, "run")
    assert {name: (each["head"], each["seconds"]) for name, each in rows.items()} == {
        "NVIDIA H200": ([False], [0.2]), "Tesla T4": ([True], [0.3]),
    }  # fmt: skip


ON_TWO_STAGES = ("--strategy=model_parallel", "--hardware=cpu:2")


@pytest.fixture(scope="module")
def on_two_stages(tune: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, str]]:
    """Runs without lanes and with them, and the line that each left."""
    folder, ways = tmp_path_factory.mktemp("cache"), ("off", "on")
    each = ((*ON_TWO_STAGES, f"--pipeline={way}", "--max_steps=8") for way in ways)
    runs = tune.in_turn(*each, env={"XDG_CACHE_HOME": str(folder)})
    lines = (folder / "parallel-tune" / "stages" / path_of(cpu_key()).name).read_text().splitlines()
    return dict(zip(ways, zip(runs, lines, strict=True), strict=True))


@pytest.mark.parametrize("pipeline", ["off", "on"])
def test_a_run_on_two_stages_writes_what_the_next_plan_reads(
    tune: Any, cache: Path, on_two_stages: dict[str, tuple[Any, str]], pipeline: str
) -> None:
    options = (*ON_TWO_STAGES, f"--pipeline={pipeline}")
    ended, line = on_two_stages[pipeline]
    path_of(cpu_key()).parent.mkdir(parents=True)
    path_of(cpu_key()).write_text(line + "\n")
    kept = json.loads(line)
    measured = ended.report["stage_seconds"]
    # Of eight steps the first two warm up.
    assert measured["steps"] == 6
    assert (kept["seconds"], kept["micro_batch_tokens"]) == (measured["seconds"], measured["micro_batch_tokens"])
    assert kept["layers"] == [d["layers"][1] - d["layers"][0] + 1 for d in ended.plan["devices"]]

    told = ended.plan["predicted_tokens_per_second"]
    shown = CliRunner().invoke(program, ["plan", "--json", *options, *tune.base])
    plan = json.loads(shown.output)
    said = [line for line in plan["basis"] if "stage times of CPU" in line or "by the formula alone" in line]
    assert len(said) == 2
    assert f"{told:,.0f} tokens/s; as planned, by the measured times" in said[1]
    assert plan["predicted_tokens_per_second"] != told


def test_a_run_whose_times_cannot_be_kept_ends_well(tune: Any, tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "parallel-tune").write_text("no folder")
    options = ("--strategy=model_parallel", "--hardware=cpu:2", "--max_steps=6")
    ended = tune(*options, env={"XDG_CACHE_HOME": str(tmp_path / "file")})
    assert "not kept for later plans" in (ended.run / "logs" / "rank-0.log").read_text()
