"""llama.cpp on this machine: its converter to GGUF, what that imports, and its llama-quantize."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from strategies.errors import ConfigError

GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "auto")
"""What llama.cpp's converter writes by itself."""
SMALLER_GGUF_TYPES = (
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m", "q5_0", "q5_1", "q5_k_s", "q5_k_m",
    "q6_k",
)  # fmt: skip
"""What its llama-quantize makes of such a file."""
CONVERTER = "convert_hf_to_gguf.py"
QUANTIZER = "llama-quantize"
BESIDE = ("conversion", "gguf-py", "gguf")
"""Folders beside the converter that it imports from, as far as they are there."""


def find_converter(way_out: str = "") -> str:
    """llama.cpp's converter: in LLAMA_CPP_DIR, on PATH, in ./llama.cpp, or where Unsloth puts it.

    Args:
        way_out: what else the user could do where it is nowhere.

    Raises:
        ConfigError: it is nowhere.
    """
    places = folders()
    for folder in places:
        if (folder / CONVERTER).is_file():
            return str((folder / CONVERTER).absolute())
    on_path = shutil.which(CONVERTER)
    if on_path:
        return on_path
    hint = "`git clone https://github.com/ggml-org/llama.cpp` here or set LLAMA_CPP_DIR"
    raise ConfigError(
        f"--save_method gguf needs llama.cpp's {CONVERTER}, which is not in {', '.join(map(str, places))} nor on PATH",
        f"{hint}{f', or {way_out}' if way_out else ''}; merged_16bit needs nothing more.",
    )


def check_converter(converter: Path) -> None:
    """Refuse a converter whose imports would fail, hours later.

    Raises:
        ConfigError: a package that it needs is not installed.
    """
    # llama.cpp has its own gguf package, which the script finds by itself.
    bundled = {"gguf"} if any((converter.parent / name).is_dir() for name in ("gguf-py", "gguf")) else set()
    for package in ("gguf", "sentencepiece"):
        if package not in bundled and find_spec(package) is None:
            raise ConfigError(
                f"llama.cpp's {CONVERTER} needs the package {package}, which is not installed",
                "`pip install 'parallel-tune[gguf]'` brings what it needs.",
            )


def is_whole(converter: Path) -> bool:
    """Whether what the script imports lies beside it, so that a copy of both runs."""
    script = converter.read_text(encoding="utf-8", errors="replace")
    return (converter.parent / "conversion").is_dir() or not re.search(r"^\s*(from|import) conversion\b", script, re.M)


def find_quantizer() -> str:
    """llama.cpp's llama-quantize, built: in one of its folders or on PATH.

    Raises:
        ConfigError: it is nowhere.
    """
    for folder in folders():
        for place in (folder / QUANTIZER, folder / "build" / "bin" / QUANTIZER):
            if os.access(place, os.X_OK) and place.is_file():
                return str(place.absolute())
    on_path = shutil.which(QUANTIZER)
    if on_path:
        return on_path
    raise ConfigError(
        f"a GGUF file smaller than q8_0 needs llama.cpp's {QUANTIZER}, which is not built here nor on PATH",
        f"Build llama.cpp, or choose {', '.join(GGUF_TYPES)}, which need its converter alone.",
    )


def runs(quantizer: str) -> bool:
    """Whether the program starts: one that was built elsewhere may miss its libraries."""
    command = [quantizer, "--help"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 or b"usage" in (done.stdout + done.stderr).lower()


def copy_tools(converter: Path, quantizer: Path, folder: Path) -> None:
    """Make `folder` a llama.cpp that has just these two, flat as Unsloth looks for them."""
    folder.mkdir()
    shutil.copy(converter, folder / CONVERTER)
    for name in BESIDE:
        if (converter.parent / name).is_dir():
            shutil.copytree(converter.parent / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    # Not a copy: the libraries that it was built with lie beside the real one.
    (folder / QUANTIZER).symlink_to(quantizer.resolve())


def folders() -> list[Path]:
    """Where llama.cpp may lie: what the user named, or here, or where Unsloth has it."""
    named = os.environ.get("LLAMA_CPP_DIR")
    if named:
        return [Path(named)]
    unsloths = os.environ.get("UNSLOTH_LLAMA_CPP_PATH")
    return [Path("llama.cpp"), Path(unsloths) if unsloths else Path.home() / ".unsloth" / "llama.cpp"]
