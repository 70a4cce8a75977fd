"""`parallel-tune bench`: real short runs of each strategy on the same work, and what is made of them."""

from __future__ import annotations

import json
import signal
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from parallel_tune.bench.arms import Arm, make_arm, shared_config, wanted_names
from parallel_tune.bench.command import Request
from parallel_tune.bench.reference import WORDS, read_result, reference_argv
from parallel_tune.bench.running import Timed
from parallel_tune.bench.summary import Measured, compare, flops_utilisation
from parallel_tune.bench.work import Work
from parallel_tune.config import make_config
from parallel_tune.hardware import parse_hardware
from parallel_tune.memory.facts import facts_from_config
from parallel_tune.memory.lookup import load_model_facts
from parallel_tune.memory.settings import TrainingSettings
from parallel_tune.memory.speed import micro_batch_flops, model_flops
from parallel_tune.planning import make_plan, training_settings
from strategies.contracts import Arrangement, Part
from strategies.errors import ConfigError, RunFailed
from strategies.registry import load_registry

STEPS, SKIPPED, GLOBAL_BATCH = 5, 2, 6

REFERENCE = """
import json, os, sys, time
rows, steps, result = sys.argv[1:]
if result.endswith("reference-2.json"):
    raise SystemExit(3)
lines = open(rows).read().splitlines()
assert all(json.loads(line)["text"] for line in lines) and len(lines) == {batch} * int(steps)
assert os.environ["PARALLEL_TUNE_RESULT"] == result
json.dump({{"seconds": [0.5] * int(steps), "tokens": 100, "losses": [1.0] * int(steps)}}, open(result, "w"))
"""


@pytest.fixture(scope="module")
def bench(tune: Any) -> Any:
    """The command on the tied model and the dataset, without the settings of other tests' runs."""
    data = tuple(option for option in tune.base if option.startswith(("--model", "--dataset")))
    return type(tune)(tune.folder, (*data, f"--global_batch_size={GLOBAL_BATCH}", "--max_seq_length=128"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The option for a reference that fails in its second turn."""
    script = tmp_path_factory.mktemp("a script") / "reference.py"
    script.write_text(REFERENCE.format(batch=GLOBAL_BATCH))
    return f"--reference='{sys.executable}' '{script}' {{rows}} {{steps}} {{result}}"


MEASURED = (f"--steps={STEPS}", f"--skip_steps={SKIPPED}")


@pytest.fixture(scope="module")
def done(bench: Any, reference: str) -> Any:
    """A benchmark of everything, with a reference."""
    options = ("--repeat=1", "--per_device_train_batch_size=1", "--gradient_accumulation_steps=2")
    return bench("bench", "--hardware=cpu:2", *MEASURED, *options, reference)


@pytest.fixture(scope="module")
def twice(bench: Any, reference: str) -> Any:
    """Two turns of what runs on one device; the reference fails in the second."""
    return bench.ended("bench", "--hardware=cpu:1", *MEASURED, "--repeat=2", reference)


def results_of(ended: Any) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ended.run / "bench.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def results(done: Any) -> dict[str, Any]:
    return results_of(done)


def turns_told(ended: Any) -> list[str]:
    return [line.partition(":")[0] for line in ended.out.splitlines() if line.startswith("run ")]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_all_do_the_same_work_in_turn(done: Any, results: dict[str, Any]) -> None:
    assert [arm["name"] for arm in results["arms"]] == ["single", "ddp", "naive", "lanes"]
    assert [arm["num_devices"] for arm in results["arms"]] == [1, 2, 2, 2]
    assert [arm["processes"] for arm in results["arms"]] == [1, 2, 1, 1]
    assert [arm["lanes"] for arm in results["arms"]] == [1, 1, 1, 2]
    assert results["finished"] and results["not_run"] == []
    first = results["arms"][0]["runs"][0]
    assert first["tokens"] == results["tokens"] and len(first["tokens"]) == STEPS
    for arm in results["arms"]:
        (run,) = arm["runs"]
        assert run["tokens"] == first["tokens"]
        assert run["losses"] == pytest.approx(first["losses"], rel=1e-5)
    everyone = ["one device", "ddp", "model_parallel, naive", "model_parallel, lanes", "the reference"]
    assert turns_told(done) == [f"run 1 of {name}" for name in everyone]


def test_rates_are_those_of_the_steps_that_count(done: Any, twice: Any, results: dict[str, Any]) -> None:
    for ended, repeat in ((done, 1), (twice, 2)):
        for arm in results_of(ended)["arms"]:
            rates = []
            for turn in range(1, repeat + 1):
                rows = rows_of(ended.run / "runs" / f"{arm['name']}-{turn}")[SKIPPED:]
                assert len(rows) == STEPS - SKIPPED
                rates.append(sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows))
            expected = {"median": statistics.median(rates), "least": min(rates), "most": max(rates)}
            assert arm["tokens_per_second"] == pytest.approx(expected)
            assert f"{arm['tokens_per_second']['median']:,.0f}" in ended.out
    single, ddp = (arm["tokens_per_second"]["median"] for arm in results["arms"][:2])
    assert results["arms"][1]["scaling_efficiency"] == pytest.approx(ddp / single / 2)
    assert results["arms"][0]["scaling_efficiency"] is None


def test_the_reference_is_beside_them(results: dict[str, Any]) -> None:
    reference = results["reference"]
    assert reference["timed"] == "steps" and not reference["failed"]
    assert reference["tokens_per_second"]["median"] == pytest.approx(200)
    assert reference["samples_per_second"]["median"] == pytest.approx(GLOBAL_BATCH / 0.5)
    for arm in results["arms"]:
        assert arm["ratio_to_reference"] == pytest.approx(arm["tokens_per_second"]["median"] / 200)


def test_memory_and_start_are_told(results: dict[str, Any]) -> None:
    single, ddp, naive, lanes = results["arms"]
    for arm in (single, ddp):
        for device in arm["devices"]:
            assert device["used_peak_bytes"] > 0 and device["predicted_peak_bytes"] > 0
    assert len(ddp["devices"]) == 2
    assert all(device["used_peak_bytes"] is None for device in naive["devices"])  # they share a process
    assert all(0 < device["busy_share"] <= 1 for device in lanes["devices"])
    for arm in results["arms"]:
        assert arm["model_flops_utilisation"] is None  # no rate of a CPU is known
        assert arm["first_step_seconds"]["first_run"] > arm["plan_seconds"] > 0


def test_the_number_of_runs_is_told(done: Any, twice: Any) -> None:
    assert "the first 2 do not count; one run each" in " ".join(done.out.split())
    assert "; medians of 2 runs in turn, least and most beside them" in " ".join(twice.out.split())


def test_no_weights_are_left_and_pictures_are(done: Any) -> None:
    assert not [*done.run.rglob("*.safetensors"), *done.run.rglob("adapter*"), *done.run.rglob("checkpoint-*")]
    assert (done.run / "bench.png").read_bytes().startswith(b"\x89PNG")
    page = (done.run / "bench.html").read_text()
    # Speed, memory, and a step of the splits.
    assert page.count("<svg") == 3 and "model_parallel, lanes" in page


def test_naive_and_lanes_are_drawn_on_one_axis(done: Any, results: dict[str, Any]) -> None:
    shown = {arm["name"]: arm["schedule"] for arm in results["arms"]}
    assert shown["single"] is None and shown["ddp"] is None
    assert len(shown["naive"]["segments"]) == len(shown["lanes"]["segments"]) == 3 * GLOBAL_BATCH
    serial = shown["naive"]["segments"]
    assert all(one["end"] <= other["start"] for one, other in pairwise(serial))
    page = (done.run / "bench.html").read_text()
    assert page.count("time within the step (ms)") == 1
    assert "model_parallel, naive: " in page and "model_parallel, lanes: " in page
    assert (done.run / "schedule.png").stat().st_size > 5_000
    for arm in results["arms"][2:]:
        assert all(0 < device["busy_share"] <= 1 for device in arm["devices"])


def test_what_cannot_run_is_listed_and_a_failed_reference_takes_nothing(bench: Any, twice: Any) -> None:
    assert twice.code == 1
    results = results_of(twice)
    assert [item["name"] for item in results["not_run"]] == ["ddp", "naive", "lanes"]
    assert [len(arm["runs"]) for arm in results["arms"]] == [2]
    assert turns_told(twice) == ["run 1 of one device", "run 1 of the reference", "run 2 of one device"]
    assert results["finished"] and len(results["reference"]["runs"]) == 1
    assert "code 3" in results["reference"]["failed"]
    assert "not run: ddp: there is one device" in twice.out and "the reference ended with code 3" in twice.out
    again = bench.ended("bench", "--hardware=cpu:1", f"--output_dir={twice.run}", shared_output=False)
    assert again.code == 2 and "holds a benchmark already" in again.err


def test_a_signal_ends_all_and_keeps_what_there_is(bench: Any, alive: Callable[[Path], list[int]]) -> None:
    """In the reference's turn, which would never end."""
    reference = f"--reference={sys.executable} -c 'import time; time.sleep(1000)' {{result}}"
    command = bench.start("bench", "--hardware=cpu:1", "--steps=3", "--repeat=1", reference)
    command.wait_for(command.run / "reference.log")
    command.send(signal.SIGHUP)
    ended = command.wait()
    assert ended.code == 1 and "stopped by a signal" in ended.err
    results = json.loads((ended.run / "bench.json").read_text())
    assert len(results["arms"][0]["runs"]) == 1 and not results["finished"]
    assert "not finished: 0 of 1" in ended.out
    assert alive(ended.run) == []


def test_a_signal_in_our_own_run_starts_no_other(bench: Any, alive: Callable[[Path], list[int]]) -> None:
    command = bench.start("bench", "--hardware=cpu:2", "--steps=5000", "--strategies=single,ddp")
    command.wait_for(command.run / "runs" / "single-1" / "metrics.jsonl")
    command.send(signal.SIGINT)
    ended = command.wait()
    assert ended.code == 1 and "stopped by a signal" in ended.err
    assert [path.name for path in (ended.run / "runs").iterdir()] == ["single-1"]
    assert alive(ended.run) == []


def test_it_does_not_run_inside_a_launcher(bench: Any) -> None:
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    ended = bench.ended("bench", "--hardware=cpu:2", env=env)
    assert ended.code == 4 and "bench starts its processes itself" in ended.err
    assert not ended.run.exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--dataset=nowhere.jsonl", "nowhere.jsonl' is not there"),
        ("--model=/nowhere", "nothing is known of model '/nowhere'"),
        ("--strategies=", "--strategies names none"),
        ("--reference=", "--reference is empty"),
        ("--max_devices=0", "max_devices = 0"),
    ],
)
def test_what_is_wrong_for_all_is_said_once(
    wrong: str, said: str, bench: Any, tied_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    given = (f"--model={tied_model}", f"--dataset={rows_file}", f"--output_dir={tmp_path / 'out'}", "--hardware=cpu:2")
    ended = bench.ended("bench", *given, wrong, base=False)
    assert ended.code == 2
    assert (ended.out + ended.err).count(said) == 1
    assert not (tmp_path / "out").exists()


def test_names_of_what_is_compared() -> None:
    assert wanted_names(None, "auto") == ("single", "ddp", "naive", "lanes")
    assert wanted_names("model_parallel, single,lanes", "auto") == ("naive", "lanes", "single")
    assert wanted_names(None, "ddp") == ("single", "ddp")
    with pytest.raises(ConfigError, match="no 'lane'") as error:
        wanted_names("lane", "auto")
    assert "lanes" in str(error.value.hint)


@pytest.mark.parametrize(
    "request_", [Request(repeat=0), Request(skipped=0), Request(steps=5, skipped=5), Request(steps=2)]
)
def test_too_little_to_measure_is_refused(request_: Request) -> None:
    with pytest.raises(ConfigError):
        request_.check()


def test_one_global_batch_for_all() -> None:
    config = make_config({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5, "val_size": 4})
    shared = shared_config(config, 2)
    assert (shared.global_batch_size, shared.per_device_train_batch_size) == (30, 3)
    assert shared.gradient_accumulation_steps is None and not shared.val_size
    assert shared_config(config.replace(global_batch_size=7), 2).global_batch_size == 7


def test_what_does_not_fit_says_by_how_much() -> None:
    config = shared_config(make_config({"model": "unsloth/Llama-3.3-70B-Instruct"}), 2)
    for name in ("single", "ddp"):
        arm = make_arm(name, config, parse_hardware("2xH100-80GB"))
        assert arm.plan is None and "does not fit" in arm.reason and "GiB" in arm.reason
    with pytest.raises(ConfigError, match="this machine has"):
        make_arm("lanes", config, parse_hardware("2xH100-80GB"))
    assert (
        make_arm("naive", config.replace(max_devices=1), parse_hardware("2xH100-80GB")).reason == "there is one device"
    )


MODEL = "unsloth/Qwen3-8B"


@pytest.mark.parametrize("tokens", [64, 100, 101, 150, 200, 1000])
def test_a_window_spares_attention_what_lies_before_it(tokens: int) -> None:
    """A row one and a half windows long was counted as if it had none."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    window = 100
    config = {"model_type": "mistral", **sizes, "num_key_value_heads": 2, "vocab_size": 50, "sliding_window": window}
    windowed, free = facts_from_config(config), facts_from_config({**config, "sliding_window": None})
    settings = TrainingSettings()
    spared = model_flops(free, settings, [tokens]) - model_flops(windowed, settings, [tokens])
    keys = sum(max(0, query - window) for query in range(1, tokens + 1))
    # Forward and backward, two products, 2 FLOP an element of the queries, in each layer.
    assert spared == pytest.approx(3 * 4 * 64 * 3 * keys, rel=0.02, abs=3 * 4 * 64 * 3 * window)


def test_model_flops_are_those_of_the_plan_without_recomputation() -> None:
    facts = load_model_facts(MODEL)
    config = make_config({"model": MODEL})
    settings = training_settings(config, facts, "unsloth", "bfloat16")
    whole = Part(0, facts.num_layers - 1, embedding=True, head=True)
    planned = micro_batch_flops(facts, settings, whole, Arrangement(1, 3, 1, "none"))
    length = settings.sequence_length
    scores = 3 * facts.num_layers * 4.0 * length * (length / 2) * facts.query_size
    needed = model_flops(facts, settings, [length] * 3)
    assert needed == pytest.approx(planned - 0.5 * scores)  # flash attention's second look at its scores
    # 8.2e9 parameters less the embedding's 0.6e9, four operations a token where they are frozen.
    assert needed - 3 * scores == pytest.approx(4 * 7.57e9 * 3 * length, rel=0.01)
    full = training_settings(config.replace(full_finetuning=True), facts, "unsloth", "bfloat16")
    assert model_flops(facts, full, [64]) == pytest.approx(1.5 * model_flops(facts, settings, [64]), rel=0.01)
    assert model_flops(facts, settings, [5, 9, 5]) == 2 * model_flops(facts, settings, [5]) + model_flops(
        facts, settings, [9]
    )


def test_utilisation_is_what_was_needed_over_what_the_cards_could_do() -> None:
    facts, hardware = load_model_facts(MODEL), parse_hardware("2xH100-80GB")
    config = make_config({"model": MODEL, "strategy": "ddp", "global_batch_size": 4})
    plan = make_plan(config, facts, "unsloth", hardware, load_registry())
    lengths = [[100, 200, 300, 400]] * 3
    run = Timed([9.0, 0.5, 0.25], [1000] * 3, [4] * 3, [1.0] * 3, skipped=1)
    measured = Measured(Arm("ddp", config, plan), [run])
    work = Work(lengths, Path("rows.jsonl"))
    settings = training_settings(config, facts, "unsloth", plan.dtype)
    expected = 2 * model_flops(facts, settings, lengths[0]) / 0.75 / (2 * 989e12)
    assert flops_utilisation(measured, facts, hardware, work) == pytest.approx(expected)
    assert flops_utilisation(measured, facts, hardware, Work([[1]] * 3, work.rows)) is None  # other rows
    assert flops_utilisation(measured, facts, parse_hardware("cpu:2"), work) is None
    in_float32 = Measured(replace(measured.arm, plan=replace(plan, dtype="float32")), [run])
    assert flops_utilisation(in_float32, facts, hardware, work) is None


def test_a_reference_timed_as_a_whole_is_held_against_whole_runs() -> None:
    run = {"first_step_seconds": 10.0, "seconds": [3.0, 1.0, 1.0], "tokens": [100, 100, 100]}
    arm = {"name": "single", "num_devices": 1, "tokens_per_second": {"median": 100.0}, "runs": [run]}
    compare([arm], {"timed": "whole", "tokens_per_second": {"median": 5.0}})
    assert arm["ratio_to_reference"] == pytest.approx(300 / 12 / 5)


@pytest.mark.parametrize(
    "said",
    [
        "not json", "[]", "{}", '{"seconds": []}', '{"seconds": 5}', '{"seconds": [1, 2]}', '{"seconds": [1, 2, "x"]}',
        '{"seconds": [1, 0, 1]}', '{"seconds": [1, 1, 1], "tokens": [1, 2]}', '{"seconds": [1, 1, 1], "losses": 3}',
        '{"seconds": [1, 1, 1], "used_bytes": "much"}', '{"seconds": [1, NaN, 1]}',
        '{"seconds": [1, 1, 1], "tokens": 0}',
    ],
)  # fmt: skip
def test_a_result_that_cannot_be_read_is_refused(said: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(said)
    with pytest.raises(RunFailed):
        read_result(path, Work([[10, 20]] * 3, path), 2, 2)


def test_what_a_reference_leaves_out_is_ours(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text('{"seconds": [4, 1, 1], "used_bytes": [5, 6]}')
    run = read_result(path, Work([[10, 20], [10], [20]], path), 2, 1)
    assert (run.tokens, run.samples, run.losses) == ([20.0] * 3, [2.0] * 3, [])
    assert run.tokens_per_second == 20 and [device["used_peak_bytes"] for device in run.devices] == [5, 6]


def test_words_are_filled_in_and_nothing_else() -> None:
    words = {name: f"<{name} 1>" for name in WORDS}
    argv = reference_argv("run '{model}' a={steps} {other} '{\"a\": 1}' $HOME", words)
    assert argv == ["run", "<model 1>", "a=<steps 1>", "{other}", '{"a": 1}', "$HOME"]
    for bad in ("", "  ", "'open"):
        with pytest.raises(ConfigError):
            reference_argv(bad, words)


def test_skipped_steps_are_in_no_rate() -> None:
    run = Timed([2.0, 1.0, 3.0], [10, 30, 50], [1, 2, 3], [], skipped=1)
    assert run.tokens_per_second == 20 and run.samples_per_second == pytest.approx(5 / 4)
