"""The benchmark of choices: its cases are what they say, its runs are held to small cards, and its figures add up."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from parallel_tune.hardware import parse_hardware
from parallel_tune.nvml import Probe
from parallel_tune.planning import make_plan
from strategies.contracts import Plan
from strategies.registry import load_registry

TOO_MUCH = 1.1
"""By what factor a refused run's tensors and context alone are above its card."""
EASILY = 0.95
"""How much of a card a choice may fill by its plan."""
TOTAL_BYTES = 150 << 30


@pytest.fixture
def module(load_benchmark: Any) -> Any:
    load_benchmark("choices")
    return importlib.import_module


@pytest.fixture
def benchmark(load_benchmark: Any) -> Any:
    return load_benchmark("choices")


def fullest(plan: Plan) -> float:
    return max(device.predicted_peak_bytes / device.free_bytes for device in plan.devices)


def bare(plan: Plan, card_bytes: int) -> float:
    """Tensors and contexts without what the allocator can give back."""
    return max(device.memory.allocated_bytes + device.memory.context_bytes for device in plan.devices) / card_bytes


def test_every_case_is_on_the_side_that_it_names_and_not_near_its_edge(module: Any) -> None:
    known = module("choices_cases")
    assert len(known.CASES) >= 8
    assert len({case.name for case in known.CASES}) == len(known.CASES)
    sides = Counter(case.side for case in known.CASES)
    assert sides["no replica"] >= 4 and sides["replica"] >= 3
    for case in known.CASES:
        auto = known.planned(case, "auto", "off")
        ddp, split = (known.planned(case, strategy, "off") for strategy in known.STRATEGIES)
        assert auto.fits and split.fits and fullest(auto) < EASILY, case.name
        assert auto.strategy == ("model_parallel" if case.side == "no replica" else "ddp"), case.name
        assert ddp.fits == (case.side != "no replica"), case.name
        if case.side == "no replica":
            assert bare(ddp, case.device.free_bytes) > TOO_MUCH, case.name
        else:
            ways = ddp.processes, ddp.gradient_checkpointing, split.gradient_checkpointing
            side = {
                (2, "none", "none"): "replica",
                (2, "full", "none"): "replica that recomputes",
                (1, "full", "full"): "replica on one card",
            }
            assert case.side == side[ways], case.name


def test_a_refused_run_is_planned_for_larger_cards_and_no_less_thrifty(module: Any) -> None:
    known = module("choices_cases")
    read = module("prediction_again").read_arguments
    for case in (case for case in known.CASES if case.side == "no replica"):
        refused = known.planned(case, "ddp", "off")
        arguments = [*case.arguments("ddp", "off"), *known.layout(case, refused)]
        config = read(arguments, case.shape)
        facts = module("prediction_edges").facts_of(case.shape)
        run = make_plan(config, facts, "transformers", parse_hardware(config.hardware), load_registry())
        assert run.fits and run.devices[0].name == "H200-141GB"
        for name in ("strategy", "processes", "micro_batch", "gradient_checkpointing", "gradient_accumulation_steps"):
            assert getattr(run, name) == getattr(refused, name), case.name
        assert bare(run, case.device.free_bytes) > TOO_MUCH, case.name


def test_a_limit_leaves_room_for_what_is_outside_the_allocator(module: Any) -> None:
    known, limit = module("choices_cases"), module("choices_limit")
    case = known.CASES[0]
    plan = known.planned(case, "model_parallel", "off")
    size = limit.tensor_bytes(case.device, plan)
    assert size == case.device.free_bytes - plan.devices[0].memory.context_bytes
    assert all(device.memory.allocated_bytes + device.memory.reserve_bytes < size for device in plan.devices)
    # Segments grow as in any other run, or the plan would be another.
    assert limit.limited_to(25, 100) == {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True,per_process_memory_fraction:0.250000"
    }


def row(strategy: str, chosen: bool, tokens_per_second: float = 0.0, **more: Any) -> dict[str, Any]:
    """A run that ended if it has a speed, and else ran out of memory."""
    made = {"what": f"a: {'auto' if chosen else strategy}", "case": "a", "side": "replica", "strategy": strategy}
    made |= {"chosen": chosen, "ran_out_of_memory": not tokens_per_second, "kept_to_card": True, "planned_to_fit": True}
    made |= {"planned_tokens_per_second": 1.0, "devices": [], "tokens_per_second": tokens_per_second}
    return made | more


@pytest.mark.parametrize(
    ("chosen", "other", "right", "why"),
    [
        (row("ddp", True, 30.0), row("model_parallel", False, 20.0), True, "1.50 times as fast as model_parallel"),
        (row("ddp", True, 30.0), row("model_parallel", False, 40.0), False, "0.75 times as fast as model_parallel"),
        (row("model_parallel", True, 30.0), row("ddp", False), True, "ddp does not fit"),
        (row("model_parallel", True), row("ddp", False), False, "the choice does not fit"),
        (row("ddp", True, 30.0, kept_to_card=False), row("x", False, 1.0), False, "the choice does not fit"),
        # It ended only since nothing holds down what lies outside the allocator.
        (row("model_parallel", True, 30.0), row("ddp", False, 60.0, kept_to_card=False), True, "ddp does not fit"),
        (row("ddp", True, 30.0, kept_to_card=None), row("x", False, 20.0), True, "1.50 times as fast as x"),
    ],
)
def test_a_choice_is_right_if_it_ran_and_the_other_did_not_or_was_slower(
    module: Any, chosen: dict[str, Any], other: dict[str, Any], right: bool, why: str
) -> None:
    assert module("choices_figures").verdict(chosen, other) == (right, why)


def test_figures_count_cases_and_the_errors_of_chosen_runs(module: Any) -> None:
    known = module("choices_figures")
    device = {"predicted_allocated_bytes": 110, "allocated_peak_bytes": 100, "predicted_peak_bytes": 190}
    device |= {"used_peak_bytes": 200}
    small = device | {"allocated_peak_bytes": 80}
    fast = row("ddp", True, 30.0, devices=[device, small], card_bytes=200)
    slow = row("model_parallel", False, 20.0, devices=[small], card_bytes=199, planned_tokens_per_second=2.0)
    for each in (fast, slow):
        known.score(each)
    assert fast["kept_to_card"] and not slow["kept_to_card"]
    slow["kept_to_card"] = True
    split = row("model_parallel", True, 9.0, case="b", what="b: auto", side="no replica")
    refused = row("ddp", False, case="b", what="b: ddp", side="no replica", planned_to_fit=False, said="out of memory")
    single = row("ddp", True, 5.0, case="c", what="c: auto")  # the other run is to come
    torn = row("ddp", True, case="d", what="d: auto", failed="x"), row("x", False, 3.0, case="d", what="d: x")
    broken = row("ddp", True, case="e", what="e: auto"), row("x", False, 3.0, case="e", what="e: x")
    found = known.figures([fast, slow, split, refused, single, *torn, *broken])
    assert (found["cases"], found["right"], found["wrong"]) == (3, 2, 1)
    assert found["wrong_cases"] == ["e"]
    assert found["sides"] == {"replica": {"cases": 2, "right": 1}, "no replica": {"cases": 1, "right": 1}}
    assert found["verdicts"]["b"] == "model_parallel: ddp does not fit"
    assert (found["planned_slower"], found["failed"]) == (["a"], ["d: auto"])
    assert (found["false_fits"], found["false_refusals"]) == (["e: auto"], [])
    assert found["allocated_worst_error"] == pytest.approx(0.375)
    assert found["allocated_mean_error"] == pytest.approx((0.1 + 0.375) / 2)
    assert found["used_mean_error"] == pytest.approx(0.05)
    shown = [known.line(each) for each in (fast, refused, torn[0])]
    assert "30 tokens/s" in shown[0] and shown[1].endswith("as planned: out of memory") and "FAILED: x" in shown[2]


RUN_PROGRAM = """
import json, os, pathlib, sys
def value(name):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else ""
run = pathlib.Path(value("--output_dir"))
(run / "logs").mkdir(parents=True)
strategy = os.environ["CHOICE"] if value("--strategy") == "auto" else value("--strategy")
print(os.environ["PYTORCH_ALLOC_CONF"], os.environ["CUDA_VISIBLE_DEVICES"])
if value("--hardware") == "2xH200-141GB":
    (run / "logs" / "rank-1.log").write_text("x\\ntorch.OutOfMemoryError: CUDA out of memory. 7 allowed\\n")
    sys.exit(1)
torn = pathlib.Path(os.environ["TORN"])
if strategy == "ddp" and torn.exists():
    torn.unlink()
    sys.exit("the driver is gone")
GIB = 1 << 30
sizes = {"predicted_allocated_bytes": 5 * GIB, "predicted_peak_bytes": 6 * GIB, "allocated_peak_bytes": 5 * GIB}
sizes |= {"reserved_peak_bytes": 5 * GIB, "used_peak_bytes": 6 * GIB, "used_by": "process"}
devices = [sizes, sizes | {"used_by": "card"}]
(run / "report.json").write_text(json.dumps({"devices": devices, "versions": {"torch": "2.11"}}))
names = ("micro_batch", "gradient_accumulation_steps", "gradient_checkpointing", "captured", "lanes")
(run / "plan.json").write_text(json.dumps(dict.fromkeys(names, 1) | {"strategy": strategy}))
speed = 300 if strategy == "ddp" else 200
rows = [{"loss": 1.0, "tokens": speed, "seconds": seconds} for seconds in (3.0, 1.0, 2.0)] + [{"eval_loss": 1.0}]
(run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""


@pytest.fixture
def two_cards(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark with small processes for runs, on two cards that are not there."""
    known = importlib.import_module("choices_cases")
    found = Probe(parse_hardware("2xH200-141GB"), ("GPU-0", "GPU-1"), ())
    monkeypatch.setattr(benchmark, "probe_details", lambda _: found)
    monkeypatch.setattr(benchmark, "hardware_name", lambda cards: f"{cards}xH200")
    monkeypatch.setattr(benchmark, "limited_bytes", lambda gpus, cache: TOTAL_BYTES)
    monkeypatch.setattr(benchmark, "CASES", known.CASES[:2])
    monkeypatch.setenv("TORN", str(tmp_path / "torn"))

    class Models:
        def __init__(self, folder: Path, wanted: list[str]) -> None:
            pass

        def wait_for(self, shape: str, over: threading.Event) -> Path:
            return tmp_path / shape

        def done_with(self, shape: str) -> None:
            pass

        def close(self) -> None:
            pass

    monkeypatch.setattr(benchmark, "Models", Models)
    real = benchmark.start

    def start(command: list[str], variables: dict[str, str]) -> subprocess.Popen[str]:
        benchmark.started.append((command, variables))
        choice = "model_parallel" if "full" in " ".join(command) else "ddp"
        process: subprocess.Popen[str] = real(
            [sys.executable, "-c", RUN_PROGRAM, *command[3:]], variables | {"CHOICE": choice}
        )
        return process

    benchmark.started = []
    monkeypatch.setattr(benchmark, "start", start)
    return benchmark


def test_both_runs_of_each_case_are_kept_and_none_is_repeated(module: Any, two_cards: Any, tmp_path: Path) -> None:
    options = [f"--work={tmp_path / 'work'}", f"--results={tmp_path}", "--jobs=2"]
    path = two_cards.main(options)
    assert path == tmp_path / "choices.2xH200.json"
    record = json.loads(path.read_text())
    rows = {row["what"]: row for row in record["rows"]}
    split, replicas = module("choices_cases").CASES[:2]
    assert rows.keys() == {f"{split.name}: {name}" for name in ("auto", "ddp")} | {
        f"{replicas.name}: {name}" for name in ("auto", "model_parallel")
    }
    refused = rows[f"{split.name}: ddp"]
    assert refused["ran_out_of_memory"] and "7 allowed" in refused["said"] and not refused["planned_to_fit"]
    fast = rows[f"{replicas.name}: auto"]
    assert (fast["tokens_per_second"], fast["median_tokens_per_second"]) == (300.0, 150.0)
    # Beside others, what a whole card has in use is nobody's own.
    assert [("used_error" in device) for device in fast["devices"]] == [True, False]
    assert record["figures"]["right"] == record["figures"]["cases"] == 2
    assert record["versions"] == {"torch": "2.11"}
    for _, variables in two_cards.started:
        fraction = float(variables["PYTORCH_ALLOC_CONF"].rpartition(":")[2])
        assert variables["CUDA_VISIBLE_DEVICES"] == "GPU-0,GPU-1"
        assert fraction * TOTAL_BYTES < max(case.device.free_bytes for case in (split, replicas))
    two_cards.started.clear()
    two_cards.main([*options, "--go_on"])
    assert not two_cards.started


def test_what_failed_beside_others_is_run_once_more_and_takes_the_place(two_cards: Any, tmp_path: Path) -> None:
    (tmp_path / "torn").touch()
    options = [f"--work={tmp_path / 'work'}", f"--results={tmp_path}", "--jobs=2", "--only=lora"]
    record = json.loads(two_cards.main(options).read_text())
    assert len(two_cards.started) == 3
    assert [row["chosen"] for row in record["rows"]] == [False, True]
    assert record["figures"]["failed"] == [] and record["figures"]["right"] == 1
    (tmp_path / "torn").touch()
    record = json.loads(
        two_cards.main([f"--work={tmp_path / 'work'}", f"--results={tmp_path}", "--jobs=1"]).read_text()
    )
    (failed,) = record["figures"]["failed"]
    assert "lora" in failed and record["figures"]["cases"] == 1  # the other case still counts
    assert any("the driver is gone" in row.get("failed", "") for row in record["rows"])


def test_no_case_begins_that_would_end_too_late(two_cards: Any, tmp_path: Path) -> None:
    record = two_cards.main([f"--work={tmp_path / 'work'}", f"--results={tmp_path}", "--seconds=1"])
    assert not two_cards.started and not record.exists()


def test_two_cards_and_a_job_are_needed(
    two_cards: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        two_cards.main(["--jobs=0"])
    assert "--jobs 0" in capsys.readouterr().err
    monkeypatch.setattr(two_cards, "probe_details", lambda _: Probe(parse_hardware("1xH200-141GB"), ("GPU-0",), ()))
    with pytest.raises(SystemExit, match="two GPUs"):
        two_cards.main([])


def test_an_allocator_that_keeps_to_no_limit_is_said(module: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"per_process_memory_fraction:0\.01"):
        module("choices_limit").limited_bytes(["GPU-0", "GPU-1"], str(tmp_path))


def test_the_benchmark_runs_small(benchmark: Any, tmp_path: Path) -> None:
    path = benchmark.main(["--small", f"--results={tmp_path}", "--jobs=2", f"--work={tmp_path / 'work'}"])
    assert path == tmp_path / "choices.cpu.json"
    record = json.loads(path.read_text())
    assert {"name", "hardware", "versions", "date", "command", "rows", "figures"} <= record.keys()
    assert record["figures"]["failed"] == [], record["rows"]
    assert (record["figures"]["cases"], len(record["rows"])) == (2, 4)
    for row in record["rows"]:
        assert row["strategy"] == ("ddp" if row["chosen"] else "model_parallel")
        assert len(row["devices"]) == 2 and row["tokens_per_second"] > 0
    assert record["figures"]["used_worst_error"] < 1
    assert not (tmp_path / "work" / "tiny").exists()  # no case wants the model any more
