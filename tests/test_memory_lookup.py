"""Where a model's facts come from, and what is said when there are none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from parallel_tune.memory.facts import CLASS_DEFAULTS, facts_from_config
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


VISION = {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "num_hidden_layers": 27, "patch_size": 14}
AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "google/gemma-3-4b-it": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
    "google/gemma-3-12b-it": {
        "hidden_size": 3840, "intermediate_size": 15360, "num_attention_heads": 16, "num_hidden_layers": 48,
        "num_key_value_heads": 8,
    },
}  # fmt: skip
"""What Gemma 3's published config.json files say of the text model: the rest are the defaults of its config's class."""


@pytest.mark.parametrize("name", AS_PUBLISHED)
def test_what_a_config_leaves_to_its_class_is_filled_in(name: str) -> None:
    """The catalogue planned them, and the same model once it was downloaded was refused."""
    text = {"model_type": "gemma3_text", "sliding_window": 1024, **AS_PUBLISHED[name]}
    published = {"model_type": "gemma3", "text_config": text, "vision_config": VISION}
    assert facts_from_config(published) == load_model_facts(name)


def test_the_defaults_of_config_classes_are_transformers_own() -> None:
    from transformers import AutoConfig

    for model_type, defaults in CLASS_DEFAULTS.items():
        config = AutoConfig.for_model(model_type)
        if model_type == "gemma3":
            config = config.text_config
        assert {name: getattr(config, name) for name in defaults} == defaults


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


BAD = [
    {"num_hidden_layers": 0},
    {"num_hidden_layers": -3},
    {"num_attention_heads": 0},
    {"hidden_size": "64"},
    {"hidden_size": True},
    {"num_key_value_heads": "x"},
    {"num_key_value_heads": 3},
    {"num_key_value_heads": float("nan")},
    {"head_dim": -24},
    {"sliding_window": "big"},
    {"num_local_experts": 8},
]


@pytest.mark.parametrize("wrong", BAD, ids=str)
def test_a_config_that_no_model_can_have_is_named(wrong: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **wrong}))
    with pytest.raises(ConfigError) as caught:
        load_model_facts(str(tmp_path))
    assert str(tmp_path) in caught.value.message
    assert (
        next(iter(wrong)) in caught.value.message or "heads" in caught.value.message or "experts" in str(caught.value)
    )


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere/at/all", "~/nowhere", "a//b", "/nowhere"])
def test_a_path_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(ConfigError, match="not a Hub name"):
        load_model_facts(name, offline=False)


@pytest.mark.parametrize(
    "address", ["https://huggingface.co/unsloth/Qwen3-8B/tree/main", "huggingface.co/unsloth/Qwen3-8B"]
)
def test_the_name_in_an_address_of_the_hub_is_said(address: str) -> None:
    """Qwen/Qwen3-4B was offered for it."""
    with pytest.raises(ConfigError, match="is an address") as raised:
        load_model_facts(address, offline=True)
    assert raised.value.hint == "Give its name: --model unsloth/Qwen3-8B"


class Hub(BaseHTTPRequestHandler):
    """Answers every request by its status alone, and counts those for a file."""

    status = 503
    asked = 0

    def do_HEAD(self) -> None:
        type(self).asked += "config.json" in self.path
        self.send_response(self.status)
        if self.status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    do_GET = do_HEAD  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (503, "cannot be asked"), (404, "no such model"), (0, "cannot be asked"), (500, "it has a fault (500)"),
        (401, "it takes no such token (401)"), (403, "may not read it (403)"), (429, "too many requests"),
    ],
)  # fmt: skip
def test_a_hub_that_does_not_help_is_asked_once(status: int, said: str, tmp_path: Path) -> None:
    """Status 0: nobody listens."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answering", (Hub,), {"status": status, "asked": 0}))
    if status:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    else:
        server.server_close()
    code = "import sys; from parallel_tune.memory import load_model_facts; load_model_facts(sys.argv[1])"
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code, "who/what"], capture_output=True, text=True, env=environment)
    if status:
        assert server.RequestHandlerClass.asked == 1  # type: ignore[attr-defined]
        server.shutdown()
        server.server_close()
    assert "ConfigError" in done.stderr and said in done.stderr
    assert "Retry" not in done.stderr


class Giving(BaseHTTPRequestHandler):
    """Has a config.json of every model, and half of all weights."""

    def do_HEAD(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        if name not in ("config.json", "model.safetensors"):
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = json.dumps(TINY).encode()
        self.send_response(200)
        for header, value in {"ETag": f'"{name}"', "X-Repo-Commit": "a" * 40}.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(content) if name == "config.json" else 2 * len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_GET = do_HEAD  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass


LOAD = """
import sys
from types import SimpleNamespace
from parallel_tune.config import make_config
from parallel_tune.engines.transformers import TransformersEngine
config = make_config({"model": "who/what", "dtype": "float32"})
TransformersEngine().load(config, None, SimpleNamespace(device_map=lambda: None), "float32")
"""
ASK = "from parallel_tune.memory import load_model_facts; load_model_facts('who/what')"
READ = "from parallel_tune.data.loading import load_rows; load_rows('who/rows')"


@pytest.mark.parametrize(
    ("code", "home", "said"),
    [
        (ASK, "/dev/null/home", "(the Hub cannot be asked: /dev/null/home/"),
        (LOAD, "", "cannot load the model 'who/what' from the Hub: the download broke off"),
    ],
)
def test_what_hinders_a_download_is_named(code: str, home: str, said: str, tmp_path: Path) -> None:
    """transformers says of each that there may be a folder of the model's name."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Giving)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    environment["HF_HOME"] = home or str(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    server.shutdown()
    server.server_close()
    assert said in done.stderr.splitlines()[-2] + done.stderr.splitlines()[-1], done.stderr


def test_a_dataset_that_the_hub_refuses_is_not_called_a_missing_network(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Refusing", (Hub,), {"status": 401}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    environment["HF_HOME"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, env=environment, cwd=tmp_path)
    server.shutdown()
    server.server_close()
    assert "dataset 'who/rows' cannot be loaded from the Hub: it takes no such token (401)" in done.stderr
    assert "hf auth login" in done.stderr
