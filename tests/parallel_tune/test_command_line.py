"""The command: help without torch, names with - or _, exit codes, what is printed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from parallel_tune import __version__
from parallel_tune.cli import program
from parallel_tune.options import TOKENS
from strategies.errors import ConfigError, NoStrategyFits

LIGHT = """
import sys
sys.argv = ["parallel-tune", *{arguments}]
from parallel_tune.__main__ import main
try:
    main()
except SystemExit as end:
    heavy = sorted({{"torch", "transformers", "accelerate", "trl", "peft", "datasets"}} & set(sys.modules))
    assert not heavy, heavy
    sys.exit(end.code)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"], ["--help-all"], ["--version"], ["train", "--help"], ["resume", "--help"], ["demo", "--help"],
        ["doctor"],
        ["plan", "--model", "unsloth/Llama-3.3-70B-Instruct", "--hardware", "2xH100-80GB", "--json"],
    ],
)  # fmt: skip
def test_answers_come_without_torch(arguments: list[str], environment: dict[str, str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LIGHT.format(arguments=arguments)],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize(
    "arguments", [["plan", "--model=unsloth/Qwen3-32B", "--hardware=2xH100-80GB"], ["--help"], ["--version"]]
)
def test_output_that_cannot_be_written_is_one_line_of_error(
    arguments: list[str], buffered: str, environment: dict[str, str]
) -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "parallel_tune", *arguments], env={**environment, "PYTHONUNBUFFERED": buffered},
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stderr == "parallel-tune: cannot write to standard output: No space left on device\n"


def test_an_error_keeps_its_code_where_nothing_can_be_printed(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "parallel_tune", "plan", "--hardware=no-such-card"]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            command, env=environment, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False
        )  # fmt: skip
    assert ended.returncode == 2


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(program, list(arguments), prog_name="parallel-tune")
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--strategy=model_parallel", "--lora_dropout=0.1"], "with dropout"),
        (["--model=unsloth/Qwen3-32B", "--use_gradient_checkpointing=full"], "recomputed activations are not captured"),
        (["--strategy=ddp", "--use_gradient_checkpointing=full"], "recomputed activations are not captured"),
        (["--strategy=ddp", "--hardware=2xT4-16GB"], "rows are padded"),
    ],
)
def test_a_capture_that_was_asked_for_and_cannot_be_is_refused(options: list[str], why: str) -> None:
    base = ["plan", "--capture=on", *([] if "--hardware" in str(options) else ["--hardware=2xH100-80GB"])]
    result = CliRunner().invoke(program, [*base, *options])
    assert isinstance(result.exception, ConfigError)
    assert re.search(f"--capture on: a step cannot be captured, since .*({why})", str(result.exception))


def test_a_capture_that_was_asked_for_is_planned_though_an_eager_plan_is_faster() -> None:
    base = ["plan", "--json", "--strategy=ddp", "--hardware=2xH100-80GB", "--model=unsloth/Qwen3-8B"]
    left, asked = (json.loads(invoke(*base, "--global_batch_size=8", f"--capture={how}")) for how in ("auto", "on"))
    assert asked["fits"] and asked["captured"]
    assert asked["predicted_tokens_per_second"] <= left["predicted_tokens_per_second"]
    too_large = CliRunner().invoke(program, [*base[:-1], "--model=unsloth/Qwen3-32B", "--capture=on"])
    assert isinstance(too_large.exception, NoStrategyFits)


def test_help_is_short_and_help_all_is_whole() -> None:
    short, whole = invoke("train", "--help"), invoke("train", "--help-all")
    assert "--strategy" in short
    assert "--lora_dropout" not in short
    assert "--lora_dropout" in whole
    assert len(whole.splitlines()) > len(short.splitlines())
    assert "--strategy" in invoke("--help")
    assert "resume" in invoke("--help")
    assert invoke("--version").strip() == f"parallel-tune, version {__version__}"


VERBS = ["train", "plan", "bench", "launch", "resume", "export", "report", "compare", "doctor", "demo", "completion"]


@pytest.mark.parametrize("arguments", [["--help"], ["--help-all"], *([verb, "--help"] for verb in VERBS)])
def test_help_fits_eighty_columns_and_cuts_nothing_off(arguments: list[str]) -> None:
    result = CliRunner().invoke(program, arguments, prog_name="parallel-tune", env={"COLUMNS": "80"})
    lines = result.output.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert [line for line in lines[1:] if line.rstrip().endswith("...")] == []


def test_help_begins_with_the_strategy_and_names_every_verb() -> None:
    said = invoke("--help")
    assert re.findall(r"^(\w[\w ]*):$", said, re.MULTILINE)[0] == "Strategy and hardware"
    assert "--version" in said
    assert all(re.search(rf"^  {verb} +\w", said, re.MULTILINE) for verb in VERBS)
    # A schedule's ten names stand in its text, where they can be broken.
    whole = " ".join(invoke("--help-all").split())
    assert "--lr_scheduler_type NAME" in whole and "constant_with_warmup, inverse_sqrt" in whole
    assert "gate_proj, up_proj, down_proj" in whole


def test_a_recipe_may_stand_by_itself(tmp_path: Path) -> None:
    """As LLaMA-Factory takes it."""
    path = tmp_path / "recipe.yaml"
    path.write_text("r: 8\n")
    for verb in ([], ["train"]):
        assert yaml.safe_load(invoke(*verb, str(path), "--print-config", "--lora_alpha=3"))["r"] == 8
    assert json.loads(invoke("plan", str(path), "--hardware=2xH100-80GB", "--json"))["fits"]


@pytest.mark.parametrize("name", ["--global_batch_size", "--global-batch-size"])
def test_every_option_takes_both_spellings(name: str) -> None:
    assert yaml.safe_load(invoke("--print_config", name, "12"))["global_batch_size"] == 12
    assert TOKENS["token_normalize_func"]("a-b") == "a_b"  # type: ignore[operator]


def test_the_verb_may_be_left_out_and_options_beat_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("r: 8\nlora_alpha: 2\nload_in_4bit: true\n")
    for verb in ([], ["train"]):
        config = yaml.safe_load(invoke(*verb, "--print-config", "--config", str(path), "--r=4", "--no-load-in-4bit"))
        assert (config["r"], config["lora_alpha"], config["load_in_4bit"]) == (4, 2, False)


GOOD = ["--model", "unsloth/Llama-3.2-1B-Instruct", "--hardware", "1xH100-80GB"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["plan", "--learning_rat", "1"], 2, "No such option"),
        (["plan", "--r", "x"], 2, "not a valid integer"),
        (["plan", "--config", "nowhere.yaml"], 2, "cannot read the recipe nowhere.yaml"),
        (["plan", *GOOD, "--hardware", "2xNOPE"], 2, "NOPE"),
        (["plan", *GOOD, "--strategy", "ddpp"], 2, "no strategy 'ddpp'"),
        (["plan", *GOOD, "--strategy", "ddp", "--device_map", "balanced"], 4, "cannot be combined"),
        (["plan", "--model", "unsloth/Llama-3.3-70B-Instruct", "--hardware", "1xT4-16GB"], 3, "parallel-tune: "),
        (["resume", "nowhere"], 2, "nowhere is not a run directory"),
        (["--model", "unsloth/Llama-3.2-1B-Instruct", "--hardware", "8xH100-80GB"], 2, "this machine has"),
        (["fly"], 2, "No such command"),
    ],
)
def test_exit_codes(arguments: list[str], code: int, said: str, tune: Any) -> None:
    ended = tune.ended(*arguments, base=False)
    assert (ended.code, said in ended.err) == (code, True), ended.err
    assert "Traceback" not in ended.err
    assert len(ended.err.strip().splitlines()) >= 2


def test_debug_shows_the_traceback(tune: Any) -> None:
    assert "Traceback" in tune.ended("resume", "nowhere", "--debug", base=False).err


def test_a_plan_names_what_would_run(tune: Any) -> None:
    ended = tune.ended("plan", *GOOD, "--json", base=False)
    plan = json.loads(ended.out)
    assert (ended.code, plan["strategy"], plan["fits"], plan["engine"]) == (0, "ddp", True, "unsloth")
    assert plan["launch"][1:] == ["-m", "parallel_tune.worker", "RUN_DIRECTORY"]


def test_types_of_gguf_files_are_refused_where_none_are_written(tmp_path: Path) -> None:
    """`export --quantization q4_k_m` copied the adapter, since --save_method is lora where it is left out."""
    ended = CliRunner().invoke(program, ["export", str(tmp_path), "--save_path", "out", "--quantization", "q4_k_m"])
    assert isinstance(ended.exception, ConfigError)
    assert "q4_k_m is about GGUF" in ended.exception.message and "--save_method gguf" in ended.exception.hint
