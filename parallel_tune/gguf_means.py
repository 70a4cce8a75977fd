"""Who writes a run's GGUF files: Unsloth's exporter or llama.cpp's converter, decided before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from parallel_tune.engines import installed
from parallel_tune.llama_cpp import (
    GGUF_TYPES,
    QUANTIZER,
    SMALLER_GGUF_TYPES,
    check_converter,
    find_converter,
    find_quantizer,
    folders,
    is_whole,
    runs,
)
from strategies.errors import ConfigError

UNSLOTH_INSTALLS = (
    'have Unsloth fetch its own, which may ask for system packages: `python -c "import unsloth; '
    'from unsloth_zoo.llama_cpp import install_llama_cpp; install_llama_cpp()"`'
)


@dataclass(frozen=True)
class GgufMeans:
    """What writes the files.

    Attributes:
        exporter: Unsloth's, or llama.cpp's converter called directly.
        converter: llama.cpp's script; Unsloth's exporter runs it too.
        quantizer: llama.cpp's llama-quantize, where it is needed.
        said: the choice and its reason in a line.
    """

    exporter: Literal["unsloth", "llama.cpp"]
    converter: str
    quantizer: str | None
    said: str


def choose(engine: str, gpu: bool, types: Sequence[str]) -> GgufMeans:
    """The exporter of a run.

    Unsloth's, left to itself, answers a missing llama.cpp by downloads, builds and a package manager under sudo, also
    where nobody is there to agree. So it is given a llama.cpp that is here, or is not used.

    Args:
        engine: the run's.
        gpu: whether one is visible.
        types: of the GGUF files.

    Raises:
        ConfigError: a type is unknown, or llama.cpp or what it needs is not there.
    """
    unknown = [name for name in types if name not in GGUF_TYPES + SMALLER_GGUF_TYPES]
    if unknown or not types:
        raise ConfigError(
            f"llama.cpp does not write {', '.join(unknown) or 'a GGUF file without a type'}",
            f"Choose from {', '.join(GGUF_TYPES + SMALLER_GGUF_TYPES)}.",
        )
    converter = find_converter(UNSLOTH_INSTALLS if engine == "unsloth" and gpu else "")
    check_converter(Path(converter))
    smaller = any(name in SMALLER_GGUF_TYPES for name in types)
    quantizer = find_quantizer() if smaller else _quantizer_if_there()
    against = _against_unsloth(engine, gpu, converter, quantizer)
    if against:
        said = f"GGUF files will be written by llama.cpp's {converter}, not by Unsloth's exporter: {against}"
        return GgufMeans("llama.cpp", converter, quantizer if smaller else None, said)
    said = f"GGUF files will be written by Unsloth's exporter, with llama.cpp's {converter} and {quantizer}"
    return GgufMeans("unsloth", converter, quantizer, said)


def _quantizer_if_there() -> str | None:
    try:
        return find_quantizer()
    except ConfigError:
        return None


def _against_unsloth(engine: str, gpu: bool, converter: str, quantizer: str | None) -> str:
    if engine != "unsloth":
        return "the engine is transformers"
    if not gpu:
        return "no GPU is visible"
    if not installed("unsloth"):
        return "the package unsloth is not installed here"
    if quantizer is None:
        return f"it needs {QUANTIZER} too, which is not built in {', '.join(map(str, folders()))} nor on PATH"
    if not runs(quantizer):
        return f"it needs {QUANTIZER} too, and {quantizer} does not run"
    if not is_whole(Path(converter)):
        return "it needs llama.cpp's folder `conversion` beside the converter"
    return ""
