"""Real scripts under both strategies, on virtual devices of the CPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_model import make_tiny_model

from parallel_tune.unneeded import QUANTIZERS

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "scripts"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


COMMAND = (sys.executable, "-P", "-m", "parallel_tune", "launch", "--output_dir", "run")


def environment(folder: Path) -> dict[str, str]:
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("ACCELERATE_", "TORCHELASTIC_", "SLURM_"))}
    return clean | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture(scope="module")
def without_quantizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment as if none were installed: peft imports them wherever they are, which takes a second a process."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({QUANTIZERS}))\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


def launch(folder: Path, *arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env=environment(folder) | (env or {}),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_trainer_script_runs_on_every_device_beside_a_strategies_package_of_its_own(
    tmp_path: Path, model: Path, without_quantizers: dict[str, str]
) -> None:
    beside = tmp_path / "project"
    (beside / "strategies").mkdir(parents=True)
    (beside / "strategies" / "__init__.py").write_text("OURS = True\n")
    shutil.copy(SCRIPTS / "train_lm.py", beside)
    with (beside / "train_lm.py").open("a") as file:
        file.write(
            "    import parallel_tune, strategies\n    assert strategies.OURS\n    print(parallel_tune.placement())\n"
        )
    data = ROOT / "examples" / "short_answers.jsonl"
    done = launch(
        tmp_path,
        "--strategy",
        "ddp",
        "--hardware",
        "cpu:2",
        beside / "train_lm.py",
        model,
        data,
        "out",
        "--max_steps",
        2,
        env=without_quantizers,
    )
    assert done.returncode == 0, done.stderr
    # Two rows on each of two processes make four of the 266 rows a step.
    assert "'epoch': '0.02985'" in done.stdout
    logs = tmp_path / "run" / "logs"
    for rank in range(2):
        assert f"Placement(strategy='ddp', rank={rank}, world_size=2" in (logs / f"rank-{rank}.log").read_text()
        assert json.loads((logs / f"rank-{rank}.json").read_text())["code"] == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(("strategy", "processes"), [("ddp", 2), ("model_parallel", 1)])
def test_trls_dpo_runs_unmodified(
    tmp_path: Path, model: Path, strategy: str, processes: int, without_quantizers: dict[str, str]
) -> None:
    options = ("--strategy", strategy, "--hardware", "cpu:2")
    done = launch(tmp_path, *options, SCRIPTS / "dpo.py", model, "out", env=without_quantizers)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert len(list((tmp_path / "run" / "logs").glob("rank-*.json"))) == processes
    # Three steps of two rows a process, of 16.
    epoch = re.findall(r"'epoch': '([\d.]+)'", done.stdout)
    assert float(epoch[-1]) == pytest.approx(3 * 2 * processes / 16, rel=0.01)


def test_a_trainer_script_runs_in_one_process_too(
    tmp_path: Path, model: Path, without_quantizers: dict[str, str]
) -> None:
    data = ROOT / "examples" / "short_answers.jsonl"
    options = ("--strategy", "model_parallel", "--hardware", "cpu:2")
    script = (SCRIPTS / "train_lm.py", model, data, "out", "--max_steps", 2)
    done = launch(tmp_path, *options, *script, env=without_quantizers)
    assert done.returncode == 0, done.stderr
    assert "'epoch': '0.01504'" in done.stdout  # two steps of two of the 266 rows
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(("script", "length"), [("unsloth_sft.py", "--max_seq_length"), ("trl_sft.py", "--max_length")])
def test_supervised_fine_tuning_runs_unmodified(tmp_path: Path, model: Path, script: str, length: str) -> None:
    data = ROOT / "examples" / "short_answers.jsonl"
    options = ("--max_steps", 1, length, 64, "--gradient_accumulation_steps", 1)
    done = launch(
        tmp_path, "--strategy", "ddp", "--hardware", "cpu:2", SCRIPTS / script, model, data, "out", *options
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # A step takes four of at most 266 rows, two in each process; one process by itself would take half as many.
    epoch = re.search(r"'epoch': '([\d.]+)'", done.stdout)
    assert epoch and 0.0149 < float(epoch[1]) < 0.0160
    for rank in range(2):
        log = (tmp_path / "run" / "logs" / f"rank-{rank}.log").read_text()
        assert f"process {rank} of 2" in log
        assert f"layers on {['cpu'] * 4}" in log
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_under_model_parallel_a_script_is_one_process(
    tmp_path: Path, model: Path, without_quantizers: dict[str, str]
) -> None:
    options = ("--strategy", "model_parallel", "--hardware", "cpu:2")
    done = launch(tmp_path, *options, SCRIPTS / "reward.py", model, "out", env=without_quantizers)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert [path.name for path in (tmp_path / "run" / "logs").glob("rank-*.json")] == ["rank-0.json"]
    assert "the script runs in one process" in done.stdout


def test_a_map_that_reading_cannot_see_is_refused_as_it_is_loaded(tmp_path: Path, model: Path) -> None:
    (tmp_path / "settings.py").write_text("HOW = {'device_' + 'map': 'auto'}\n")
    (tmp_path / "train.py").write_text(
        "import sys\nfrom settings import HOW\nfrom transformers import AutoModelForCausalLM\n"
        "try:\n    AutoModelForCausalLM.from_pretrained(sys.argv[1], **HOW)\nexcept Exception:\n    pass\n"
        "print('went on')\n"
    )
    done = launch(tmp_path, "--strategy", "ddp", "--hardware", "cpu:1", "train.py", model)
    assert done.returncode == 4
    assert "train.py:5: device_map='auto' splits" in done.stderr
    assert "went on" not in done.stdout


DOORS = {
    "peft": "import peft\npeft.AutoPeftModelForCausalLM.from_pretrained(sys.argv[2], **HOW)",
    "a pipeline": "import transformers\ntransformers.pipeline('text-generation', model=sys.argv[1], **HOW)",
    "a checkpoint": "import accelerate\naccelerate.load_checkpoint_and_dispatch(model(), sys.argv[1], **HOW)",
    "dispatch": "import accelerate\naccelerate.dispatch_model(model(), {'model': 0, 'lm_head': 1})",
    "another name": "from transformers import AutoModel as A\nload = A.from_pretrained\nload(sys.argv[1], **HOW)",
    # Last, since its import changes the others.
    "unsloth": "from unsloth import FastLanguageModel as F\nF.from_pretrained(sys.argv[1], **HOW)",
}
KNOCKING = """
import json, sys, traceback
HOW = {'device_' + 'map': 'auto'}
def model():
    import transformers
    return transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
found = {}
for name, call in json.load(open('doors.json')).items():
    try:
        try:
            exec(compile(call, 'train.py', 'exec'))
        except Exception:
            traceback.print_exc()
        found[name] = [0, 'went on']
    except BaseException as end:
        found[name] = [end.code, end.message]
json.dump(found, open('found.json', 'w'))
"""


@pytest.fixture(scope="module")
def at_the_doors(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, tuple[int, str]]:
    """What a script under ddp meets at each door: the code that would have ended it, and what is said."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("doors")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(target_modules="all-linear"))
    adapted.save_pretrained(folder / "adapter")
    (folder / "doors.json").write_text(json.dumps(DOORS))
    (folder / "train.py").write_text(KNOCKING)
    done = launch(folder, "--strategy", "ddp", "--hardware", "cpu:1", "train.py", model, folder / "adapter")
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, tuple[int, str]] = json.loads((folder / "found.json").read_text())
    return found


@pytest.mark.parametrize("door", DOORS)
def test_the_guard_stands_at_every_door(door: str, at_the_doors: dict[str, tuple[int, str]]) -> None:
    """Past a script's own handlers; how it ends a script, the test above sees."""
    code, said = at_the_doors[door]
    assert code == 4, said
    assert re.search(r"train.py:\d+: device_map=.* splits", said)


def test_a_map_that_reading_sees_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("\n\nload('m', device_map='auto')\n")
    done = launch(tmp_path, "--strategy", "ddp", "--hardware", "cpu:2", "train.py")
    assert done.returncode == 4
    assert "train.py:3: device_map='auto' splits" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_failing_rank_is_named_with_its_log_and_the_others_are_ended(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import os, time\nif os.environ['RANK'] == '1':\n    raise KeyError('lost')\ntime.sleep(600)\n"
    )
    done = launch(tmp_path, "--strategy", "ddp", "--hardware", "cpu:2", "train.py")
    assert done.returncode == 1
    assert "rank 1: KeyError: 'lost'" in done.stderr
    assert "train.py:3" in done.stderr
    assert "rank-1.log" in done.stderr


@pytest.mark.parametrize(
    ("end", "code"), [("sys.exit(0)", 0), ("os._exit(0)", 0), ("sys.exit(75)", 1), ("os._exit(3)", 1)]
)
def test_the_ways_a_script_may_end(tmp_path: Path, end: str, code: int) -> None:
    (tmp_path / "train.py").write_text(f"import os, sys\nprint('arguments', sys.argv[1:], flush=True)\n{end}\n")
    done = launch(tmp_path, "--strategy", "ddp", "--hardware", "cpu:1", "train.py", "--strategy", "mine", "-x")
    assert done.returncode == code
    assert "arguments ['--strategy', 'mine', '-x']" in done.stdout


INTERRUPTED = """
import os, time
print("begun", flush=True)
try:
    time.sleep(600)
except KeyboardInterrupt:
    open("saved-" + os.environ.get("RANK", "0"), "w").close()
    {then}
"""


def ignore_interrupts() -> None:
    """As a shell does for what it starts in the background of a script."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.parametrize(
    ("strategy", "then", "code", "before"),
    [
        ("ddp", "pass", 0, None),
        ("model_parallel", "pass", 0, ignore_interrupts),
        ("ddp", "raise", 1, ignore_interrupts),
        ("model_parallel", "raise", 1, None),
    ],
)
def test_an_interrupt_is_the_scripts_to_handle(
    tmp_path: Path, strategy: str, then: str, code: int, before: Callable[[], None] | None
) -> None:
    """As when it runs by itself: Ctrl-C is a KeyboardInterrupt there, at which many a script saves."""
    (tmp_path / "train.py").write_text(INTERRUPTED.format(then=then))
    command = [*COMMAND, "--strategy", strategy, "--hardware", "cpu:2", "train.py"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            command, env=environment(tmp_path), cwd=tmp_path, stdout=said, stderr=said, start_new_session=True,
            preexec_fn=before,
        )  # fmt: skip
    logs = [tmp_path / "run" / "logs" / f"rank-{rank}.log" for rank in range(2 if strategy == "ddp" else 1)]
    deadline = time.monotonic() + 240
    while not all(log.exists() and "begun" in log.read_text() for log in logs):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "said").read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(240) == code, (tmp_path / "said").read_text()
    assert len(list(tmp_path.glob("saved-*"))) == len(logs)
    assert ("the script was ended by a signal" in (tmp_path / "said").read_text()) == (code == 1)


def test_a_traceback_begins_in_the_script(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import missing_module_of_mine\n")
    done = launch(tmp_path, "--strategy", "ddp", "--hardware", "cpu:1", "train.py")
    assert done.returncode == 1
    assert "ModuleNotFoundError: No module named 'missing_module_of_mine'" in done.stdout
    assert 'train.py", line 1, in <module>' in done.stdout
    assert "runpy" not in done.stdout


def test_an_option_that_is_unknown_is_not_taken_for_the_script(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    done = launch(tmp_path, "--stratgy", "ddp", "train.py")
    assert done.returncode == 2
    assert "No such option" in done.stderr
    assert "--strategy" in done.stderr.partition("--stratgy")[2]


PROJECT = """
import sys
import helper, strategies
print(helper.ABOUT, strategies.OURS, sys.argv[1:], flush=True)
"""


@pytest.mark.parametrize("strategy", ["ddp", "model_parallel"])
@pytest.mark.parametrize("name", ["train.py", "my training.py"])
def test_a_script_in_another_folder_finds_its_neighbours(tmp_path: Path, strategy: str, name: str) -> None:
    folder = tmp_path / "my project"
    (folder / "strategies").mkdir(parents=True)
    (folder / "strategies" / "__init__.py").write_text("OURS = 'mine'\n")
    (folder / "helper.py").write_text("ABOUT = 'a neighbour'\n")
    (folder / name).write_text(PROJECT)
    arguments = ("two words", "--x=a b", "", "$HOME", "--help")
    done = launch(tmp_path, "--strategy", strategy, "--hardware", "cpu:2", folder / name, *arguments)
    assert done.returncode == 0, done.stderr
    assert f"a neighbour mine {list(arguments)}" in done.stdout


def test_a_script_may_be_called_strategies(tmp_path: Path) -> None:
    (tmp_path / "strategies.py").write_text("print('mine runs as', __name__)\n")
    done = launch(tmp_path, "--strategy", "ddp", "--hardware", "cpu:2", "strategies.py")
    assert done.returncode == 0, done.stderr
    assert "mine runs as __main__" in done.stdout
