"""Exports of a real run: what is written loads elsewhere and answers as the adapter does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from exported_in_turn import Asked, exported_in_turn
from started_commands import Ended
from tiny_model import make_tiny_model

import parallel_tune
from parallel_tune import export as exporting
from parallel_tune import llama_cpp
from strategies.errors import ConfigError

ROOT = Path(__file__).parents[2]
CONVERTER = """
import pathlib, sys
import conversion  # as llama.cpp's has it, beside itself
folder, _, out, _, kind = sys.argv[1:]
assert (pathlib.Path(folder) / "model.safetensors").exists()
assert 'model_name: "tiny"' in (pathlib.Path(folder) / "README.md").read_text()
pathlib.Path(out).write_text(kind)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> parallel_tune.Run:
    folder = tmp_path_factory.mktemp("export")
    return parallel_tune.tune(
        model=make_tiny_model(folder / "tiny"), dataset=ROOT / "examples" / "short_answers.jsonl", hardware="cpu:2",
        max_steps=3, max_seq_length=64, global_batch_size=4, learning_rate=3e-2, warmup_steps=0,
        strategy="model_parallel", output_dir=str(folder / "run"),
    )  # fmt: skip


def export(run: parallel_tune.Run, folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "parallel_tune", "export", str(run.path), "--save_path", str(folder / "out")]
    return subprocess.run(
        [*command, *options], env=dict(os.environ) | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)} | environment,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def adapter(run: parallel_tune.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the adapter of `run` lies as `out`, exported."""
    folder = tmp_path_factory.mktemp("adapter")
    done = export(run, folder)
    assert done.returncode == 0, done.stderr
    return folder


Exports = tuple[parallel_tune.Run, dict[str, Path]]


@pytest.fixture(scope="module")
def of_model_parallel(run: parallel_tune.Run, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """`run`, which model_parallel made, and its exports by their methods."""
    folders = {"lora": adapter / "out"}
    for method in ("merged_16bit", "merged_4bit"):
        folder = tmp_path_factory.mktemp(method)
        done = export(run, folder, "--save_method", method)
        assert done.returncode == 0, done.stderr
        folders[method] = folder / "out"
    return run, folders


@pytest.fixture(scope="module")
def of_ddp(ddp_run: Ended, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """A run of ddp and its exports by their methods, from processes that share their imports."""
    place = tmp_path_factory.mktemp("ddp")
    folders = {method: place / method for method in ("lora", "merged_16bit", "merged_4bit")}
    asked = [Asked(exporting.Export(method, str(folder)), place) for method, folder in folders.items()]
    run = parallel_tune.Run(shutil.copytree(ddp_run.run, place / "run"))
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place)}
    for said in exported_in_turn(run.path, asked, env):
        assert said["code"] == 0, said
    return run, folders


def load(path: Path | str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.parametrize("strategy", ["ddp", "model_parallel"])
def test_adapter_and_merged_models_load_elsewhere_and_give_the_same_logits(
    strategy: str, request: pytest.FixtureRequest
) -> None:
    run, folders = request.getfixturevalue(f"of_{strategy}")
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    assert run.plan.strategy == strategy
    ids = AutoTokenizer.from_pretrained(folders["merged_16bit"])("The quick brown fox", return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        base = load(run.config.model)(ids).logits
        adapted = PeftModel.from_pretrained(load(run.config.model), str(folders["lora"]))(ids).logits
        merged = load(folders["merged_16bit"])(ids).logits
        in_4bit = load(folders["merged_4bit"])(ids).logits
    moved, off = (adapted - base).abs().max(), (merged - adapted).abs().max()
    # 4-bit weights are rounded far more; the model is still the trained one.
    assert (in_4bit - adapted).norm() < (in_4bit - base).norm()
    # What is left is the rounding of the weights to 16 bit.
    assert off < moved / 20
    assert "16" in json.loads((folders["merged_16bit"] / "config.json").read_text())["dtype"]
    quantization = json.loads((folders["merged_4bit"] / "config.json").read_text())["quantization_config"]
    assert quantization["bnb_4bit_quant_type"] == "nf4"


def test_a_damaged_adapter_is_not_exported(run: parallel_tune.Run, tmp_path: Path) -> None:
    copied = shutil.copytree(run.path, tmp_path / "run")
    weights = copied / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = export(parallel_tune.Run(copied), tmp_path, "--save_method", "lora")
    assert done.returncode == 1
    assert f"the adapter in {copied / 'adapter'} cannot be read" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_adapter_comes_with_a_card_that_tells_no_paths(run: parallel_tune.Run, adapter: Path) -> None:
    assert (adapter / "out" / "adapter_model.safetensors").exists()
    card = (adapter / "out" / "README.md").read_text()
    for said in (
        "library_name: peft",
        "| learning_rate | 0.03 |",
        "| dataset | short_answers.jsonl |",
        "| samples | 12 |",
    ):
        assert said in card
    assert "/" not in card.split("## Versions")[0].replace("tokens/s", "")
    again = export(run, adapter)
    assert again.returncode == 2
    assert "is there already" in again.stderr


def test_gguf_goes_through_llama_cpp_or_is_refused(run: parallel_tune.Run, tmp_path: Path) -> None:
    (tmp_path / "cpp").mkdir()
    refused = export(run, tmp_path, "--save_method", "gguf", LLAMA_CPP_DIR=str(tmp_path / "cpp"))
    assert refused.returncode == 2
    assert "convert_hf_to_gguf.py" in refused.stderr
    assert not (tmp_path / "out").exists()
    (tmp_path / "cpp" / "convert_hf_to_gguf.py").write_text(CONVERTER)
    (tmp_path / "cpp" / "conversion.py").touch()
    options = ("--save_method", "gguf", "--quantization", "q8_0")
    done = export(run, tmp_path, *options, LLAMA_CPP_DIR=str(tmp_path / "cpp"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model-q8_0.gguf").read_text() == "q8_0"
    assert "not by Unsloth's exporter: the engine is transformers" in done.stdout


@pytest.mark.parametrize(
    ("missing", "beside", "refused"),
    [("sentencepiece", "gguf-py", True), ("gguf", "other", True), ("gguf", "gguf-py", False), ("none", "other", False)],
)
def test_what_the_converter_imports_is_asked_for_before_anything_is_trained(
    missing: str, beside: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "convert_hf_to_gguf.py").touch()
    (tmp_path / beside).mkdir()
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None if name == missing else name)
    wanted = exporting.Export("gguf", str(tmp_path / "out"))
    if not refused:
        assert exporting.check_means(wanted, "transformers").converter == str(tmp_path / "convert_hf_to_gguf.py")
        return
    with pytest.raises(ConfigError, match=f"needs the package {missing}") as raised:
        exporting.check_means(wanted, "transformers")
    assert "parallel-tune[gguf]" in raised.value.hint


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a push of small files asks for."""

    asked: list[tuple[str, str | None, bytes]] = []  # noqa: RUF012
    mode = "regular"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.asked.append((self.path, self.headers.get("Authorization"), body))
        answer: dict[str, Any] = {"url": "https://huggingface.co/me/tuned", "name": "me/tuned"}
        if "/preupload/" in self.path:
            weights = ".safetensors"
            answer["files"] = [
                {
                    **file,
                    "uploadMode": self.mode if file["path"].endswith(weights) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
        elif self.path.endswith("/info/lfs/objects/batch"):
            here = f"http://{self.headers['Host']}/storage"
            objects = [{**found, "actions": {"upload": {"href": here}}} for found in json.loads(body)["objects"]]
            answer = {"transfer": "basic", "objects": objects}
        elif "/commit/" in self.path:
            answer = {"commitUrl": "https://huggingface.co/me/tuned/commit/1", "commitOid": "1", "hookOutput": ""}
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_PUT = do_POST  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[HTTPServer]:
    Hub.asked, Hub.mode = [], "regular"
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_push_sends_the_folder_with_the_token(run: parallel_tune.Run, tmp_path: Path, hub: HTTPServer) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    options = ("--push_model", "me/tuned", "--hub_token", "hf_secret")
    done = export(run, tmp_path, *options, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0")
    log = (run.path / "logs" / "export.log").read_text()
    assert done.returncode == 0, done.stderr + log
    commit = next(body for path, _, body in Hub.asked if "/commit/" in path)
    assert b"adapter_model.safetensors" in commit
    assert b"README.md" in commit
    created = next(body for path, _, body in Hub.asked if path.endswith("/repos/create"))
    made = json.loads(created)
    assert made.get("visibility") == "private" or made.get("private") is True  # by the release of huggingface_hub
    # The card's check is open to all; what changes the repository is not.
    changing = [token for path, token, _ in Hub.asked if "/commit/" in path or path.endswith("/repos/create")]
    assert changing == ["Bearer hf_secret"] * 2
    assert "hf_secret" not in log + done.stdout + done.stderr


def test_large_files_go_to_the_hubs_storage_without_the_token(
    run: parallel_tune.Run, tmp_path: Path, hub: HTTPServer
) -> None:
    Hub.mode = "lfs"
    hub_is = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    done = export(run, tmp_path, "--push_model", "me/tuned", "--hub_token", "hf_secret", **hub_is)
    assert done.returncode == 0, done.stderr + (run.path / "logs" / "export.log").read_text()
    sent = {path: (token, body) for path, token, body in Hub.asked}
    token, body = sent["/storage"]
    assert token is None
    assert body == (run.adapter / "adapter_model.safetensors").read_bytes()
    assert b"lfsFile" in next(body for path, (_, body) in sent.items() if "/commit/" in path)
    for path in (path for path in run.path.rglob("*") if path.is_file()):
        assert b"hf_secret" not in path.read_bytes(), path


def test_a_run_that_is_not_finished_is_refused(run: parallel_tune.Run, tmp_path: Path) -> None:
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    for name in ("config.yaml", "plan.json"):
        (unfinished / name).write_bytes((run.path / name).read_bytes())
    done = export(parallel_tune.Run(unfinished), tmp_path)
    assert done.returncode == 2
    assert "is not finished" in done.stderr
