"""Runs that are stopped, killed or torn: every process ends, the command says what happened, and a resume is exact.

`noted_ddp` and `noted_split` are the built-in strategies with faults that a test can place at a step (third_party/).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from started_commands import Alive, Command, Ended, Once, finding_processes, unfinished_copy

DDP = ("--strategy=noted_ddp", "--hardware=cpu:2", "--save_steps=2", "--save_total_limit=2")
SPLIT = ("--strategy=noted_split", "--hardware=cpu:2", "--save_steps=2", "--save_total_limit=2")
DDP_PASSES, SPLIT_PASSES = 3, 6
"""Forward passes of one rank in a step."""


@pytest.fixture(scope="module")
def alive() -> Iterator[Alive]:
    """Finds the processes whose command line names a run, also for runs that several tests look at."""
    with finding_processes() as find:
        yield find


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("checkpoint-*"))


def wait_until_none(alive: Alive, run: Path) -> None:
    deadline = time.monotonic() + 60
    while alive(run):
        assert time.monotonic() < deadline, f"still alive: {alive(run)}"
        time.sleep(0.05)


def resumed_losses(run: Any) -> dict[int, float]:
    """Losses by step; where a step was trained twice, both must agree."""
    losses: dict[int, float] = {}
    for row in run.metrics:
        assert row["loss"] == pytest.approx(losses.setdefault(row["step"], row["loss"]), rel=1e-6)
    return losses


def test_checkpoints_are_kept_as_many_as_asked(ddp_run: Any, split_run: Any) -> None:
    for run in (ddp_run, split_run):
        assert checkpoints(run.run) == ["checkpoint-10", "checkpoint-8"]
        assert not list(run.run.rglob("training_args.bin"))


def test_a_finished_run_is_not_resumed(tune: Any, split_run: Any) -> None:
    again = tune.ended("resume", str(split_run.run), base=False)
    assert again.code == 2
    assert f"{split_run.run} is finished" in again.err


def test_a_second_run_into_the_same_directory_is_refused(tune: Any, split_run: Any) -> None:
    again = tune.ended("--strategy=ddp", "--hardware=cpu:1", f"--output_dir={split_run.run}", shared_output=False)
    assert again.code == 2
    assert "holds a run already" in again.err
    assert "parallel-tune resume" in again.err


def test_a_folder_that_is_no_run_is_not_resumed(tune: Any, tmp_path: Path) -> None:
    ended = tune.ended("resume", str(tmp_path), base=False)
    assert ended.code == 2
    assert "is not a run directory" in ended.err


TORN_ROW = '{"step": 6, "lo'


class Faults:
    """A folder in which the third party's strategies leave their notes, and the environment in which they fail."""

    def __init__(self, tune: Any, third_party: Path, name: str, fault: str) -> None:
        self.notes: Path = tune.folder / f"notes-{name}"
        self.notes.mkdir()
        self.env = {"PYTHONPATH": str(third_party), "NOTES": str(self.notes), "FAULT": fault}


@pytest.fixture(scope="module")
def killed(tune: Any, third_party: Path, once: Once, alive: Alive) -> Ended:
    """A run of ddp whose command was killed in its sixth step."""

    def run() -> Ended:
        faults = Faults(tune, third_party, "killed", f"hold:1:{5 * DDP_PASSES + 2}")
        command = tune.start(*DDP, env=faults.env)
        command.wait_for(faults.notes / "held")
        command.send(signal.SIGKILL)
        ended: Ended = command.wait()
        wait_until_none(alive, ended.run)
        assert checkpoints(ended.run) == ["checkpoint-2", "checkpoint-4"]
        return ended

    return once("killed", run)


@pytest.fixture(scope="module")
def interrupted(killed: Ended, tune: Any, third_party: Path, once: Once, alive: Alive) -> Ended:
    """The killed run, resumed beside a torn checkpoint and row, and interrupted in its seventh step."""

    def run() -> Ended:
        torn = killed.run / "checkpoint-4" / "optimizer.pt"
        torn.write_bytes(torn.read_bytes()[:-100])
        with (killed.run / "metrics.jsonl").open("a") as file:
            file.write(TORN_ROW + "\n")
        faults = Faults(tune, third_party, "interrupted", f"hold:0:{4 * DDP_PASSES + 1}")
        command = tune.start("resume", str(killed.run), base=False, env=faults.env, cwd=faults.notes)
        return stop_in_order(command, faults.notes, alive, signal.SIGINT)

    return once("interrupted", run)


@pytest.fixture(scope="module")
def ended_alone(interrupted: Ended, tune: Any, third_party: Path, once: Once, alive: Alive) -> Ended:
    """The interrupted run, resumed once more and trained to its end, at which rank 1 never ends by itself."""

    def run() -> Ended:
        faults = Faults(tune, third_party, "alone", "linger:1:0")
        ended: Ended = tune("resume", str(interrupted.run), base=False, env=faults.env, cwd=faults.notes)
        assert not alive(ended.run)
        rows = (ended.run / "metrics.jsonl").read_text().splitlines()
        (ended.run / "metrics.jsonl").write_text("\n".join(row for row in rows if row != TORN_ROW))
        return ended

    return once("ended_alone", run)


def stop_in_order(
    command: Command,
    notes: Path,
    alive: Alive,
    *signals: signal.Signals,
    left: Sequence[str] = ("checkpoint-6", "checkpoint-7"),
) -> Ended:
    """Signal a run that is held in a step, the seventh say, and let it go; these checkpoints are then there."""
    command.wait_for(notes / "held")
    for number in signals:
        command.send(number)
        command.wait_for_word("stopping after this step")
    (notes / "go").touch()
    stopped = command.wait()
    assert not alive(stopped.run)
    assert checkpoints(stopped.run) == list(left)
    return stopped


def check_stop_and_resume(stopped: Ended, resumed: Ended, uninterrupted: Ended) -> None:
    """What was said at the stop, and that the steps are those of a run without it."""
    assert stopped.code == 75, stopped.err
    message, hint = stopped.err.splitlines()[-2:]
    assert "stopped by a signal after step 7 of 10; checkpoint-7 is on disk" in message
    assert f"parallel-tune resume {stopped.run}" in hint
    assert "resuming from checkpoint-7" in resumed.out
    assert list(resumed_losses(resumed).values()) == pytest.approx(uninterrupted.losses, rel=1e-6)


def test_killing_the_parent_ends_all_and_a_torn_checkpoint_is_passed_over(
    killed: Ended, interrupted: Ended, ended_alone: Ended, ddp_run: Any
) -> None:
    assert killed.code == -signal.SIGKILL
    assert "resuming from checkpoint-2" in interrupted.out
    losses = resumed_losses(ended_alone)
    assert list(losses) == list(range(1, 11))
    assert list(losses.values()) == pytest.approx(ddp_run.losses, rel=1e-6)
    report = ended_alone.report
    assert report["held_out_loss_after"] == pytest.approx(ddp_run.report["held_out_loss_after"], rel=1e-6)
    assert (report["samples"], report["tokens"]) == (106, ddp_run.report["tokens"])
    assert checkpoints(ended_alone.run) == ["checkpoint-10", "checkpoint-8"]


def test_a_signal_stops_a_run_of_ddp_in_order_and_it_goes_on(
    interrupted: Ended, ended_alone: Ended, ddp_run: Any
) -> None:
    check_stop_and_resume(interrupted, ended_alone, ddp_run)


def test_a_signal_to_all_processes_leaves_time_for_the_checkpoint(
    tune: Any, noting: dict[str, str], alive: Alive, tmp_path: Path
) -> None:
    """As `systemctl stop` or `scancel` sends it; torchrun by itself kills what has not ended half a minute later."""
    fault = {"FAULT": f"hold:0:{6 * DDP_PASSES + 1}", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"}
    command = tune.start(*DDP, env=noting | fault)
    command.wait_for(tmp_path / "held")
    for pid in alive(command.run):
        os.kill(pid, signal.SIGTERM)
    command.wait_for_word("stopping after this step")
    time.sleep(3)
    (tmp_path / "go").touch()
    stopped = command.wait()
    assert stopped.code == 75, stopped.err
    assert not alive(stopped.run)
    assert checkpoints(stopped.run) == ["checkpoint-6", "checkpoint-7"]


def test_a_closed_terminal_stops_a_split_in_order_and_it_goes_on(
    tune: Any, noting: dict[str, str], alive: Alive, tmp_path: Path, split_run: Any
) -> None:
    """A shell repeats what the kernel has said."""
    command = tune.start(*SPLIT, env=noting | {"FAULT": f"hold:0:{6 * SPLIT_PASSES + 1}"})
    stopped = stop_in_order(command, tmp_path, alive, signal.SIGHUP, signal.SIGHUP)
    check_stop_and_resume(stopped, tune("resume", str(stopped.run), base=False, env=noting), split_run)


def test_a_run_that_saves_its_best_evaluations_saves_where_it_stops_too(
    tune: Any, noting: dict[str, str], alive: Alive, tmp_path: Path
) -> None:
    """Gradients clipped to nothing make no evaluation better than the first."""
    still = ("--eval_steps=1", "--load_best_model_at_end", "--optim=sgd", "--max_grad_norm=1e-30")
    split = ("--strategy=noted_split", "--hardware=cpu:2")
    command = tune.start(*split, *still, env=noting | {"FAULT": f"hold:0:{2 * SPLIT_PASSES + 1}"})
    stopped = stop_in_order(command, tmp_path, alive, signal.SIGTERM, left=["checkpoint-1", "checkpoint-3"])
    assert stopped.code == 75, stopped.err
    assert "after step 3 of 10; checkpoint-3 is on disk" in stopped.err


@pytest.mark.parametrize(("step", "evaluations"), [(3, []), (5, [5])])
def test_a_stop_is_no_end_of_an_epoch_and_the_evaluation_at_one_is_kept(
    step: int, evaluations: list[int], tune: Any, noting: dict[str, str], alive: Alive, tmp_path: Path
) -> None:
    """An epoch has five steps. What was evaluated counts for early stopping, so a resumed run must know just that."""
    split = ("--strategy=noted_split", "--hardware=cpu:2", "--eval_strategy=epoch")
    command = tune.start(*split, env=noting | {"FAULT": f"hold:0:{(step - 1) * SPLIT_PASSES + 1}"})
    stopped = stop_in_order(command, tmp_path, alive, signal.SIGTERM, left=[f"checkpoint-{step}"])
    assert stopped.code == 75, stopped.err
    state = json.loads((stopped.run / f"checkpoint-{step}" / "trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"] if "eval_loss" in row] == evaluations
    rows = [json.loads(row) for row in (stopped.run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, *evaluations]


@pytest.mark.parametrize("every", ["--eval_steps=3", "--eval_strategy=epoch"])
def test_a_signal_amid_an_evaluation_waits_for_no_further_step(
    every: str, tune: Any, noting: dict[str, str], alive: Alive, tmp_path: Path
) -> None:
    step = 3 if "steps" in every else 5
    split = ("--strategy=noted_split", "--hardware=cpu:2", every)
    command = tune.start(*split, env=noting | {"FAULT": f"hold_evaluation:0:{step * SPLIT_PASSES}"})
    stopped = stop_in_order(command, tmp_path, alive, signal.SIGTERM, left=[f"checkpoint-{step}"])
    assert stopped.code == 75, stopped.err
    assert f"after step {step} of 10; checkpoint-{step} is on disk" in stopped.err
    state = json.loads((stopped.run / f"checkpoint-{step}" / "trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"] if "eval_loss" in row] == [step]


def test_steps_that_were_trained_again_count_once(tmp_path: Path) -> None:
    """A row comes every five steps and at a stop; the checkpoint of the stop was passed over."""
    from parallel_tune.callbacks import MetricsWriter
    from parallel_tune.rundir import RunDir, read_metrics
    from parallel_tune.sampler import GlobalBatches

    session: Any = SimpleNamespace(is_main=True, world_size=1, device=torch.device("cpu"))
    batches = GlobalBatches(lengths=(3,) * 20, targets=(2,) * 20, global_batch=1, seed=0)

    def train(first: int, *rows: int) -> int:
        writer = MetricsWriter(RunDir(tmp_path), batches, session)
        states: list[Any] = [SimpleNamespace(global_step=step, max_steps=20, epoch=0.0) for step in (first, *rows)]
        writer.on_train_begin(None, states[0], None)  # type: ignore[arg-type]
        for state in states[1:]:
            writer.on_log(None, state, None, {"loss": 1.0})  # type: ignore[arg-type]
        return writer.samples

    assert [train(0, 5, 7), train(5, 10), train(10, 15)] == [7, 10, 15]
    assert [row["step"] for row in read_metrics(RunDir(tmp_path))] == [5, 10, 15]


def test_a_step_of_a_split_begins_each_further_generator_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints hold the generator of the first GPU alone: what others draw must follow from the step."""
    from parallel_tune.training import GlobalBatchTrainer
    from strategies import randomness

    devices = [torch.device(name) for name in ("cpu", "meta", "mps")]  # the further ones stand for GPUs
    generators = {device: torch.Generator().manual_seed(place) for place, device in enumerate(devices)}
    monkeypatch.setattr(randomness, "generator_of", generators.__getitem__)

    def draw(*_: Any, **__: Any) -> list[torch.Tensor]:
        return [torch.rand((), generator=generator) for generator in generators.values()]

    def step(number: int) -> list[float]:
        trainer: Any = SimpleNamespace(
            optimizer=None,
            state=SimpleNamespace(global_step=number),
            args=SimpleNamespace(seed=1, device="cpu"),
            accelerator=SimpleNamespace(backward=None),
        )
        schedule: Any = SimpleNamespace(devices=devices, run=draw)
        model = SimpleNamespace(training=True)
        return [float(loss) for loss in GlobalBatchTrainer._run_step(trainer, schedule, model, [], None)]

    first, second, again = step(1), step(2), step(1)
    assert first[1:] == again[1:] and first[0] != again[0]
    assert len({*first, *second}) == 6


def test_a_rank_that_never_ends_is_not_waited_for(ended_alone: Ended) -> None:
    """Rank 0 has said that all is done and on disk."""
    assert ended_alone.report["steps"] == 10


def test_a_flipped_bit_in_a_checkpoint_is_noticed(tune: Any, split_run: Any, tmp_path: Path) -> None:
    run = unfinished_copy(split_run.run, tmp_path / "copy")
    file = run / "checkpoint-10" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    resumed = tune("resume", str(run), base=False)
    assert "checkpoint-10 is passed over: adapter_model.safetensors is not what was written" in resumed.err
    assert "resuming from checkpoint-8" in resumed.out
    assert weights(run) == pytest.approx(weights(split_run.run), rel=1e-5, abs=1e-7)


def test_nothing_is_trained_after_the_last_step(tune: Any, split_run: Any, tmp_path: Path) -> None:
    """The result was lost after the last checkpoint."""
    run = unfinished_copy(split_run.run, tmp_path / "copy")
    resumed = tune("resume", str(run), base=False)
    assert "resuming from checkpoint-10" in resumed.out
    assert [row["step"] for row in resumed.metrics if "loss" in row][-1] == 10
    assert resumed.report["steps"] == 10 and resumed.report["tokens"] == split_run.report["tokens"]
    assert weights(run) == weights(split_run.run)


def test_a_dataset_that_changed_since_is_told(tune: Any, split_run: Any, rows_file: Path, tmp_path: Path) -> None:
    """Twice: the second resume finds the rows of the first."""
    run = unfinished_copy(split_run.run, tmp_path / "copy")
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("\n".join(rows_file.read_text().splitlines()[:50]))
    config = run / "config.yaml"
    # The run may be another test process's, with a path of its own to the same rows.
    begun = config.read_text()
    changed = re.sub("^dataset: .*$", f"dataset: {fewer}", begun, flags=re.MULTILINE)
    assert changed != begun
    config.write_text(changed)
    for _ in range(2):
        resumed = tune("resume", str(run), base=False)
        assert re.search(r"data +50 rows.*\n +CHANGED: the run began with 59 rows", resumed.out)
        shutil.rmtree(run / "adapter")
    config.write_text(begun)
    assert "CHANGED" not in tune("resume", str(run), base=False).out


def test_a_damaged_row_of_figures_does_not_keep_a_run_from_being_resumed(
    tune: Any, split_run: Any, tmp_path: Path
) -> None:
    run = unfinished_copy(split_run.run, tmp_path / "copy")
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"tokens"', '"tokenz"', 1))
    resumed = tune("resume", str(run), base=False)
    assert "the row of step 1 is damaged" in (run / "logs" / "rank-0.log").read_text()
    assert resumed.report["samples"] == split_run.report["samples"] - split_run.metrics[0]["samples"]


def weights(run: Path) -> list[float]:
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    return [float(value) for name in sorted(tensors) for value in tensors[name].flatten()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_all_at_once(
    number: signal.Signals, tune: Any, noting: dict[str, str], alive: Alive, tmp_path: Path
) -> None:
    command = tune.start(*SPLIT, env=noting | {"FAULT": "hold:0:1"})
    command.wait_for(tmp_path / "held")
    command.send(number)
    command.wait_for_word("stopping after this step")
    command.send(number)
    ended = command.wait()
    assert ended.code == 1
    assert "ended by a signal before a checkpoint was written" in ended.err
    assert not alive(ended.run)


def test_a_killed_rank_is_named_and_ends_the_others(tune: Any, noting: dict[str, str], alive: Alive) -> None:
    ended = tune.ended(*DDP, env=noting | {"FAULT": f"kill:1:{3 * DDP_PASSES + 1}"})
    assert ended.code == 1
    assert "parallel-tune: rank 1 ended without a word: killed from outside" in ended.err
    assert "rank-1.log" in ended.err.splitlines()[-1]
    assert not alive(ended.run)
    assert checkpoints(ended.run) == ["checkpoint-2"]


def test_a_killed_launcher_leaves_nobody_behind(
    tune: Any, noting: dict[str, str], alive: Alive, tmp_path: Path
) -> None:
    command = tune.start(*DDP, env=noting | {"FAULT": "hold:0:2"})
    command.wait_for(tmp_path / "held")
    (launcher,) = [p for p in alive(command.run) if b"torch.distributed.run" in Path(f"/proc/{p}/cmdline").read_bytes()]
    os.kill(launcher, signal.SIGKILL)
    ended = command.wait()
    assert ended.code == 1
    assert "rank 0, rank 1 ended without a word" in ended.err
    assert not alive(ended.run)


@pytest.mark.parametrize(("options", "rank"), [(DDP, 1), (SPLIT, 0)])
def test_an_error_of_a_rank_is_told_and_ends_the_others(
    options: tuple[str, ...], rank: int, tune: Any, noting: dict[str, str], alive: Alive
) -> None:
    ended = tune.ended(*options, env=noting | {"FAULT": f"raise:{rank}:4"})
    assert ended.code == 1
    assert f"parallel-tune: rank {rank}: ArithmeticError: the third party's fault" in ended.err
    assert f"rank-{rank}.log" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err
    assert not alive(ended.run)
    again = tune.ended("resume", str(ended.run), base=False)
    assert again.code == 2
    assert re.search("no complete checkpoint", again.err)


def test_adapters_are_read_onto_the_ranks_own_device(
    split_run: Any, tied_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are GPUs, peft would choose one by itself: "cuda", which safetensors takes for the first."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from parallel_tune.model_methods import read_adapters_onto

    base = AutoModelForCausalLM.from_pretrained(tied_model, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, split_run.run / "adapter")
    asked = []
    load = peft.peft_model.load_peft_weights

    def noted(folder: str, device: str, **rest: Any) -> Any:
        asked.append(device)
        return load(folder, device="cpu", **rest)

    monkeypatch.setattr(peft.peft_model, "infer_device", lambda: "cuda")
    monkeypatch.setattr(peft.peft_model, "load_peft_weights", noted)
    checkpoint = str(split_run.run / "checkpoint-8")
    model.load_adapter(checkpoint, "default", is_trainable=True)
    read_adapters_onto(model, torch.device("cuda", 1))
    model.load_adapter(checkpoint, "default", is_trainable=True)
    assert asked == ["cuda", "cuda:1"]
    saved = load_file(split_run.run / "checkpoint-8" / "adapter_model.safetensors")
    held = peft.get_peft_model_state_dict(model)
    assert all(torch.equal(held[name], tensor) for name, tensor in saved.items())
