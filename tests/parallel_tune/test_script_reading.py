"""What is read in a script, with its line, and what is refused for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel_tune.config import TrainConfig
from parallel_tune.hardware import parse_hardware
from parallel_tune.script_launch import choose
from parallel_tune.script_reading import check, check_order, read_script
from strategies.errors import ConfigError, NoStrategyFits, StrategiesCombined

SPLITS = [
    'Model.from_pretrained("m", device_map="auto")',
    'options = {"device_map": "balanced"}',
    'options = dict(device_map="sequential")',
    'FastLanguageModel.from_pretrained("m", device_map="unsloth_balanced")',
    'FastLanguageModel.from_pretrained("m", device_map="unsloth")',
    'options["device_map"] = "balanced_low_0"',
    'load("m", device_map={"model.layers.0": 0, "model.layers.1": "cuda:1"})',
    'kwargs.setdefault("device_map", "auto")',
    'args.device_map = "balanced"',
    'setattr(args, "device_map", "auto")',
    'options |= {"device_map": "auto"}',
    'functools.partial(Model.from_pretrained, device_map="auto")',
]
BY_NAME = [
    "device_map: str = 'auto'\nModel.from_pretrained('m', device_map=device_map)",
    'MAP = {"model.layers.0": 0, "model.layers.1": 1}\nModel.from_pretrained("m", device_map=MAP)',
    'HOW = "auto"\nModel.from_pretrained("m", **{"device_map": HOW})',
    'HOW = "auto"\nFastLanguageModel.from_pretrained("m", device_map=HOW)',
]
HARMLESS = [
    "def load(name, device_map='auto'): return Model.from_pretrained(name, device_map=device_map)\nload('m', {'': 0})",
    'Model.from_pretrained("m", device_map={"": 0})',
    'Model.from_pretrained("m", device_map={"": local_rank})',
    'load("m", device_map={"a": 0, "b": "cuda:0"})',
    'load("m", device_map=None)',
    "load('m', device_map=chosen)",
    'print("device_map=auto")',
    'subprocess.run(["git", "status"])',
    "spawn()",
    "# device_map='auto', then torchrun train.py",
    '"""Run with: torchrun train.py, or device_map=auto."""',
    'parser.add_argument("--device_map", default="auto")',
    "device_map = 'auto'\nif ddp:\n    device_map = {'': rank}\nload('m', device_map=device_map)",
    "load('m', device_map='auto' if world_size == 1 else {'': rank})",
    "if not is_distributed:\n    kwargs['device_map'] = 'auto'",
    "if int(os.environ.get('WORLD_SIZE', 1)) > 1:\n    load('m')\nelse:\n    load('m', device_map='auto')",
    "def load(name, device_map=None): return Model.from_pretrained(name, device_map=device_map)\nload('m')",
    "import os\nrank = int(os.environ['LOCAL_RANK'])",
    "import os\nos.environ.setdefault('LOCAL_RANK', '0')",
    "import os\nif 'RANK' not in os.environ:\n    os.environ['RANK'] = '0'",
    "import subprocess\nsubprocess.run(['grep', 'accelerated', me])",
    "import subprocess\nprint('torchrun'); subprocess.run(command)",
]
LAUNCHERS = [
    "from accelerate import notebook_launcher\nnotebook_launcher(train, num_processes=2)",
    "import torch.multiprocessing as mp\nmp.spawn(train, nprocs=2)",
    "import torch\ntorch.multiprocessing.spawn(train, nprocs=2)",
    "import os\nos.system(f'torchrun {me}')",
    "import subprocess\nsubprocess.run(['accelerate launch', me])",
    "from subprocess import check_call as go\ngo('deepspeed train.py', shell=True)",
    "import subprocess, sys\nsubprocess.Popen([sys.executable, '-m', 'torch.distributed.run', me])",
    "import subprocess\nsubprocess.run(['accelerate', 'launch', me])",
    "from torch import multiprocessing\nmultiprocessing.start_processes(train, nprocs=2)",
    "from torch.distributed.launcher import elastic_launch\nelastic_launch(settings, train)()",
    "from torch.distributed.run import main as go\ngo(['--nproc-per-node=2', me])",
    "from accelerate.commands.launch import launch_command\nlaunch_command(args)",
    "from torch.multiprocessing.spawn import spawn\nspawn(train, nprocs=2)",
    "import torch.distributed.launch\ntorch.distributed.launch.main()",
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


def test_a_notebook_is_no_script(tmp_path: Path) -> None:
    """Its JSON is Python, and the run ended in "name 'null' is not defined"."""
    (tmp_path / "train.ipynb").write_text('{"cells": [], "metadata": {}, "nbformat": 4}')
    with pytest.raises(ConfigError, match="is a notebook") as raised:
        read_script(tmp_path / "train.ipynb")
    assert "jupyter nbconvert --to script" in raised.value.hint


@pytest.mark.parametrize("word", ["python", "python3.12", "torchrun", "accelerate"])
def test_a_command_before_the_script_is_to_be_left_away(word: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot read the script {word}") as raised:
        read_script(Path(word))
    assert raised.value.hint == f"Leave {word} away: the script is started for you."


@pytest.mark.parametrize("words", [["--strategy", "model_parallel"], ["data", "--hardware=cpu:2"]])
def test_options_of_the_launch_behind_a_script_that_has_none_such_are_refused(tmp_path: Path, words: list[str]) -> None:
    """The strategy was decided as if none had been named."""
    path = script(tmp_path, "print('trains')")
    with pytest.raises(ConfigError, match=r"stands behind .*train.py"):
        check_order(path, words, {"model"})
    check_order(path, words, {"strategy", "hardware"})
    check_order(script(tmp_path, "parser.add_argument('--strategy')\nhardware = 1"), words, ())
    check_order(path, ["--batch_size", "2"], ())


@pytest.mark.parametrize("text", BY_NAME)
def test_a_map_that_is_a_name_for_something_written_once_is_read(tmp_path: Path, text: str) -> None:
    with pytest.raises(StrategiesCombined, match=r"train.py:3: device_map="):
        check(read_script(script(tmp_path, text)), "ddp")


def test_a_command_that_is_a_name_is_read(tmp_path: Path) -> None:
    text = "import subprocess\ncommand = ['torchrun', me]\nsubprocess.run(command, check=True)"
    with pytest.raises(StrategiesCombined, match=r"train.py:4: subprocess.run\(\) with torchrun"):
        check(read_script(script(tmp_path, text)), "ddp")


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
@pytest.mark.parametrize(
    "text",
    [
        "os.environ['{}'] = '0'",
        "os.environ.update({{'{}': '0'}})",
        "os.environ.update({}='0')",
        "os.putenv('{}', '0')",
    ],
)
@pytest.mark.parametrize("strategy", ["ddp", "model_parallel"])
def test_a_script_that_names_its_own_rank_is_refused(tmp_path: Path, name: str, text: str, strategy: str) -> None:
    """Under ddp every process would be the same one; under model_parallel accelerate would look for others."""
    reading = read_script(script(tmp_path, f"import os\n{text.format(name)}"))
    with pytest.raises(StrategiesCombined, match=rf"train.py:3: .*{name}"):
        check(reading, strategy)


@pytest.mark.parametrize("strategy", ["ddp", "model_parallel"])
def test_a_script_that_chooses_its_gpus_is_refused_where_there_are_several(tmp_path: Path, strategy: str) -> None:
    reading = read_script(script(tmp_path, "import os\nos.environ['CUDA_VISIBLE_DEVICES'] = '0'"))
    with pytest.raises(ConfigError, match=r"train.py:3: .*CUDA_VISIBLE_DEVICES") as raised:
        check(reading, strategy, gpus=2)
    assert "CUDA_VISIBLE_DEVICES=0 parallel-tune launch" in raised.value.hint
    check(reading, strategy, gpus=1)
    check(reading, strategy)
    if_unset = "import os\nif not os.getenv('CUDA_VISIBLE_DEVICES'):\n    os.environ['CUDA_VISIBLE_DEVICES'] = '0'"
    check(read_script(script(tmp_path, if_unset)), strategy, gpus=2)


@pytest.mark.parametrize("strategy", ["ddp", "model_parallel"])
def test_data_parallel_inside_one_process_is_refused_where_there_are_several(tmp_path: Path, strategy: str) -> None:
    reading = read_script(script(tmp_path, "from torch import nn\nmodel = nn.DataParallel(model)"))
    with pytest.raises(StrategiesCombined, match=r"train.py:3: torch.nn.DataParallel"):
        check(reading, strategy, gpus=2)
    check(reading, strategy)


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
    guarded = "import torch.distributed as dist\nif world_size > 1:\n    dist.init_process_group('nccl')"
    check(read_script(script(tmp_path, guarded)), "model_parallel")


@pytest.mark.parametrize(
    "text",
    [
        "AutoModelForCausalLM.from_pretrained('org/m')",
        "MODEL = 'org/m'\nFastLanguageModel.from_pretrained(model_name=MODEL)",
        "load = AutoModelForCausalLM.from_pretrained\nload('org/m')",
        "from transformers import AutoModelForCausalLM as Auto\nAuto.from_pretrained('org/m')",
        "SFTTrainer(model='org/m', args=args)",
    ],
)
def test_the_model_is_read_where_it_is_written_out(tmp_path: Path, text: str) -> None:
    assert read_script(script(tmp_path, text)).models == ("org/m",)


NOTEBOOK = """
from unsloth import FastLanguageModel
max_seq_length, dtype = 4096, None
load_in_4bit = {}
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name = "meta-llama/Llama-3.1-8B-Instruct", max_seq_length = 1024, dtype = dtype, load_in_4bit = load_in_4bit)
if False:
    model, tokenizer = FastLanguageModel.from_pretrained(model_name = "lora_model", load_in_4bit = False)
"""


def test_the_plan_counts_the_weights_as_the_script_loads_them(tmp_path: Path) -> None:
    """A script that fits each of two T4s in 4 bit was split, for the size that it would have in 16."""
    cards = parse_hardware("2xT4-16GB")
    four, sixteen = (read_script(script(tmp_path, NOTEBOOK.format(said))) for said in ("True", "False"))
    assert four.models == ("meta-llama/Llama-3.1-8B-Instruct",)
    assert dict(four.loads) == {"load_in_4bit": True, "max_seq_length": 1024}
    chosen = choose(TrainConfig(), None, four, cards)
    assert (chosen.strategy, chosen.processes) == ("ddp", 2)
    assert "on 4-bit weights and rows of 1024 tokens" in chosen.lines[-1]
    assert choose(TrainConfig(), None, sixteen, cards).strategy == "model_parallel"
    assert choose(TrainConfig(), None, four, cards, {"load_in_4bit"}).strategy == "model_parallel"


@pytest.mark.parametrize(
    ("text", "loads"),
    [
        ("FastLanguageModel.from_pretrained('m')", {"load_in_4bit": True}),
        ("FastLanguageModel.from_pretrained('m', load_in_8bit=True)", {}),
        ("FastModel.from_pretrained('m', **options)", {}),
        ("FastModel.from_pretrained('m', full_finetuning=True)", {"full_finetuning": True}),
        ("FastModel.from_pretrained('m', load_in_4bit=args.load_in_4bit)", {}),
        ("FastModel.from_pretrained('m', max_seq_length=0, load_in_4bit=False)", {}),
        ("q = BitsAndBytesConfig(load_in_4bit=True)\nAutoModel.from_pretrained('m', quantization_config=q)",
         {"load_in_4bit": True}),
        ("AutoModelForCausalLM.from_pretrained('m')", {}),
    ],
)  # fmt: skip
def test_how_a_model_is_loaded_is_read_where_it_is_written_out(
    tmp_path: Path, text: str, loads: dict[str, object]
) -> None:
    assert dict(read_script(script(tmp_path, text)).loads) == loads


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
