"""Full disks, damaged files, readers that are gone: what is kept, and what is said."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parallel_tune.disk import full_disk
from parallel_tune.rundir import RunDir, create, read_metrics, read_outcome
from strategies.errors import ConfigError, RunFailed

SHORT = ("--strategy=ddp", "--hardware=cpu:1", "--max_steps=3")


def test_weights_that_are_not_finite_are_not_kept() -> None:
    """The loss of a step is finite, its update is not: the next step's loss would say so, after the checkpoint."""
    from parallel_tune.training import GlobalBatchTrainer

    trainer: Any = SimpleNamespace(_trained=[torch.ones(2), torch.ones(2)], state=SimpleNamespace(global_step=7))
    GlobalBatchTrainer.require_finite_weights(trainer)
    trainer._trained[1][0] = float("nan")
    with pytest.raises(RunFailed, match="not finite after step 7, and are not saved"):
        GlobalBatchTrainer.require_finite_weights(trainer)


def test_a_signal_before_training_is_not_swallowed_by_a_librarys_try(single_run: Any, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(single_run.run, tmp_path / "run")))
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from parallel_tune.rundir import RunDir\n"
        "from parallel_tune.worker import end_at_signal\n"
        "end_at_signal(RunDir(Path(sys.argv[1])), 0)\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "except Exception:\n"
        "    pass\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(run.path)], timeout=240, check=False)
    assert ended.returncode == 1
    outcome = read_outcome(run, 0)
    assert outcome is not None and outcome.message == "ended by SIGTERM before training began"


def test_a_run_whose_report_was_lost_is_exported(single_run: Any, tmp_path: Path) -> None:
    """It was killed between the two: `resume` rightly calls it finished."""
    run = Path(shutil.copytree(single_run.run, tmp_path / "run"))
    (run / "report.json").unlink()
    command = [sys.executable, "-m", "parallel_tune", "export", str(run), "--save_path", str(tmp_path / "out")]
    subprocess.run(command, check=True, timeout=240)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert (tmp_path / "out" / "README.md").exists()


def test_exports_are_made_where_nobody_reads_what_is_said(tune: Any) -> None:
    """`parallel-tune ... | head`: the reader leaves in the middle of the run."""
    run = tune.folder / "unread"
    command = [sys.executable, "-m", "parallel_tune", *tune.base, *SHORT, "--output_dir", str(run), "--save_model"]
    reader, writer = os.pipe()
    process = subprocess.Popen(command, stdout=writer, stderr=subprocess.DEVNULL)
    os.close(writer)
    with os.fdopen(reader) as lines:
        for line in lines:
            if line.startswith("run directory"):
                break
    assert process.wait(240) == 0
    assert (run / "merged_16bit").is_dir()


@pytest.mark.parametrize("content", [b"", b"a: [b\n c: ", b"\xff\xfe\x00", b"- 1\n"])
def test_damaged_settings_are_named(content: bytes, single_run: Any, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(single_run.run, tmp_path / "run")))
    run.config.write_bytes(content)
    with pytest.raises(ConfigError, match="is damaged"):
        run.read()


def test_rows_before_damaged_bytes_are_read(single_run: Any, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(single_run.run, tmp_path / "run")))
    rows = read_metrics(run)
    with run.metrics.open("ab") as file:
        file.write(b'\xff\xfe{"step":')
    assert rows and read_metrics(run) == rows


def test_pages_are_drawn_without_values_that_are_not_finite(single_run: Any, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(single_run.run, tmp_path / "run")))
    rows = read_metrics(run)
    rows[-1]["loss"] = float("inf")
    rows.append({"step": rows[-1]["step"], "epoch": 1.0, "eval_loss": float("nan")})
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for verb in (["report", str(run.path)], ["compare", str(run.path), str(single_run.run), "--output", str(tmp_path)]):
        subprocess.run([sys.executable, "-m", "parallel_tune", *verb], check=True, timeout=240)


def test_a_damaged_report_is_named(single_run: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(single_run.run, tmp_path / "run"))
    (run / "report.json").write_text('{"strat')
    verb = [sys.executable, "-m", "parallel_tune", "report", str(run)]
    ended = subprocess.run(verb, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 2
    assert "report.json is damaged" in ended.stderr


@pytest.mark.parametrize("name", ["x" * 300, os.fsdecode(b"u\xff")])
def test_a_path_that_cannot_be_written_is_refused_before_training(name: str, single_run: Any, tmp_path: Path) -> None:
    config, plan = RunDir(single_run.run).read()
    with pytest.raises(ConfigError):
        create(config.replace(output_dir=str(tmp_path / name)), plan)


def make_runs(made: Path, options: dict[str, Any], folders: list[Path], begin: Any, ends: Any) -> None:
    config, plan = RunDir(made).read()
    for folder in folders:
        os.chdir(folder)
        begin.wait()
        try:
            ends.put((folder.name, str(create(config.replace(**options), plan, now=0.0).path)))
        except ConfigError as error:
            ends.put((folder.name, error.message))


@pytest.mark.parametrize("options", [{"output_dir": None}, {"output_dir": "same"}])
def test_of_two_runs_that_begin_at_once_none_takes_the_others_directory(
    options: dict[str, Any], single_run: Any, tmp_path: Path
) -> None:
    """As in a shell's loop over learning rates, each in the background."""
    folders = [tmp_path / str(number) for number in range(20)]
    for folder in folders:
        folder.mkdir()
    context = multiprocessing.get_context("spawn")
    begin, ends = context.Barrier(2), context.Queue()
    arguments = (single_run.run, options, folders, begin, ends)
    both = [context.Process(target=make_runs, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    said = [ends.get(timeout=60) for _ in range(2 * len(folders))]
    for process in both:
        process.join()
    assert len(set(said)) == len(said)
    refused = sum("same holds a run already" in words for _, words in said)
    assert refused == (0 if options["output_dir"] is None else len(folders))


def test_a_disk_with_room_is_not_called_full(tmp_path: Path) -> None:
    assert full_disk(tmp_path) == ""
    assert full_disk(tmp_path / "gone") == ""


def test_a_dataset_that_the_ranks_read_differently_is_refused(tune: Any, tied_model: Path, tmp_path: Path) -> None:
    """It stands for a file that somebody still writes to: each process finds its own environment in this one."""
    text = tmp_path / "changing.txt"
    text.symlink_to("/proc/self/environ")
    data = (f"--model={tied_model}", f"--dataset={text}", "--max_seq_length=64", "--max_steps=2")
    run = f"--output_dir={tmp_path / 'run'}"
    ended = tune.ended("--strategy=ddp", "--hardware=cpu:2", *data, run, base=False)
    assert ended.code == 2, ended.err
    assert "changing.txt changed while it was read" in ended.err


def test_a_missing_home_folder_is_named(tune: Any) -> None:
    """A container's user may have none."""
    ended = tune.ended(*SHORT, env={"XDG_CACHE_HOME": "~nobody-of-this-name/cache"})
    assert ended.code == 2, ended.err
    assert "no home folder in which the cache ~nobody-of-this-name/cache could lie" in ended.err
    assert "Set HOME or XDG_CACHE_HOME" in ended.err
