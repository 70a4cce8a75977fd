"""What past runs teach is shown beside the prediction, never in its place, and can only make a plan more careful."""

from __future__ import annotations

import json
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
from parallel_tune.memory import corrections
from parallel_tune.memory.corrections import Correction, kind_of, learned, path_of, remember, rows_of
from parallel_tune.memory.machine_key import MachineKey, machine_key
from parallel_tune.nvml import NvmlGpu, Probe
from strategies.contracts import Device, Hardware, Plan

MIB, GIB = 1 << 20, 1 << 30
KEY = MachineKey("NVIDIA H200", "580.65.06", "2.11.0+cu130", "13.0", "0.50.2")
KIND = "unsloth/lora/alone"
H200 = Device(0, "NVIDIA H200", "cuda", 150 * GIB, 149 * GIB)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "parallel-tune" / "corrections"


def on(hardware: Hardware, monkeypatch: pytest.MonkeyPatch) -> MachineKey:
    """Make these the GPUs that are here; returns the key of the first."""
    cards = [NvmlGpu(f"GPU-{d.index}", d.name, d.capacity_bytes, d.free_bytes, (9, 0)) for d in hardware.devices]
    monkeypatch.setattr(machine, "read_nvml", lambda: cards)
    monkeypatch.setattr(machine, "probe_details", lambda _: Probe(hardware, tuple(c.uuid for c in cards)))
    monkeypatch.setattr(machine, "driver_version", lambda: "580.65.06")
    monkeypatch.setattr(decision, "probe", lambda _: hardware)
    return machine_key(hardware.devices[0].name, "580.65.06")


def row(difference: int, run: str, kind: str = KIND, **more: Any) -> dict[str, Any]:
    return {
        "kind": kind, "run": run, "measured_constants": False,
        "predicted_peak_bytes": 20 * GIB, "used_peak_bytes": 20 * GIB + difference, **more,
    }  # fmt: skip


def plan_json(*options: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(CliRunner().invoke(program, ["plan", "--json", *options]).output)
    return loaded


def report_of(plan: Plan, beyond: int, steps: int = 10) -> dict[str, Any]:
    devices = [
        {
            "index": device.index,
            "predicted_allocated_bytes": device.predicted_allocated_bytes,
            "predicted_peak_bytes": device.predicted_peak_bytes,
            "allocated_peak_bytes": device.predicted_allocated_bytes,
            "reserved_peak_bytes": device.predicted_allocated_bytes,
            "used_peak_bytes": device.predicted_peak_bytes + beyond,
        }
        for device in plan.devices
    ]
    return {"steps": steps, "devices": devices}


def test_the_median_of_the_runs_of_a_kind() -> None:
    assert learned(KEY, KIND, False) is None
    for number, difference in enumerate((100, 120, 5000)):
        remember(KEY, [row(difference * MIB, f"run {number}")])
    assert learned(KEY, KIND, False) == Correction(120 * MIB, 3)
    assert learned(KEY, "unsloth/full/alone", False) is None
    assert learned(KEY, KIND, True) is None
    assert learned(replace(KEY, driver="590"), KIND, False) is None


def test_kinds_keep_apart_what_errs_differently() -> None:
    kinds = {
        kind_of(engine, method, four, processes, stages, estimate)
        for engine in ("unsloth", "transformers")
        for method, four in (("full", False), ("lora", False), ("lora", True))
        for processes, stages in ((1, 1), (2, 1), (1, 2))
        for estimate in ("closed_form", "trace")
    }
    assert len(kinds) == 2 * 3 * 3 * 2
    assert KIND in kinds


def test_replicas_of_a_run_are_one_observation() -> None:
    remember(KEY, [row(100 * MIB, "one"), row(300 * MIB, "one")])
    assert learned(KEY, KIND, False) == Correction(300 * MIB, 1)


def test_old_runs_are_forgotten() -> None:
    for number in range(30):
        remember(KEY, [row((0 if number < 15 else 700) * MIB, f"run {number}")])
    assert learned(KEY, KIND, False) == Correction(700 * MIB, 20)


def test_lines_that_cannot_be_read_cost_only_themselves() -> None:
    remember(KEY, [row(100 * MIB, "first")])
    with path_of(KEY).open("ab") as file:
        file.write(b'\xff\xfe\n[]\n{"kind": 3}\n{"used_peak_bytes": "x", "kind": "unsloth/lora/alone"}\n{"half')
    remember(KEY, [row(300 * MIB, "second")])
    assert learned(KEY, KIND, False) == Correction(200 * MIB, 2)


def test_runs_that_end_at_once_all_leave_their_line() -> None:
    code = (
        "import sys\nfrom parallel_tune.memory.corrections import remember\n"
        "from parallel_tune.memory.machine_key import MachineKey\n"
        f"for i in range(40): remember({KEY!r}, [{row(0, 'RUN')!r} | {{'run': sys.argv[1] + str(i)}}])\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "abcd"]
    assert [writer.wait(120) for writer in writers] == [0] * 4
    rows = [json.loads(line) for line in path_of(KEY).read_text().splitlines()]
    assert len({row["run"] for row in rows}) == len(rows) == 160


@pytest.mark.parametrize("what", ["short", "cpu", "unmeasured", "foreign", "shared"])
def test_what_teaches_nothing(what: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    on(Hardware((H200,)), monkeypatch)
    plan = decision.decide(make_config({}), Hardware((H200,)))[0]
    report = report_of(plan, 100 * MIB)
    assert rows_of(report, plan, KIND, "run")
    if what == "short":
        report["steps"] = 1
    if what == "cpu":
        plan = replace(plan, devices=(replace(plan.devices[0], kind="cpu"),))
    if what == "unmeasured":
        del report["devices"][0]["allocated_peak_bytes"]
    if what == "foreign":
        report["devices"][0]["used_peak_bytes"] += 60 * GIB
    if what == "shared":
        plan = replace(plan, devices=plan.devices * 2)
        report["devices"] *= 2
    assert rows_of(report, plan, KIND, "run") == {}
    machine.remember(plan, report, make_config({}), "run")
    assert not cache.exists()


def test_a_later_plan_shows_what_past_runs_used(monkeypatch: pytest.MonkeyPatch) -> None:
    on(Hardware((H200,)), monkeypatch)
    config = make_config({})
    plan = decision.decide(config, Hardware((H200,)))[0]
    assert plan.devices[0].corrected_peak_bytes is None
    for number in range(1, 5):
        machine.remember(plan, report_of(plan, 512 * MIB), config, f"run {number}")
        later = plan_json()
        device = later["devices"][0]
        assert device["predicted_peak_bytes"] == plan.devices[0].predicted_peak_bytes
        assert device["corrected_peak_bytes"] == plan.devices[0].predicted_peak_bytes + 512 * MIB
        assert device["past_runs"] == number
        assert device["memory"]["caution_bytes"] == (512 * MIB if number >= 3 else 0)
    # What is held against the next run is the raw prediction: no run teaches on top of another.
    again = Plan.from_json(json.dumps(later))
    machine.remember(again, report_of(again, 512 * MIB), config, "run 5")
    assert plan_json()["devices"][0]["corrected_peak_bytes"] == plan.devices[0].predicted_peak_bytes + 512 * MIB
    text = " ".join(CliRunner().invoke(program, ["plan"]).output.split())
    assert "by 5 past runs here; the peak above is raw" in text
    assert "5 past runs of unsloth/lora/alone here used a median of 512 MiB more" in text
    assert plan_json("--load_in_4bit")["devices"][0]["corrected_peak_bytes"] is None
    assert plan_json("--hardware", "H200-141GB")["devices"][0]["corrected_peak_bytes"] is None


def test_a_correction_refuses_what_would_just_fit_and_admits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    options = (
        "--per_device_train_batch_size=2",
        "--use_gradient_checkpointing=none",
        "--gradient_accumulation_steps=4",
        "--capture=off",
    )
    on(Hardware((H200,)), monkeypatch)
    need = plan_json(*options)["devices"][0]["predicted_peak_bytes"]
    card = replace(H200, free_bytes=int(need / 0.97) + 64 * MIB)
    key = on(Hardware((card,)), monkeypatch)
    assert plan_json(*options)["fits"]
    for number in range(3):
        remember(key, [row(256 * MIB, f"more {number}")])
    ended = CliRunner().invoke(program, ["plan", *options])
    assert ended.exit_code != 0
    assert "DOES NOT FIT" in ended.output
    assert "(and 0.2 GiB that past runs here used beyond theirs)" in " ".join(ended.output.split())
    # Less than predicted, ever so often, makes nothing fit that the prediction refuses.
    for number in range(20):
        remember(key, [row(-2048 * MIB, f"less {number}")])
    assert plan_json(*options)["fits"]
    small = replace(card, free_bytes=int(need / 0.97) - 64 * MIB)
    on(Hardware((small,)), monkeypatch)
    refused = json.loads(CliRunner().invoke(program, ["plan", "--json", *options]).output.partition("\n}\n")[0] + "\n}")
    assert not refused["fits"]
    assert refused["devices"][0]["corrected_peak_bytes"] == need - 2048 * MIB


def test_a_run_on_virtual_devices_teaches_nothing(tune: Any, cache: Path) -> None:
    ended = tune("--strategy=ddp", "--hardware=cpu:1", "--max_steps=3", env={"XDG_CACHE_HOME": str(cache.parents[1])})
    assert ended.report["devices"][0]["used_peak_bytes"] > 0
    assert not cache.exists()
    assert not (cache.parent / "constants").exists()


def test_runs_on_declared_cards_are_not_kept_under_a_name_that_nobody_asks_for(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    on(Hardware((H200,)), monkeypatch)
    declared = replace(Hardware((replace(H200, name="H200-141GB"),)), declared=True)
    plan = decision.decide(make_config({}), declared)[0]
    machine.remember(plan, report_of(plan, MIB), make_config({}), "run")
    assert not cache.exists()


def test_an_unwritable_cache_is_an_error_that_a_run_survives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError):
        remember(KEY, [row(0, "run")])
    assert corrections.learned(KEY, KIND, False) is None
