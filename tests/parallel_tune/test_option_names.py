"""Our options against what other tools call theirs: a rename there is noticed here, and the pages stay true."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import options_page as page
import pytest
import yaml
from click.testing import CliRunner

from parallel_tune.cli import program
from parallel_tune.config import SCHEDULES, TrainConfig, fields_by_name

ROOT = Path(__file__).parents[2]
NOT_YET: frozenset[str] = frozenset()


@pytest.mark.parametrize(
    "names",
    [page.UNSLOTH_CLI, page.UNSLOTH_TRAIN, page.TRAINING_ARGUMENTS, page.GONE_BUT_KNOWN, page.TRL, page.LLAMA_FACTORY],
)
def test_every_name_that_the_page_claims_is_taken(names: tuple[str, ...]) -> None:
    assert set(names) - set(fields_by_name()) <= NOT_YET


def test_no_name_stands_for_two_options() -> None:
    names = [name for item in dataclasses.fields(TrainConfig) for name in (item.name, *item.metadata["aliases"])]
    assert len(names) == len(set(names))


def test_training_arguments_are_all_accounted_for() -> None:
    """Fields are ours, or left out for a reason; one that comes, goes or changes its name is seen here."""
    from transformers import TrainingArguments

    fields = {item.name for item in dataclasses.fields(TrainingArguments)}
    left_out = {name for names in page.NOT_OFFERED.values() for name in names}
    assert set(page.TRAINING_ARGUMENTS) | left_out == fields
    assert not set(page.TRAINING_ARGUMENTS) & left_out
    assert not set(page.GONE_BUT_KNOWN) & fields
    # No option of ours takes a name of theirs for something else.
    assert set(fields_by_name()) & left_out == set()


def test_schedules_are_the_installed_ones() -> None:
    from transformers import SchedulerType

    installed = {kind.value for kind in SchedulerType}
    assert set(SCHEDULES) | {"reduce_lr_on_plateau", "greedy"} == installed


def test_trl_still_calls_them_so() -> None:
    from trl import ModelConfig, ScriptArguments, SFTConfig

    fields = {item.name for kind in (ModelConfig, ScriptArguments, SFTConfig) for item in dataclasses.fields(kind)}
    assert {*page.TRL, *page.TRL_ELSEWISE} <= fields


def installed_source(package: str, path: str) -> ast.Module:
    """A module's source, not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return ast.parse((Path(next(iter(spec.submodule_search_locations))) / path).read_text(encoding="utf-8"))


def parameters(module: ast.Module, kind: str, function: str) -> set[str]:
    bodies = [node.body for node in module.body if isinstance(node, ast.ClassDef) and node.name == kind]
    found = [node for node in bodies[0] if isinstance(node, ast.FunctionDef) and node.name == function]
    return {argument.arg for argument in (*found[0].args.args, *found[0].args.kwonlyargs)}


def test_unsloth_still_calls_them_so() -> None:
    loading = parameters(installed_source("unsloth", "models/loader.py"), "FastLanguageModel", "from_pretrained")
    assert {"model_name", "max_seq_length", "dtype", "load_in_4bit", "full_finetuning"} <= loading
    adapters = parameters(installed_source("unsloth", "models/llama.py"), "FastLlamaModel", "get_peft_model")
    own = {"r", "target_modules", "lora_alpha", "lora_dropout", "bias", "use_gradient_checkpointing", "random_state"}
    assert own | {"use_rslora", "loftq_config", "max_seq_length"} <= adapters


def test_unsloth_train_is_all_accounted_for() -> None:
    fields = {
        node.target.id
        for kind in installed_source("unsloth_cli", "config.py").body
        if isinstance(kind, ast.ClassDef)
        for node in kind.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    sections = {"data", "training", "lora", "logging"}
    assert fields - sections == {*page.UNSLOTH_TRAIN, *page.UNSLOTH_TRAIN_ELSEWISE}


def test_the_page_is_what_the_code_says() -> None:
    assert (ROOT / "examples" / "OPTIONS.md").read_text(encoding="utf-8") == page.render()


def test_the_readmes_table_is_of_names_that_are_taken() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("| parallel-tune |")[2].partition("\n\n")[0]
    names = set(re.findall(r"`(\w+)`", table))
    assert len(names) > 15
    assert names <= set(fields_by_name())


def test_the_readmes_defaults_are_the_defaults() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"`(\w+)` (?:`([^`]+)`|off)", text.partition("<!-- defaults -->")[2].partition("\n\n")[0])
    assert len(rows) > 15
    defaults = {item.name: item.default for item in dataclasses.fields(TrainConfig)}
    assert dict(rows) == {name: "" if defaults[name] is False else str(defaults[name]) for name, _ in rows}


SHELLS = {"bash": "complete ", "zsh": "#compdef parallel-tune", "fish": "complete "}


@pytest.mark.parametrize("shell", SHELLS)
def test_shells_get_a_script(shell: str, environment: dict[str, str]) -> None:
    command = [str(Path(sys.executable).with_name("parallel-tune")), "completion", shell]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert SHELLS[shell] in done.stdout
    assert "_PARALLEL_TUNE_COMPLETE" in done.stdout


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("pl", {"plan"}),
        ("--early_stopping_p", {"--early_stopping_patience"}),
        ("plan --save_m", {"--save_model", "--save_method"}),
        ("--r 4 --full", {"--full_finetuning"}),
        ("--bias lora", {"lora_only"}),
        ("--report_to ten", {"tensorboard"}),
        ("--report_to wandb,ten", {"wandb,tensorboard"}),
        ("--early-stopping-p", {"--early-stopping-patience"}),
        ("--lr-scheduler-type cosine_with_r", {"cosine_with_restarts"}),
        ("--strategy ", {"auto", "ddp", "model_parallel"}),
        ("--strategy = m", {"model_parallel"}),
        ("--optim adamw_torch", {"adamw_torch", "adamw_torch_fused"}),
        ("--hardware 2xH100-80GB+1xt4", {"2xH100-80GB+1xT4-16GB"}),
        ("--dataset ro", {"ro"}),  # of type file: the shell looks for it
        ("--learning_rate ", set()),
    ],
)
def test_words_are_completed(line: str, offered: set[str], environment: dict[str, str]) -> None:
    words = f"parallel-tune {line}"
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_PARALLEL_TUNE_COMPLETE": "bash_complete"}
    command = [str(Path(sys.executable).with_name("parallel-tune"))]
    done = subprocess.run(command, env=environment | asked, capture_output=True, text=True, timeout=60, check=True)
    assert {row.partition(",")[2] for row in done.stdout.splitlines() if row} == offered


BASH = """
eval "$(parallel-tune completion bash)"
COMP_WORDS=({line}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
"$(complete -p parallel-tune | sed 's/.*-F \\([^ ]*\\).*/\\1/')" parallel-tune
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("line", "offered"),
    [("parallel-tune --full-f", "--full-finetuning"), ("parallel-tune plan --strategy mo", "model_parallel")],
)
def test_bash_completes_by_the_script_that_it_is_given(line: str, offered: str, environment: dict[str, str]) -> None:
    path = f"{Path(sys.executable).parent}:{environment.get('PATH', '')}"
    done = subprocess.run(
        ["bash", "--norc", "-c", BASH.format(line=line)], env=environment | {"PATH": path},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [offered], done.stderr


@pytest.mark.parametrize("arguments", [["--quantization", "--r=2"], ["--report_to"], ["--bf16", "maybe"]])
def test_a_word_that_is_missing_or_too_much_is_an_error(arguments: list[str]) -> None:
    result = CliRunner().invoke(program, ["--print_config", *arguments])
    assert result.exit_code == 2
    assert "requires an argument" in result.output or "unexpected extra argument (maybe)" in result.output


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--bf16", "true"], "bf16", True),
        (["--load-in-4bit", "False", "--r=2"], "load_in_4bit", False),
        (["--bf16", "--r=2"], "bf16", True),
        (["--report-to", "wandb", "mlflow", "--r=2"], "report_to", ["wandb", "mlflow"]),
        (["--quantization", "f16"], "quantization", ["f16"]),
        (["--dtype", "None"], "dtype", "auto"),
        (["--gradient-checkpointing", "True"], "use_gradient_checkpointing", "full"),
        (["--lora_target", "all"], "target_modules", ["all-linear"]),
        (["--warmup_steps", "0.1"], "warmup_steps", 0.1),
        (["--warmup_steps", "10"], "warmup_steps", 10),
    ],
)
def test_the_command_line_takes_the_words_of_other_tools(arguments: list[str], name: str, value: object) -> None:
    result = CliRunner().invoke(program, ["--print_config", *arguments])
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(result.output)[name] == value
