"""A plan for rows of known lengths: its micro-batches are the run's own, and it is asked for where it can matter."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel_tune.config import TrainConfig, make_config
from parallel_tune.data.known_lengths import lengths_file
from parallel_tune.engines.transformers import load_tokenizer
from parallel_tune.hardware import parse_hardware
from parallel_tune.known_rows import MOST_ROWS, KnownRows, could_do_better, measure_rows
from parallel_tune.memory.lookup import load_model_facts
from parallel_tune.planning import make_plan
from parallel_tune.prediction import TrainedRows, predict_for_rows
from parallel_tune.process import WATCHER
from parallel_tune.sampler import GlobalBatches
from strategies.contracts import Arrangement, Plan
from strategies.errors import ConfigError
from strategies.registry import load_registry

MODEL = "unsloth/Qwen3-8B"


@given(
    st.lists(st.integers(2, 300), min_size=1, max_size=60),
    st.integers(1, 20),
    st.integers(1, 4),
    st.integers(1, 6),
    st.sampled_from([{}, *({"num_train_epochs": epochs} for epochs in (2.5, 0.0005, 1.0005)), {"max_steps": 3}]),
)
def test_the_largest_micro_batch_is_that_of_the_run(
    lengths: list[int], global_batch: int, processes: int, micro_batch: int, how_long: dict[str, Any]
) -> None:
    config = make_config({"global_batch_size": global_batch, **how_long})
    batches = GlobalBatches(tuple(lengths), tuple(lengths), global_batch, config.seed, joined=True)
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs) * batches.steps_per_epoch
    count = -(-global_batch // (processes * micro_batch))
    expected = max(
        sum(lengths[i] for i in rows)
        for step in range(steps)
        for rank in batches.micro_batches(step, processes, micro_batch, count)
        for rows in rank
    )
    arrangement = Arrangement(processes, micro_batch, count, "none")
    assert KnownRows(lengths).largest_micro_batch(config, arrangement) == expected
    # What a run too long to deal counts on.
    assert expected <= replace(batches, joined=False).largest_micro_batch(steps, processes, micro_batch, count)


def test_a_run_too_long_to_look_at_counts_on_the_longest_rows() -> None:
    rows = KnownRows([5, 9, 7, 2])
    config = make_config({"global_batch_size": 2, "max_steps": MOST_ROWS})
    assert rows.largest_micro_batch(config, Arrangement(1, 2, 1, "none")) == 16
    assert rows.cut(6).lengths == (5, 6, 6, 2) and rows.cut(9) is rows
    held_out = KnownRows([5, 4], 9).cut(6)
    assert (held_out.lengths, held_out.longest_held_out) == ((5, 4), 6)


@pytest.mark.parametrize("padding_free", ["on", "off"])
def test_a_long_row_that_is_only_evaluated_counts(padding_free: str) -> None:
    options = {"padding_free": padding_free, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    peaks = [
        plan_of(KnownRows([300] * 40, held_out), **options)[1].devices[0].predicted_peak_bytes
        for held_out in (0, 300, 2048)
    ]
    assert peaks[0] == peaks[1] < peaks[2]


ALPACA = KnownRows([40 + 3 * (number % 30) for number in range(3000)])


def plan_of(rows: KnownRows | None, hardware: str = "1xH100-80GB", **options: Any) -> tuple[TrainConfig, Plan]:
    config = make_config({"model": MODEL, **options})
    facts = load_model_facts(MODEL)
    return config, make_plan(config, facts, "unsloth", parse_hardware(hardware), load_registry(), rows=rows)


def test_short_rows_go_together_and_are_not_recomputed() -> None:
    config, full = plan_of(None, "1xRTX3090-24GB", global_batch_size=4)
    assert full.gradient_checkpointing != "none" and not full.captured
    assert could_do_better(config, full, 1)
    _, known = plan_of(ALPACA, "1xRTX3090-24GB", global_batch_size=4)
    assert (known.micro_batch, known.gradient_accumulation_steps, known.gradient_checkpointing) == (4, 1, "none")
    assert known.rows_known and not full.rows_known and known.fits
    assert not could_do_better(config, known, 1)


def test_short_rows_are_captured_where_full_ones_leave_no_room() -> None:
    options = {"global_batch_size": 8, "per_device_train_batch_size": 4, "strategy": "ddp"}
    config, full = plan_of(None, "2xH100-80GB", **options)
    assert not full.captured and full.gradient_accumulation_steps == 1
    assert could_do_better(config, full, 2)
    _, known = plan_of(ALPACA, "2xH100-80GB", **options)
    assert known.captured and (known.micro_batch, known.gradient_accumulation_steps) == (4, 1)
    assert not could_do_better(config.replace(capture="off"), full, 2)


def test_what_the_user_says_is_honoured() -> None:
    config, plan = plan_of(ALPACA, global_batch_size=16, per_device_train_batch_size=2)
    assert (plan.micro_batch, plan.gradient_accumulation_steps) == (2, 8)
    assert not could_do_better(config, plan, 1)
    config, plan = plan_of(None, "1xRTX3090-24GB", per_device_train_batch_size=4)
    assert could_do_better(config, plan, 1)
    assert not could_do_better(replace(config, packing=True), plan, 1)


def test_the_plan_counts_what_the_report_will_count() -> None:
    """Full rows of known number and the same rows known give the same memory."""
    for padding_free in ("on", "off"):
        options = {"padding_free": padding_free, "global_batch_size": 8, "per_device_train_batch_size": 4}
        config, known = plan_of(KnownRows([2048] * 64), **options)
        _, full = plan_of(None, **options)
        reason = None if padding_free == "on" else "so"
        (predicted,) = predict_for_rows(config, known, TrainedRows(2048, 8192, padding_free == "off", reason, (), 128))
        assert known.devices[0].memory == predicted
        assert predicted.peak_bytes == pytest.approx(full.devices[0].memory.peak_bytes, rel=0.002)


def test_without_a_tokenizer_lengths_are_not_measured(rows_file: Any) -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        measure_rows(make_config({"model": "/nowhere", "dataset": str(rows_file), "max_seq_length": 64}))


def test_a_plan_that_reads_for_long_says_so(
    tied_model: Any, rows_file: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config({"model": str(tied_model), "dataset": str(rows_file), "max_seq_length": 64})
    config = config.replace(data_cache=False)
    monkeypatch.setattr("parallel_tune.known_rows.SILENT_SECONDS", 600.0)
    measure_rows(config)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("parallel_tune.known_rows.SILENT_SECONDS", 0.01)
    measure_rows(config)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"reading the rows of {rows_file} for the plan\n")


def test_a_broken_tokenizer_is_not_blamed_on_the_rows(tied_model: Any, tmp_path: Path) -> None:
    model = shutil.copytree(tied_model, tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"cannot load the tokenizer of '{model}': KeyError"):
        load_tokenizer(make_config({"model": str(model)}))


def test_lengths_are_measured_without_torch_unless_the_tokenizer_needs_it(
    tied_model: Any, rows_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config({"model": str(tied_model), "dataset": str(rows_file), "max_seq_length": 64})
    config = config.replace(data_cache=False)
    first = measure_rows(config)
    commands: list[list[str]] = []
    run = subprocess.run

    def with_a_needy_tokenizer(command: list[str], **how: Any) -> Any:
        """The same process, in which transformers' own way to a tokenizer imports torch."""
        commands.append(command)
        needy = (
            "import sys; from transformers import AutoTokenizer; load = AutoTokenizer.from_pretrained\n"
            "def needy(*given): import torch; return load(*given)\n"
            "AutoTokenizer.from_pretrained = needy; sys.argv = sys.argv[1:]\n"
            "from parallel_tune.data.measure import main; main()"
        )
        return run([command[0], "-c", needy, *command[3:]], **how)

    monkeypatch.setattr(subprocess, "run", with_a_needy_tokenizer)
    assert measure_rows(config).lengths == first.lengths
    assert [command[-1] == "--without-torch" for command in commands] == [True, False]
    log = tmp_path / "imports.txt"
    command = [sys.executable, "-X", "importtime", "-m", "parallel_tune.data.measure", tmp_path / "out.json"]
    with log.open("w") as errors:
        run([*command, "--without-torch"], input=config.to_yaml(), text=True, stderr=errors, check=True)
    imported = {line.rpartition("|")[2].strip() for line in log.read_text().splitlines()}
    assert "transformers" in imported and not any(name == "torch" or name.startswith("torch.") for name in imported)


def test_lengths_are_measured_once_for_what_they_depend_on(
    tied_model: Any, rows_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, data = shutil.copytree(tied_model, tmp_path / "model"), tmp_path / "rows.jsonl"
    shutil.copy(rows_file, data)
    config = make_config({"model": str(model), "dataset": str(data), "val_size": 6, "max_seq_length": 64})
    started: list[Any] = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *given, **how: started.append(given) or run(*given, **how))
    first = measure_rows(config)
    assert len(started) == 1
    # Those of the rows trained on.
    assert len(first.lengths) == 53 and first.longest == 64 and min(first.lengths) < 20
    assert 0 < first.longest_held_out <= 64
    assert measure_rows(config).lengths == first.lengths and len(started) == 1
    # What is not of the rows changes nothing; what is, does.
    assert measure_rows(config.replace(learning_rate=1e-3, max_steps=3)).lengths == first.lengths and len(started) == 1
    known = lengths_file(config)
    assert known is not None and known.exists()
    for change in ({"max_seq_length": 32}, {"val_size": 7}, {"seed": 1}, {"answers_only": True}, {"max_rows": 9}):
        other = lengths_file(config.replace(**change))
        assert other is not None and not other.exists(), change
    assert lengths_file(config.replace(data_cache=False)) is None
    (model / "tokenizer_config.json").write_text((model / "tokenizer_config.json").read_text() + " ")
    assert lengths_file(config) not in (None, known)
    # A torn file is none.
    lengths_file(config).write_text('{"lengths": [3, ')  # type: ignore[union-attr]
    assert measure_rows(config).lengths == first.lengths and len(started) == 2
    with data.open("a") as file:
        file.write(json.dumps({"instruction": "alpha", "input": "", "output": "beta"}) + "\n")
    assert len(measure_rows(config).lengths) == len(first.lengths) + 1 and len(started) == 3
    template = json.loads((model / "tokenizer_config.json").read_text())
    (model / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}" + str(template.get("chat_template", "")))
    assert lengths_file(config) is None


def test_the_process_that_measures_ends_with_the_command(tmp_path: Path) -> None:
    """Also where the command is killed, so that nobody reads a large dataset for nothing."""
    start = (
        "import os, subprocess, sys\n"
        f"os.environ[{WATCHER!r}] = str(os.getpid())\n"
        "command = [sys.executable, '-P', '-m', 'parallel_tune.data.measure', sys.argv[1]]\n"
        "measuring = subprocess.Popen(command)\n"
        "print(measuring.pid, flush=True)\n"
        "measuring.wait()"
    )
    command = [sys.executable, "-c", start, str(tmp_path / "lengths.json")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        measuring = psutil.Process(int(parent.stdout.readline()))  # it waits for its settings
        parent.kill()
        parent.wait()
        measuring.wait(60)


def test_a_run_plans_for_its_rows(tune: Any, single_run: Any) -> None:
    base = tuple(option for option in tune.base if "per_device" not in option)
    run = replace(tune, base=base)("--strategy=ddp", "--hardware=cpu:2")
    assert run.plan["rows_known"]
    assert (run.plan["micro_batch"], run.plan["gradient_accumulation_steps"]) == (6, 1)
    assert "by the lengths of these rows" in run.out
    assert run.losses == pytest.approx(single_run.losses, rel=1e-5)
    planned = [device["planned_peak_bytes"] for device in run.report["devices"]]
    assert planned == [device["predicted_peak_bytes"] for device in run.report["devices"]]


def test_a_dataset_that_cannot_be_read_ends_it_before_it_begins(tune: Any) -> None:
    base = tuple(option for option in tune.base if "per_device" not in option and "dataset" not in option)
    ended = replace(tune, base=base).ended("--dataset=nowhere.jsonl", "--hardware=cpu:2")
    assert ended.code == 2 and "nowhere.jsonl" in ended.err
    assert not ended.run.exists()
