"""GGUF files by Unsloth's exporter, called where nothing can be downloaded, built or installed by it."""

from __future__ import annotations

import contextlib
import os
import shutil
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parallel_tune.engines import open_engine
from parallel_tune.llama_cpp import copy_tools
from strategies.errors import RunFailed

HINT = (
    "The export log has its whole output; with CUDA_VISIBLE_DEVICES='' the export goes by llama.cpp's converter alone."
)

DROPPED = ("PYTHONSAFEPATH", "UNSLOTH_LLAMA_CPP_SCRIPTS_DIR", "UNSLOTH_LLAMA_CPP_CONVERTER_TAG")
"""The converter inherits the first and must import what lies beside it; the others name another converter."""


def environment(llama_cpp: Path) -> dict[str, str]:
    """What Unsloth must find in the environment when it is imported."""
    return {
        "UNSLOTH_LLAMA_CPP_PATH": str(llama_cpp),
        # It would run the package manager, with sudo where that asks nothing, and pip when a conversion fails.
        "UNSLOTH_AUTO_INSTALL": "0",
        # The converter is the one that is here, not today's from the web.
        "UNSLOTH_LLAMA_CPP_OFFLINE": "1",
    }


def write(merged: Path, folder: Path, types: Sequence[str], dtype: str, converter: Path, quantizer: Path) -> None:
    """Write one file a type into `folder`, from the merged model.

    The model is merged already, by the code of all our exports: Unsloth's merge would need it on the GPU, and would add
    a LoftQ adapter to the 16-bit base, which it does not belong to.

    Args:
        merged: its folder, whose name the exporter's files begin with; files are put beside it meanwhile.
        dtype: of its weights, as a GGUF type; "auto" stands for it.

    Raises:
        RunFailed: the exporter failed or left out a file.
    """
    # Unsloth rewrites the converter that it is given: the user's checkout stays as it is.
    llama_cpp = merged.parent / "llama.cpp"
    copy_tools(converter, quantizer, llama_cpp)
    os.environ.update(environment(llama_cpp))
    for name in DROPPED:
        os.environ.pop(name, None)
    kinds = list(dict.fromkeys(dtype if kind == "auto" else kind for kind in types))
    open_engine("unsloth").prepare()
    # The converter's first file goes into the working directory.
    with contextlib.chdir(merged.parent):
        try:
            files = _call(merged, kinds)
        except Exception as error:
            traceback.print_exc()
            lines = f"{error}".strip().splitlines() or [type(error).__name__]
            raise RunFailed(f"Unsloth's exporter failed: {lines[0]}", HINT) from error
    for file in files:
        shutil.move(file, folder / f"{merged.name}-{file.name.removeprefix(f'{merged.name}.').lower()}")
    for kind in kinds:
        # A file of more than 50 GB comes in parts.
        if not [*folder.glob(f"{merged.name}-{kind}.gguf"), *folder.glob(f"{merged.name}-{kind}-*-of-*.gguf")]:
            raise RunFailed(f"Unsloth's exporter wrote no file of type {kind}", HINT)


def _call(merged: Path, kinds: list[str]) -> list[Path]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from unsloth.save import patch_saving_functions
    from unsloth_zoo.llama_cpp import check_llama_cpp

    check_llama_cpp()  # where it is not content with what it finds, the exporter goes and installs
    # In main memory: the exporter converts the folder that the model was loaded from.
    model: Any = patch_saving_functions(AutoModelForCausalLM.from_pretrained(merged, dtype="auto"))
    tokenizer = AutoTokenizer.from_pretrained(merged)
    done = model.save_pretrained_gguf(str(merged.parent / "exported"), tokenizer, quantization_method=kinds)
    return [Path(file).absolute() for file in done["gguf_files"]]  # the working directory is about to change
