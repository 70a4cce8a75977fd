"""A llama.cpp small enough to write in a test: a converter of true GGUF files, and a llama-quantize that copies.

The converter names tensors as the model does. Its parts lie as llama.cpp's do, since Unsloth reads them.
"""

from __future__ import annotations

from pathlib import Path

ENTRY = """
import argparse
from pathlib import Path

from conversion.base import ModelBase

parser = argparse.ArgumentParser()
parser.add_argument("model", type=Path)
parser.add_argument("--outfile", type=Path)
parser.add_argument("--outtype", type=str, choices=["f32", "f16", "bf16", "q8_0"], default="f16")
parser.add_argument("--split-max-size", type=str, default="0")

if __name__ == '__main__':
    given = parser.parse_args()
    ModelBase.write(given.model, given.outfile, given.outtype)
"""
MAP = 'TEXT_MODEL_MAP: dict[str, str] = {"LlamaForCausalLM": "llama"}\nMMPROJ_MODEL_MAP: dict[str, str] = {}\n'
BASE = '''
import json

import gguf
import numpy as np

BITS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def load(path):
    """Names and values, without torch, whose import takes longer than all the rest."""
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header.pop("__metadata__", None)
    for name, about in header.items():
        first, last = about["data_offsets"]
        values = np.frombuffer(content[begin + first : begin + last], BITS[about["dtype"]])
        if about["dtype"] == "BF16":
            values = (values.astype("<u4") << 16).view("<f4")
        yield name, values.astype("<f4").reshape(about["shape"])


class ModelBase:
    @staticmethod
    def load_hparams(model, is_mistral_format=False):
        return json.loads((model / "config.json").read_text())

    @classmethod
    def write(cls, model, outfile, outtype):
        assert cls.load_hparams(model)["model_type"] == "llama"
        kind = gguf.GGMLQuantizationType[outtype.upper()]
        writer = gguf.GGUFWriter(outfile, "llama")
        for part in sorted(model.glob("*.safetensors")):
            for name, weight in load(part):
                writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
'''
QUANTIZER = '#!/bin/sh\nif [ "$1" = --help ]; then echo usage; exit; fi\ncp "$1" "$2"\n'


def make_llama_cpp(folder: Path, quantizer: str | None = QUANTIZER) -> Path:
    """Write one into `folder`, whose llama-quantize, unless it has none, was built by cmake."""
    (folder / "conversion").mkdir(parents=True)
    (folder / "convert_hf_to_gguf.py").write_text(ENTRY)
    (folder / "conversion" / "__init__.py").write_text(MAP)
    (folder / "conversion" / "base.py").write_text(BASE)
    if quantizer is not None:
        program = folder / "build" / "bin" / "llama-quantize"
        program.parent.mkdir(parents=True)
        program.write_text(quantizer)
        program.chmod(0o755)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, to see whether anything has changed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
