"""Two GPUs and NCCL: launchers refused and joined, processes killed and stopped in mid-run, the losses of one GPU.

`pytest -m gpu tests/gpu/test_gpu_faults.py -n 6 --dist=worksteal` runs it in about 100 seconds, with the constants of
the machine known.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from card_holders import family, holders
from started_commands import Command, Ended, logs

from parallel_tune.checkpoint import MARK, complete_checkpoints
from parallel_tune.engines import installed
from parallel_tune.launch import without_launcher
from parallel_tune.nvml import read_nvml

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(len(read_nvml()) < 2, reason="needs two GPUs"),
    pytest.mark.filterwarnings("default"),
]
ROOT = Path(__file__).parents[2]
DATASET = ROOT / "examples" / "short_answers.jsonl"
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
SHAPE = "llama-1b"
TWO, ONE = ("--max_devices=2",), ("--max_devices=1",)
STEPS, SAVE_STEPS = 24, 8
LOCAL = ("--local-addr=127.0.0.1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0")
LAUNCHERS = {
    "torchrun": ("-m", "torch.distributed.run", *LOCAL, "--nproc_per_node=2"),
    "accelerate launch": (
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines=1",
        "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0",
    ),
}  # fmt: skip

RANKS = {("0", 0), ("1", 1)}
"""Of two ranks: each holds memory on its own card alone."""

ENDING_SECONDS = 60
"""Far more than the other processes need to end; far less than NCCL would wait for the one that is gone."""

WHOLE_SECONDS = 200
"""Only so that a hang ends."""

LOSS_TOLERANCE = 2e-2
"""Relative. bfloat16 rounds in another order in each run, and steps carry the difference on."""

FIRST_LOSS_TOLERANCE = 1e-3
"""Of a loss before any step, which carries nothing on."""

Alive = Callable[[Path], list[int]]
Whole = Callable[..., Ended]


@pytest.fixture(scope="session")
def clean(checkout: dict[str, str]) -> dict[str, str]:
    """The environment of commands: this checkout, offline, without a launcher's variables."""
    return without_launcher(checkout) | ENVIRONMENT


@pytest.fixture(scope="session")
def whole(tune: Any, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Uninterrupted runs by name, each trained once for all processes of a test run."""
    from filelock import FileLock

    common = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        common = common.parent

    def get(name: str, *options: str) -> Ended:
        path = common / "whole" / name
        path.parent.mkdir(exist_ok=True)
        with FileLock(path.with_name(f"{name}.lock")):
            if not (path / "report.json").exists():
                shutil.rmtree(path, ignore_errors=True)
                tune(path, *options)
        return Ended(0, "", "", path)

    return get


def settings(shape: Callable[[str], Path], strategy: str, engine: str = "transformers") -> tuple[str, ...]:
    """Of a run of LoRA with checkpoints."""
    if engine == "unsloth" and not installed("unsloth"):
        pytest.skip("unsloth is not installed")
    return (
        f"--model={shape(SHAPE)}", f"--dataset={DATASET}", f"--strategy={strategy}", f"--engine={engine}",
        "--max_seq_length=256", "--global_batch_size=8", "--per_device_train_batch_size=2", f"--max_steps={STEPS}",
        f"--save_steps={SAVE_STEPS}", "--warmup_steps=0", "--learning_rate=1e-3",
    )  # fmt: skip


def begin(place: Path, env: dict[str, str], *options: str, before: tuple[str, ...] = ()) -> Command:
    """Start a run into `place`/run, under a launcher if one is given."""
    place.mkdir(exist_ok=True)
    run = place / "run"
    program = ("-m", "parallel_tune", *options, f"--output_dir={run}", "--report_to=none")
    return Command([sys.executable, "-P", *before, *program], env, place, place, run)


def wait_until_none(alive: Alive, run: Path, ours: set[int]) -> None:
    """Until no process of a run is left, and none holds memory on a card."""
    deadline = time.monotonic() + ENDING_SECONDS
    while (left := alive(run)) or ours & holders().keys():
        assert time.monotonic() < deadline, f"alive: {left}; on cards: {ours & holders().keys()}"
        time.sleep(0.1)


def cards_of_ranks(command: Command) -> set[tuple[str, int]]:
    """LOCAL_RANK of each process that held memory on a card while a command ran, or "none", and the card."""
    held: set[tuple[str, int]] = set()
    deadline = time.monotonic() + WHOLE_SECONDS
    while command.process.poll() is None and time.monotonic() < deadline:
        ours = family(command.process.pid)
        for pid, cards in holders().items():
            if pid not in ours:
                continue
            try:
                rank = psutil.Process(pid).environ().get("LOCAL_RANK", "none")
            except psutil.Error:
                continue  # it has ended meanwhile
            held |= {(rank, card) for card in cards}
        time.sleep(0.1)
    return held


def cards_used(run: Ended) -> list[int]:
    return [device["index"] for device in run.report["devices"]]


def assert_it_went_on(resumed: Ended, checkpoint: int, rows_before: int, whole: Ended) -> None:
    """From the checkpoint to the last step, over the same rows at the same rates, with the same losses."""
    again = resumed.metrics[rows_before:]
    assert [row["step"] for row in again] == list(range(checkpoint + 1, STEPS + 1))
    assert [row["step"] for row in whole.metrics] == list(range(1, STEPS + 1))
    by_step = {row["step"]: row for row in whole.metrics}
    for row in resumed.metrics:
        expected = by_step[row["step"]]
        for name in ("samples", "tokens", "learning_rate"):
            assert row[name] == expected[name], (row["step"], name)
    losses = [(row["loss"], by_step[row["step"]]["loss"]) for row in resumed.metrics]
    print("losses, and those of the whole run:", losses)
    assert [loss for loss, _ in losses] == pytest.approx([loss for _, loss in losses], rel=LOSS_TOLERANCE)
    assert resumed.report["steps"] == STEPS
    assert resumed.report["tokens"] == whole.report["tokens"]


def resume(killed: Ended, env: dict[str, str], whole: Ended, expected: set[tuple[str, int]]) -> None:
    """Go on with a run that ended in the middle, each rank on its own card, and compare."""
    checkpoint = int(complete_checkpoints(killed.run)[-1].name.partition("-")[2])
    rows_before = len(killed.metrics)
    assert SAVE_STEPS <= checkpoint <= killed.metrics[-1]["step"] < STEPS
    place = killed.run.parent / "resumed"
    place.mkdir()
    argv = [sys.executable, "-P", "-m", "parallel_tune", "resume", str(killed.run)]
    command = Command(argv, env, place, place, killed.run)
    held = cards_of_ranks(command)
    resumed = command.wait(ENDING_SECONDS)
    assert resumed.code == 0, f"{resumed.err}\n{logs(resumed.run)}"
    assert f"resuming from checkpoint-{checkpoint}" in resumed.out
    assert held == expected
    assert_it_went_on(resumed, checkpoint, rows_before, whole)


def kill_after_a_checkpoint(command: Command, rank: int) -> tuple[Ended, set[int]]:
    """How a run ended whose rank was killed in mid-run, and the processes that it had."""
    checkpoint = command.run / f"checkpoint-{SAVE_STEPS}"
    command.wait_for(checkpoint / MARK)
    ours = family(command.process.pid)
    os.kill(int((command.run / "logs" / f"rank-{rank}.pid").read_text()), signal.SIGKILL)
    return command.wait(ENDING_SECONDS), ours


def assert_killed(ended: Ended, rank: int) -> None:
    assert ended.code == 1, f"{ended.err}\n{logs(ended.run)}"
    assert f"parallel-tune: rank {rank} ended without a word: killed from outside" in ended.err
    assert f"rank-{rank}.log" in ended.err.splitlines()[-1]


@pytest.mark.parametrize(("engine", "capture"), [("transformers", "off"), ("unsloth", "off"), ("transformers", "auto")])
def test_a_killed_rank_ends_all_and_the_run_goes_on(
    engine: str,
    capture: str,
    shape: Callable[[str], Path],
    whole: Whole,
    clean: dict[str, str],
    alive: Alive,
    tmp_path: Path,
) -> None:
    """The other rank waits in a collective of NCCL for one that will never come."""
    options = (*settings(shape, "ddp", engine), f"--capture={capture}", *TWO)
    ended, ours = kill_after_a_checkpoint(begin(tmp_path, clean, *options), rank=1)
    assert_killed(ended, rank=1)
    wait_until_none(alive, ended.run, ours)
    resume(ended, clean, whole(f"{engine}-{capture}", *options), RANKS)


def test_a_killed_split_ends_all_and_the_run_goes_on(
    shape: Callable[[str], Path], whole: Whole, clean: dict[str, str], alive: Alive, tmp_path: Path
) -> None:
    options = (*settings(shape, "model_parallel"), "--capture=off", "--stages=2", *TWO)
    ended, ours = kill_after_a_checkpoint(begin(tmp_path, clean, *options), rank=0)
    assert_killed(ended, rank=0)
    wait_until_none(alive, ended.run, ours)
    uninterrupted = whole("split", *options)
    assert cards_used(uninterrupted) == [0, 1]
    resume(ended, clean, uninterrupted, {("none", 0), ("none", 1)})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_both_ranks_at_one_step_and_the_run_goes_on(
    number: signal.Signals,
    shape: Callable[[str], Path],
    whole: Whole,
    clean: dict[str, str],
    alive: Alive,
    tmp_path: Path,
) -> None:
    options = (*settings(shape, "ddp"), "--capture=off", *TWO)
    command = begin(tmp_path, clean, *options)
    command.wait_for(tmp_path / "run" / f"checkpoint-{SAVE_STEPS}" / MARK)
    ours = family(command.process.pid)
    command.send(number)
    stopped = command.wait(ENDING_SECONDS)
    assert stopped.code == 75, f"{stopped.err}\n{logs(stopped.run)}"
    said = re.search(rf"stopped by a signal after step (\d+) of {STEPS}; checkpoint-(\d+) is on disk", stopped.err)
    assert said and said[1] == said[2]
    assert f"parallel-tune resume {stopped.run}" in stopped.err
    assert complete_checkpoints(stopped.run)[-1].name == f"checkpoint-{said[1]}"
    wait_until_none(alive, stopped.run, ours)
    resume(stopped, clean, whole("transformers-off", *options), RANKS)


@pytest.mark.parametrize("method", ["lora", "4bit"])
@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
def test_two_gpus_have_the_losses_of_one(
    engine: str, method: str, shape: Callable[[str], Path], clean: dict[str, str], tmp_path: Path
) -> None:
    """With an odd number of held-out rows, of which one rank has one more."""
    if method == "4bit" and not installed("bitsandbytes"):
        pytest.skip("needs bitsandbytes")
    quantized = ("--load_in_4bit",) if method == "4bit" else ()
    shared = (*settings(shape, "ddp", engine), *quantized, "--max_steps=8", "--save_steps=0", "--val_size=7")
    commands = [begin(tmp_path / name, clean, *shared, *how) for name, how in (("one", ONE), ("two", TWO))]
    one, two = [command.wait(WHOLE_SECONDS) for command in commands]
    for run in (one, two):
        assert run.code == 0, f"{run.err}\n{logs(run.run)}"
    print(engine, method, one.losses, two.losses)
    assert (one.plan["processes"], two.plan["processes"]) == (1, 2)
    assert one.report["engine"] == two.report["engine"] == engine
    assert [(row["samples"], row["tokens"]) for row in one.metrics] == [
        (row["samples"], row["tokens"]) for row in two.metrics
    ]
    assert two.losses[0] == pytest.approx(one.losses[0], rel=FIRST_LOSS_TOLERANCE)
    assert two.losses == pytest.approx(one.losses, rel=LOSS_TOLERANCE)
    for name, tolerance in (("held_out_loss_before", FIRST_LOSS_TOLERANCE), ("held_out_loss_after", LOSS_TOLERANCE)):
        assert two.report[name] == pytest.approx(one.report[name], rel=tolerance)


def test_the_processes_of_torchrun_train_each_on_a_card_of_its_own(
    shape: Callable[[str], Path], whole: Whole, clean: dict[str, str], alive: Alive, tmp_path: Path
) -> None:
    options = (*settings(shape, "ddp"), "--capture=off")
    command = begin(tmp_path, clean, *options, before=LAUNCHERS["torchrun"])
    held = cards_of_ranks(command)
    joined = command.wait(ENDING_SECONDS)
    assert joined.code == 0, f"{joined.out}\n{joined.err}"
    assert held == RANKS
    assert joined.plan["processes"] == 2 and cards_used(joined) == [0, 1]
    assert joined.out.count("result: ") == 1
    expected = whole("transformers-off", *options, *TWO)
    assert [row["tokens"] for row in joined.metrics] == [row["tokens"] for row in expected.metrics]
    assert joined.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
    wait_until_none(alive, joined.run, set())


# Each child leaves its code and message in a file: launchers replace exit codes and mix outputs.
CHILD = """
import json, os, subprocess, sys
command = [sys.executable, "-P", "-m", "parallel_tune", *sys.argv[2:]]
ended = subprocess.run(command, capture_output=True, text=True)
with open(os.path.join(sys.argv[1], os.environ["RANK"]), "w") as file:
    json.dump([ended.returncode, ended.stderr], file)
"""


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launchers_processes_refuse_to_split_and_touch_no_card(
    launcher: str, shape: Callable[[str], Path], clean: dict[str, str], tmp_path: Path
) -> None:
    script, run = tmp_path / "child.py", tmp_path / "run"
    script.write_text(CHILD)
    arguments = [str(script), str(tmp_path), *settings(shape, "model_parallel"), f"--output_dir={run}"]
    # Without a configuration of accelerate's that the user of this machine may have.
    env = clean | {"HF_HOME": str(tmp_path)}
    command = Command([sys.executable, "-P", *LAUNCHERS[launcher], *arguments], env, tmp_path, tmp_path, run)
    held = cards_of_ranks(command)
    ended = command.wait(ENDING_SECONDS)
    assert ended.code == 0, f"{ended.out}\n{ended.err}"
    for rank in ("0", "1"):
        code, said = json.loads((tmp_path / rank).read_text())
        assert code == 4, said
        assert said.startswith("parallel-tune: --strategy model_parallel splits one model over all devices")
        assert f"but {launcher} started 2 processes" in said
        assert "WORLD_SIZE=2" in said
    assert held == set()
    assert not run.exists()
