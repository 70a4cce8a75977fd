"""GGUF on a GPU: a run of the Unsloth engine exports by Unsloth's exporter, with nothing from the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in_llama_cpp import contents, make_llama_cpp

from parallel_tune.engines import installed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(
        not all(map(installed, ("unsloth", "gguf", "sentencepiece"))), reason="needs unsloth, gguf and sentencepiece"
    ),
]
DATASET = Path(__file__).parents[2] / "examples" / "short_answers.jsonl"


def test_unsloths_exporter_writes_the_merged_weights(
    tune: Any, shape: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf
    from safetensors.torch import load_file

    llama_cpp = make_llama_cpp(tmp_path / "cpp")
    before = contents(llama_cpp)
    monkeypatch.setenv("LLAMA_CPP_DIR", str(llama_cpp))
    run = tune(
        tmp_path / "run", f"--model={shape('llama-1b')}", f"--dataset={DATASET}", "--engine=unsloth",
        "--strategy=ddp", "--max_devices=1", "--max_seq_length=256", "--global_batch_size=4", "--max_steps=3",
        "--warmup_steps=0", "--learning_rate=5e-3", "--save_gguf", "--quantization", "f16", "q4_k_m",
    )  # fmt: skip
    log = (run.path / "logs" / "export.log").read_text()
    assert run.report["engine"] == "unsloth"
    assert "Unsloth: All GGUF conversions completed successfully!" in log
    files = {path.name for path in (run.path / "gguf").iterdir()}
    assert files == {"model-f16.gguf", "model-q4_k_m.gguf", "README.md"}
    tune(run.path, "--save_method=merged_16bit", f"--save_path={tmp_path / 'merged'}", verb="export")
    parts = (tmp_path / "merged").glob("*.safetensors")
    weights = {name: weight for part in parts for name, weight in load_file(part).items()}
    # Of several types the first conversion is to bf16, and the stand-in's llama-quantize copies.
    tune(run.path, "--save_method=gguf", "--quantization=f16", f"--save_path={tmp_path / 'f16'}", verb="export")
    reader = gguf.GGUFReader(tmp_path / "f16" / "model-f16.gguf")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert set(tensors) == set(weights)
    for name, weight in weights.items():
        assert (tensors[name] == weight.half().numpy()).all(), name
    assert contents(llama_cpp) == before
