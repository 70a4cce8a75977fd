"""Whole runs in lanes: bit for bit what one micro-batch after the other gives."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from started_commands import Runner
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(60))]
UNKNOWN_TO_THE_MODEL = "beyond"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def folder_of_rows(path: Path, last_prompt: str = "w1") -> Path:
    """Rows of unequal lengths; the last one's prompt may be special, and is the longest."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for number in range(16):
        words = [f"w{int(word)}" for word in torch.randint(60, (24,), generator=generator)]
        rows.append({"instruction": " ".join(words[: 1 + number % 9]), "output": " ".join(words[9 : 10 + number % 8])})
    rows.append({"instruction": " ".join([last_prompt] * 30), "output": "w1"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, which knows a word more than the model."""
    folder = tmp_path_factory.mktemp("lanes")
    words = {word: number for number, word in enumerate([*WORDS, UNKNOWN_TO_THE_MODEL])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    folder_of_rows(folder / "rows.jsonl")
    return folder


def base(folder: Path) -> tuple[str, ...]:
    """Options of all runs."""
    return (
        "--model", str(folder / "model"), "--dataset", str(folder / "rows.jsonl"), "--engine", "transformers",
        "--strategy", "model_parallel", "--r", "2", "--max_seq_length", "64", "--global_batch_size", "5",
        "--per_device_train_batch_size", "1", "--warmup_steps", "0", "--learning_rate", "1e-2",
    )  # fmt: skip


def command(folder: Path, run: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "parallel_tune", *base(folder), "--output_dir", str(run), *options]


def start(folder: Path, run: Path, *options: str) -> Path:
    done = subprocess.run(command(folder, run, *options), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    log = run / "logs" / "rank-0.log"
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:] + (log.read_text() if log.exists() else "")
    return run


def figures(run: Path) -> list[Any]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row.get("loss"), row.get("grad_norm"), row.get("eval_loss")) for row in rows]


def weights(run: Path) -> dict[str, torch.Tensor]:
    folder = next(path for path in (run / "adapter", run / "model") if path.exists())
    return dict(load_file(next(folder.glob("*.safetensors"))))


def same_weights(left: Path, right: Path) -> bool:
    one, other = weights(left), weights(right)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


SAVING = ("--hardware", "cpu:2", "--val_size", "3", "--eval_steps", "2", "--save_steps", "2", "--max_steps", "5")

THREE = (
    "--hardware", "cpu:1", "--stages", "3", "--full_finetuning", "--use_gradient_checkpointing", "full",
    "--max_steps", "3", "--logging_steps", "2",
)  # fmt: skip
DROPOUT = ("--hardware", "cpu:2", "--lora_dropout", "0.3", "--max_steps", "3", "--pipeline", "on")
FOUR = ("--hardware", "cpu:3", "--stages", "4", "--max_steps", "3")
RUNS = {
    "two stages": (*SAVING, "--pipeline", "off"),
    "two stages, lanes": (*SAVING, "--pipeline", "on"),
    "three stages": (*THREE, "--pipeline", "off"),
    "three stages, lanes": (*THREE, "--pipeline", "on", "--lanes", "2"),
    "dropout, two lanes": (*DROPOUT, "--lanes", "2"),
    "dropout, four lanes": (*DROPOUT, "--lanes", "4"),
    "four stages": (*FOUR, "--pipeline", "off"),
    "four stages, lanes": (*FOUR, "--pipeline", "on", "--lanes", "3"),
}


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    ended = Runner(tmp_path_factory.mktemp("runs"), base(folder)).in_turn(*RUNS.values())
    return {name: each.run for name, each in zip(RUNS, ended, strict=True)}


@pytest.fixture(scope="module")
def in_lanes(runs: dict[str, Path]) -> Path:
    return runs["two stages, lanes"]


def test_two_stages_give_the_naive_losses_norms_and_weights(runs: dict[str, Path], in_lanes: Path) -> None:
    naive = runs["two stages"]
    assert json.loads((naive / "plan.json").read_text())["lanes"] == 1
    assert json.loads((in_lanes / "plan.json").read_text())["lanes"] == 2
    assert len(figures(naive)) > 5
    assert figures(naive) == figures(in_lanes)
    assert same_weights(naive, in_lanes)


def test_the_report_has_lanes_crossings_and_busy_shares(in_lanes: Path) -> None:
    report = json.loads((in_lanes / "report.json").read_text())
    assert (report["lanes"], report["lanes_reason"]) == (2, None)
    # Five steps of five micro-batches; evaluation crosses forwards only.
    (boundary,) = report["crossings"]
    assert boundary["backward"] == 25
    assert boundary["forward"] > 25
    assert all(0 < device["busy_share"] <= 1 for device in report["devices"])
    timeline = json.loads((in_lanes / "timeline.json").read_text())
    assert timeline["step"] == 5
    assert {(segment["stage"], segment["direction"]) for segment in timeline["segments"]} == {
        (0, "forward"), (1, "forward+backward"), (0, "backward"),
    }  # fmt: skip


def test_a_resumed_run_goes_on_with_the_same_bits_in_more_lanes_too(in_lanes: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(in_lanes, again)
    plan = json.loads((again / "plan.json").read_text())
    (again / "plan.json").write_text(json.dumps({**plan, "lanes": 3}))
    shutil.rmtree(again / "adapter")
    for later in ("checkpoint-4", "checkpoint-5"):
        shutil.rmtree(again / later)
    lines = (again / "metrics.jsonl").read_text().splitlines(keepends=True)
    (again / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] < 3))
    done = subprocess.run(
        [sys.executable, "-m", "parallel_tune", "resume", str(again)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming from checkpoint-2" in done.stdout
    assert json.loads((again / "report.json").read_text())["lanes"] == 3
    rows = {step: rest for step, *rest in figures(in_lanes) if rest[0] is not None}
    assert {step: rest for step, *rest in figures(again) if rest[0] is not None} == rows
    assert same_weights(in_lanes, again)


def test_three_stages_two_lanes_full_finetuning_checkpoints_and_tied_weights(runs: dict[str, Path]) -> None:
    naive, lanes = runs["three stages"], runs["three stages, lanes"]
    assert len(json.loads((lanes / "plan.json").read_text())["devices"]) == 3
    assert figures(naive) == figures(lanes)
    assert same_weights(naive, lanes)


def test_dropout_does_not_depend_on_the_number_of_lanes(runs: dict[str, Path]) -> None:
    two, four = runs["dropout, two lanes"], runs["dropout, four lanes"]
    assert figures(two) == figures(four)
    assert same_weights(two, four)


def test_an_error_in_a_lane_ends_the_run_with_it(folder: Path, tmp_path: Path) -> None:
    rows = folder_of_rows(tmp_path / "rows.jsonl", UNKNOWN_TO_THE_MODEL)
    # All rows in one step: the longest of them is neither the first micro-batch nor the last.
    options = ("--dataset", str(rows), "--global_batch_size", "17", "--max_steps", "2", "--hardware", "cpu:2")
    argv = command(folder, tmp_path / "run", *options, "--pipeline", "on")
    done = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "IndexError" in done.stdout + done.stderr
    assert "in _micro_batch" in json.loads((tmp_path / "run" / "logs" / "rank-0.json").read_text())["trace"]


def test_an_interrupted_run_in_lanes_leaves_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    argv = command(folder, run, "--hardware", "cpu:2", "--num_train_epochs", "2000", "--pipeline", "on")
    with subprocess.Popen(argv, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None and not (run / "metrics.jsonl").exists():
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 75
        finally:
            process.kill()
    assert list(run.glob("checkpoint-*/complete.json"))


def test_a_model_that_cannot_be_cut_says_why_and_trains(folder: Path, tmp_path: Path) -> None:
    """The routers' auxiliary loss reaches back to every layer."""
    model = tmp_path / "mixtral"
    shutil.copytree(folder / "model", model)
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        num_experts_per_tok=1,
        output_router_logits=True,
    )
    made = transformers.AutoModelForCausalLM.from_config(config)
    (model / "model.safetensors").unlink()
    made.save_pretrained(model)
    options = ("--model", str(model), "--hardware", "cpu:2", "--max_steps", "2", "--full_finetuning")
    run = start(folder, tmp_path / "on", *options, "--pipeline", "on")
    reason = json.loads((run / "report.json").read_text())["lanes_reason"]
    assert reason is not None
    log = (run / "logs" / "rank-0.log").read_text()
    assert log.count(f"one after the other, since {reason}") == 1
    # The first step found it out; the naive ones after it are timed as such.
    segments = json.loads((run / "timeline.json").read_text())["segments"]
    assert all(one["end"] <= other["start"] for one, other in pairwise(segments))


def test_a_layer_a_stage_and_fewer_lanes_than_stages(runs: dict[str, Path]) -> None:
    naive, lanes = runs["four stages"], runs["four stages, lanes"]
    plan = json.loads((lanes / "plan.json").read_text())
    assert ([device["layers"] for device in plan["devices"]], plan["lanes"]) == ([[i, i] for i in range(4)], 3)
    assert figures(naive) == figures(lanes)
    assert same_weights(naive, lanes)
    for run in (naive, lanes):
        segments = json.loads((run / "timeline.json").read_text())["segments"]
        assert len(segments) == 5 * 7
        report = json.loads((run / "report.json").read_text())
        assert all(0 < device["busy_share"] < 1 for device in report["devices"])
        assert len(report["stage_seconds"]["seconds"]) == 4


@pytest.mark.parametrize("pipeline", ["on", "off"])
def test_a_loss_that_is_no_number_ends_the_run_with_its_step(folder: Path, tmp_path: Path, pipeline: str) -> None:
    options = ("--hardware", "cpu:2", "--max_steps", "9", "--learning_rate", "1e30", "--pipeline", pipeline)
    argv = command(folder, tmp_path / "run", *options)
    done = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"the loss is (nan|inf) at step \d", done.stdout + done.stderr)
