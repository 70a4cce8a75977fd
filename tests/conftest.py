"""What the end-to-end tests share: a tiny model, a dataset, a third party's package, and the command."""

from __future__ import annotations

import atexit
import gc
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from compared_runs import PACKED, REPLICAS, RUNS
from started_commands import (
    TIMEOUT_SECONDS,
    Alive,
    Ended,
    Once,
    Runner,
    clean_environment,
    ended_well,
    finding_processes,
)

# Models are tiny and several tests start several processes: more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# What runs teach is kept for later plans: neither for those of whoever tests, nor from test to test.
# The constants of a folder named by PARALLEL_TUNE_TEST_CACHE are taken and kept: on GPUs it spares measuring them anew,
# which cannot be done beside other tests.
CACHE = Path(tempfile.mkdtemp(prefix="parallel-tune-tests-"))
os.environ["XDG_CACHE_HOME"] = str(CACHE)
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
if "PARALLEL_TUNE_TEST_CACHE" in os.environ:
    _kept = Path(os.environ["PARALLEL_TUNE_TEST_CACHE"]).absolute() / "parallel-tune" / "constants"
    _kept.mkdir(parents=True, exist_ok=True)
    (CACHE / "parallel-tune").mkdir()
    (CACHE / "parallel-tune" / "constants").symlink_to(_kept)


def pytest_configure() -> None:
    """Signals mean here what they mean in a terminal, also where nohup or a shell's background started the tests."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    gc.disable()  # until all is imported


def pytest_collection_finish() -> None:
    """Collections of garbage pass over what the imports made, but for the interpreter's last one."""
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)


@pytest.fixture(autouse=True)
def nothing_learned() -> None:
    """Each test plans as on a machine on which no split has run."""
    shutil.rmtree(CACHE / "parallel-tune" / "stages", ignore_errors=True)


BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"

SENTENCE = "alpha beta gamma delta tree house light green river stone cloud music paper window garden"
WORDS = SENTENCE.split()
TEMPLATE = (
    "{% for m in messages %}<|head|>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level tokenizer that knows the dataset's words, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>", "<|head|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([f"{SENTENCE} assistant user"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|head|>"],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(folder: Path, tokenizer: Any, tied: bool) -> Path:
    """A Llama of four layers, with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """Head and embedding are two matrices."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny", tiny_tokenizer, tied=False)


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """Head and embedding are one matrix."""
    return make_model(tmp_path_factory.mktemp("models") / "tied", tiny_tokenizer, tied=True)


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """59 rows in alpaca form, answers of 2 to 180 words: 6 are held out and 53 trained on."""
    draw = random.Random(1)
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with path.open("w") as file:
        for number in range(59):
            words = (2, 4, 9, 20, 45, 180)[number % 6]
            row = {
                "instruction": " ".join(draw.choices(WORDS, k=3)),
                "input": "",
                "output": " ".join(draw.choices(WORDS, k=words)),
            }
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """What commands are started with."""
    return clean_environment()


BATCHING = ("--global_batch_size=12", "--per_device_train_batch_size=2")
LEARNING = ("--num_train_epochs=2", "--learning_rate=2e-3", "--answers_only", "--val_size=6", "--max_seq_length=256")


@pytest.fixture(scope="session")
def tune(tmp_path_factory: pytest.TempPathFactory, tied_model: Path, rows_file: Path) -> Runner:
    """The command, on ten steps of the tied model: two epochs, whose last batch is a small one."""
    data = (f"--model={tied_model}", f"--dataset={rows_file}")
    return Runner(tmp_path_factory.mktemp("runs"), (*data, *BATCHING, *LEARNING))


@pytest.fixture(scope="session")
def third_party(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the third party's package; put it on PYTHONPATH."""
    place = tmp_path_factory.mktemp("third_party")
    source = shutil.copytree(Path(__file__).parent / "third_party", place / "source")
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    pip = [sys.executable, "-m", "pip", "install", *options, "--target", str(place / "installed"), str(source)]
    subprocess.run(pip, check=True, timeout=TIMEOUT_SECONDS)
    return place / "installed"


@pytest.fixture
def load_benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a script of examples/benchmarks, and what it shares with the others."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def small_model(load_benchmark: Callable[[str], Any], tmp_path: Path) -> Path:
    """The model of the benchmarks' small runs, made here: making it in a process of its own takes as long as a run."""
    load_benchmark("shapes").make_model("tiny", tmp_path / "tiny")
    return tmp_path / "tiny"


Install = Callable[..., dict[str, str]]


@pytest.fixture(scope="session")
def package() -> Install:
    """Writes an installed package `other` with one entry point; gives the environment that has it."""

    def install(folder: Path, entry: str, body: str = "") -> dict[str, str]:
        info = folder / "other-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[parallel_tune.strategies]\n{entry}\n")
        (folder / "other.py").write_text(body)
        return {"PYTHONPATH": str(folder)}

    return install


@pytest.fixture
def noting(third_party: Path, tmp_path: Path) -> dict[str, str]:
    """Environment in which the third party's strategies are installed and leave their notes in `tmp_path`."""
    return {"PYTHONPATH": str(third_party), "NOTES": str(tmp_path)}


Read = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def read_notes() -> Read:
    """Reads the notes of all ranks, in their order."""

    def read(folder: Path) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]

    return read


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Gives a command's end by a name; all processes of a test run share the one that ran first."""
    from filelock import FileLock

    common = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        common = common.parent

    def give(name: str, run: Callable[[], Ended]) -> Ended:
        kept = common / f"{name}.json"
        with FileLock(kept.with_suffix(".lock")):
            if not kept.exists():
                ended = run()
                kept.write_text(json.dumps([ended.code, ended.out, ended.err, str(ended.run)]))
        code, out, err, folder = json.loads(kept.read_text())
        return Ended(code, out, err, Path(folder))

    return give


@pytest.fixture(scope="session")
def ddp_run(tune: Runner, once: Once) -> Ended:
    """An uninterrupted run of ddp on two processes, with checkpoints, beside a decoy `strategies` folder."""

    def run() -> Ended:
        cwd = tune.folder / "decoys"
        (cwd / "strategies").mkdir(parents=True)
        (cwd / "strategies" / "__init__.py").write_text("raise SystemExit('the decoy was imported')")
        return tune("--strategy=ddp", "--hardware=cpu:2", "--save_steps=2", "--save_total_limit=2", cwd=cwd)

    return once("ddp_run", run)


@pytest.fixture(scope="session")
def split_run(tune: Runner, once: Once) -> Ended:
    """An uninterrupted run of model_parallel on two stages, with checkpoints."""
    options = ("--strategy=model_parallel", "--hardware=cpu:2", "--save_steps=2", "--save_total_limit=2")
    return once("split_run", lambda: tune(*options))


@pytest.fixture(scope="session")
def single_run(tune: Runner, once: Once) -> Ended:
    """A run of one process on one device."""
    return once("single_run", lambda: tune("--strategy=ddp", "--hardware=cpu:1"))


@pytest.fixture(scope="session")
def compared(tune: Runner, once: Once) -> Callable[[str], Ended]:
    """Gives a run of `compared_runs` by its name; all of as many processes train when the first is asked for."""

    def give(name: str) -> Ended:
        alike = [other for other in RUNS if RUNS[other][0] == RUNS[name][0]]
        last = once(f"compared_{RUNS[name][0]}", lambda: tune.in_turn(*(RUNS[other][1] for other in alike))[-1])
        return ended_well(last.run.with_name(str(alike.index(name))))

    return give


@pytest.fixture(scope="session")
def packed_run(tune: Runner, once: Once) -> Ended:
    """A run of ddp on two processes, on packed rows."""
    unbatched = replace(tune, base=tuple(option for option in tune.base if "batch_size" not in option))
    return once("packed_run", lambda: unbatched(*REPLICAS, *PACKED))


@pytest.fixture
def alive() -> Iterator[Alive]:
    """Finds the processes whose command line names a run; those still there at the end are killed."""
    with finding_processes() as find:
        yield find
