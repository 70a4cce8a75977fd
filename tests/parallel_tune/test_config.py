"""Settings from YAML and command line: names, types, ranges, who wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from parallel_tune.cli import program
from parallel_tune.config import TrainConfig, make_config, read_yaml
from strategies.errors import ConfigError


def recipe(tmp_path: Path, text: str) -> dict[str, Any]:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return read_yaml(path)


def refused(*sources: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        make_config(*sources)
    return caught.value


def test_later_sources_win() -> None:
    config = make_config({"r": 8, "seed": 1}, {"r": 32})
    assert (config.r, config.seed, config.lora_alpha) == (32, 1, 16)


def test_unknown_keys_are_errors_with_a_near_match() -> None:
    error = refused({"learning_rat": 1e-4})
    assert "unknown option 'learning_rat'" in error.message
    assert error.hint == "Did you mean learning_rate?"
    assert error.exit_code == 2
    assert "--help-all" in refused({"zzz": 1}).hint


@pytest.mark.parametrize(
    ("name", "said", "hint"),
    [
        ("finetuning_type", "LLaMA-Factory's", "--full_finetuning"),
        ("quantization_bit", "LLaMA-Factory's", "--load_in_4bit"),
        ("stage", "LLaMA-Factory's", "`launch`"),
        ("use_peft", "TRL's", "adapters are the default"),
        ("enable-wandb", "unsloth train's", "--report_to wandb"),
        ("dataloader_num_workers", "TrainingArguments'", "Leave it out"),
    ],
)
def test_other_tools_options_are_answered_with_ours(name: str, said: str, hint: str) -> None:
    for error in (refused({name: 1}), CliRunner().invoke(program, ["plan", f"--{name}", "1"]).exception):
        assert isinstance(error, ConfigError)
        assert said in error.message and hint in error.hint


def test_none_is_none_under_its_name() -> None:
    config = make_config({"loftq_config": "None", "lanes": "none", "lr_scheduler_kwargs": "null", "run_name": "None"})
    assert (config.loftq_config, config.lanes, config.lr_scheduler_kwargs, config.run_name) == (
        None,
        None,
        None,
        "None",
    )


def test_dashes_and_aliases_name_the_same_option() -> None:
    assert make_config({"global-batch-size": 12}).global_batch_size == 12
    assert make_config({"lora_r": 4}).r == 4
    assert make_config({"model_name": "gpt2"}).model == "gpt2"
    error = refused({"r": 4, "lora_r": 8})
    assert "'r' and 'lora_r' are the same option" in error.message


@pytest.mark.parametrize("written", ["2e-4", "0.0002", "2.0e-4", "'2e-4'"])
def test_yaml_reads_numbers_as_people_write_them(tmp_path: Path, written: str) -> None:
    config = make_config(recipe(tmp_path, f"learning_rate: {written}\nmax_steps: 1e2\n"))
    assert config.learning_rate == 2e-4
    assert config.max_steps == 100
    assert isinstance(config.max_steps, int)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", "many"), ("r", 1.5), ("r", True), ("load_in_4bit", "yes"), ("load_in_4bit", 1), ("model", 5),
        ("target_modules", 3), ("learning_rate", None), ("learning_rate", "fast"), ("max_steps", "inf"),
        ("target_modules", [1]), ("bias", False),
    ],
)  # fmt: skip
def test_a_wrong_type_is_named_with_the_value(name: str, value: Any) -> None:
    error = refused({name: value})
    assert name in error.message
    assert value is None or repr(value) in error.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", 0), ("learning_rate", -1), ("learning_rate", "nan"), ("lora_dropout", 1.0), ("max_steps", 0),
        ("max_steps", -2), ("save_total_limit", 0), ("num_train_epochs", 0), ("dtype", "float8"),
        ("learning_rate", "inf"), ("target_modules", []),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named(name: str, value: Any) -> None:
    assert name in refused({name: value}).message


def test_the_home_is_written_out_where_no_shell_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder named ~ was made in the working directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    written = recipe(tmp_path, "output_dir: ~/runs/a\nsave_model: true\nsave_path: ~/it\n")
    config = make_config(written)
    assert (config.output_dir, config.save_path) == (f"{tmp_path}/runs/a", f"{tmp_path}/it")
    printed = CliRunner().invoke(program, ["--config=~/recipe.yaml", "--output_dir=~/b", "--print_config"])
    assert f"output_dir: {tmp_path}/b\n" in printed.output
    for name in ("model", "dataset", "raw_text_file", "output_dir"):  # these ended in a traceback
        assert "there is no such home" in refused({name: "~nobody-here/x"}).message
    compared = CliRunner().invoke(program, ["compare", "~/a", "~/b"])
    assert f"{tmp_path}/a is not a run directory" in str(compared.exception)


def test_settings_that_exclude_each_other() -> None:
    assert "exclude each other" in refused({"full_finetuning": True, "load_in_4bit": True}).message


def test_lists_come_as_text_or_as_a_list() -> None:
    assert make_config({"target_modules": "q_proj, v_proj"}).target_modules == ["q_proj", "v_proj"]
    assert make_config({"target_modules": ["q_proj"]}).target_modules == ["q_proj"]


def test_what_is_printed_reads_back_the_same(tmp_path: Path) -> None:
    config = make_config({"r": 8, "learning_rate": 3e-5, "target_modules": "q_proj", "max_rows": 7})
    assert make_config(recipe(tmp_path, config.to_yaml())) == config
    assert make_config(recipe(tmp_path, TrainConfig().to_yaml())) == TrainConfig()


def test_a_key_given_twice_is_refused_as_two_names_for_it_are(tmp_path: Path) -> None:
    """YAML's reader takes the last one without a word."""
    with pytest.raises(ConfigError, match=r"recipe\.yaml, line 3: 'max_steps' is there twice") as raised:
        recipe(tmp_path, "max_steps: 3\nr: 8\nmax_steps: 5\n")
    assert "Keep one" in raised.value.hint
    with pytest.raises(ConfigError, match="line 2: 'min_lr' is there twice"):
        recipe(tmp_path, "lr_scheduler_kwargs:\n  {min_lr: 1, min_lr: 2}\n")


def test_a_recipe_that_is_none(tmp_path: Path) -> None:
    assert recipe(tmp_path, "") == {}
    for text, said in (("- a\n- b\n", "holds a list"), ("a: [", "is not YAML")):
        with pytest.raises(ConfigError, match=said):
            recipe(tmp_path, text)
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        read_yaml(tmp_path / "none.yaml")
