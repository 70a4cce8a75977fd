"""What is read in a script, with its line, and what is refused for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel_tune.config import TrainConfig
from parallel_tune.hardware import parse_hardware
from parallel_tune.script_launch import choose
from parallel_tune.script_reading import check, read_script
from strategies.errors import ConfigError, NoStrategyFits, StrategiesCombined

SPLITS = [
    'Model.from_pretrained("m", device_map="auto")',
    'options = {"device_map": "balanced"}',
    'options = dict(device_map="sequential")',
    'options["device_map"] = "balanced_low_0"',
    'load("m", device_map={"model.layers.0": 0, "model.layers.1": "cuda:1"})',
]
HARMLESS = [
    'Model.from_pretrained("m", device_map={"": 0})',
    'Model.from_pretrained("m", device_map={"": local_rank})',
    'load("m", device_map={"a": 0, "b": "cuda:0"})',
    'load("m", device_map=None)',
    "load('m', device_map=chosen)",
    'print("device_map=auto")',
    'subprocess.run(["git", "status"])',
    "spawn()",
]
LAUNCHERS = [
    "from accelerate import notebook_launcher\nnotebook_launcher(train, num_processes=2)",
    "import torch.multiprocessing as mp\nmp.spawn(train, nprocs=2)",
    "import torch\ntorch.multiprocessing.spawn(train, nprocs=2)",
    "import os\nos.system(f'torchrun {me}')",
    "import subprocess\nsubprocess.run(['accelerate launch', me])",
    "from subprocess import check_call as go\ngo('deepspeed train.py', shell=True)",
    "import subprocess, sys\nsubprocess.Popen([sys.executable, '-m', 'torch.distributed.run', me])",
]


def script(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "train.py"
    path.write_text(f"# a comment\n{text}\n")
    return path


@pytest.mark.parametrize("text", SPLITS)
def test_a_split_is_refused_under_ddp_alone(tmp_path: Path, text: str) -> None:
    reading = read_script(script(tmp_path, text))
    with pytest.raises(StrategiesCombined, match=r"train.py:2: device_map=.*--strategy ddp") as raised:
        check(reading, "ddp")
    assert "--strategy model_parallel" in raised.value.hint
    check(reading, "model_parallel")


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_trap_passes(tmp_path: Path, text: str) -> None:
    check(read_script(script(tmp_path, text)), "ddp")


@pytest.mark.parametrize("strategy", ["ddp", "model_parallel"])
@pytest.mark.parametrize("text", LAUNCHERS)
def test_a_launcher_inside_is_refused_under_both(tmp_path: Path, text: str, strategy: str) -> None:
    with pytest.raises(StrategiesCombined, match=r"train.py:3: .*starts processes of its own"):
        check(read_script(script(tmp_path, text)), strategy)


def test_a_process_group_is_refused_under_model_parallel_alone(tmp_path: Path) -> None:
    reading = read_script(script(tmp_path, "import torch.distributed as dist\ndist.init_process_group('nccl')"))
    with pytest.raises(StrategiesCombined, match=r"train.py:3: torch.distributed.init_process_group"):
        check(reading, "model_parallel")
    check(reading, "ddp")


def test_what_is_not_python_is_said_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.py:2: not Python"):
        read_script(script(tmp_path, "def"))
    with pytest.raises(ConfigError, match="cannot read the script"):
        read_script(tmp_path / "none.py")


def test_auto_takes_the_size_from_the_script(tmp_path: Path) -> None:
    two_cards = parse_hardware("2xH100-80GB")
    load = "AutoTokenizer.from_pretrained('t')\nAutoModelForCausalLM.from_pretrained('meta-llama/{}')"
    small = read_script(script(tmp_path, load.format("Llama-3.2-1B-Instruct")))
    chosen = choose(TrainConfig(), None, small, two_cards)
    assert (chosen.strategy, chosen.processes, chosen.model) == ("ddp", 2, "meta-llama/Llama-3.2-1B-Instruct")
    large = read_script(script(tmp_path, load.format("Llama-3.3-70B-Instruct")))
    chosen = choose(TrainConfig(load_in_4bit=True, max_seq_length=512), None, large, two_cards)
    assert chosen.plan is not None
    with pytest.raises(NoStrategyFits):
        choose(TrainConfig(strategy="ddp"), "meta-llama/Llama-3.1-8B-Instruct", large, parse_hardware("1xT4-16GB"))


def test_an_unknown_size_needs_a_word_from_the_user(tmp_path: Path) -> None:
    reading = read_script(script(tmp_path, "Model.from_pretrained(name)"))
    two_cards = parse_hardware("2xH100-80GB")
    for strategy in ("auto", "model_parallel"):
        with pytest.raises(ConfigError, match="does not write its model out") as raised:
            choose(TrainConfig(strategy=strategy), None, reading, two_cards)
        assert "--model" in raised.value.hint
    chosen = choose(TrainConfig(strategy="ddp"), None, reading, two_cards)
    assert (chosen.processes, chosen.plan) == (2, None)


def test_auto_follows_a_split_that_the_script_asks_for(tmp_path: Path) -> None:
    reading = read_script(script(tmp_path, SPLITS[0]))
    chosen = choose(TrainConfig(), None, reading, parse_hardware("2xH100-80GB"))
    assert (chosen.strategy, chosen.processes) == ("model_parallel", 1)
    assert "train.py:2" in chosen.lines[0]
