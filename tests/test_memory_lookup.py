"""Where a model's facts come from, and what is said when there are none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from parallel_tune.memory.facts import facts_from_config
from parallel_tune.memory.lookup import catalog, load_model_facts
from strategies.errors import ConfigError

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_a_folder_comes_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    facts = load_model_facts(str(tmp_path))
    assert (facts.hidden_size, facts.num_kv_heads, facts.head_dim) == (64, 4, 16)


def test_the_hub_cache_comes_before_the_catalogue(tmp_path: Path) -> None:
    repository = tmp_path / "hf" / "hub" / "models--meta-llama--Llama-3.1-8B"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "snapshots" / "abc" / "config.json").write_text(json.dumps(TINY))
    assert load_model_facts("meta-llama/Llama-3.1-8B").hidden_size == 64


@pytest.mark.parametrize(
    "alias",
    [
        "meta-llama/Llama-3.1-8B-Instruct",
        "unsloth/Llama-3.1-8B",
        "unsloth/Meta-Llama-3.1-8B-bnb-4bit",
        "unsloth/llama-3-8b-bnb-4bit",
        "unsloth/Meta-Llama-3.1-8B-Instruct-unsloth-bnb-4bit",
        "Llama-3.1-8B",
    ],
)
def test_aliases_resolve_to_one_row(alias: str) -> None:
    facts = load_model_facts(alias)
    assert (facts.num_layers, facts.vocab_size) == (32, 128256)
    assert facts.quantized_4bit is ("4bit" in alias)


def test_every_row_is_reached_through_unsloth_too() -> None:
    for name, row in catalog().items():
        assert (
            load_model_facts(f"unsloth/{name.split('/')[1]}").num_layers == facts_from_config(row["config"]).num_layers
        )


def test_an_unknown_name_says_what_was_looked_at_and_what_is_near() -> None:
    with pytest.raises(ConfigError) as caught:
        load_model_facts("meta-llama/Llama-3.1-9B")
    assert "catalogue" in caught.value.message
    assert "offline" in caught.value.message
    assert "meta-llama/Llama-3.1-8B" in caught.value.hint


def test_a_folder_without_config_and_a_config_without_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"without a config\.json"):
        load_model_facts(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ConfigError, match="hidden_size"):
        load_model_facts(str(tmp_path))


def test_a_plan_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from parallel_tune.memory import ClosedFormEstimator, TrainingSettings, load_model_facts\n"
        "from strategies.contracts import Arrangement, Device, Part\n"
        "facts = load_model_facts('meta-llama/Llama-3.1-8B')\n"
        "estimate = ClosedFormEstimator(facts, TrainingSettings())\n"
        "device = Device(0, 'H100', 'cuda', 80 << 30, 80 << 30)\n"
        "estimate.memory(Part(0, 31, True, True), Arrangement(1, 1, 1, 'full'), device)\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
