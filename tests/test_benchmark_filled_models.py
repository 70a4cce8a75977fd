"""Models of noise are what transformers itself would have saved, in bf16 and in nf4, in one file and in shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def filled_in_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("filled") / "tiny"


@pytest.fixture
def bf16(filled_in_bf16: Path, load_benchmark: Any) -> Path:
    made: Path = load_benchmark("filled_models").make_filled("tiny", filled_in_bf16)
    return made


def loaded(folder: Path, **options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": "cpu"}, **options).eval()


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.arange(1, 100).view(1, -1)).logits


def test_a_quantised_model_is_what_transformers_would_have_saved(
    bf16: Path, load_benchmark: Any, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import BitsAndBytesConfig

    ours = load_benchmark("filled_models").make_filled("tiny-nf4", tmp_path / "ours")
    wanted = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    theirs = loaded(bf16, quantization_config=wanted)
    theirs.save_pretrained(tmp_path / "theirs")
    mine, others = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert mine.keys() == others.keys()
    for name, tensor in others.items():
        assert tensor.dtype == mine[name].dtype
        assert torch.equal(tensor, mine[name]), name
    told = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")]
    assert told[0] == told[1]
    assert torch.equal(logits(loaded(ours)), logits(theirs))
    assert not torch.equal(logits(theirs), logits(loaded(bf16)))


def test_shards_hold_what_one_file_does(
    bf16: Path, load_benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    filled_models = load_benchmark("filled_models")
    weight_files = load_benchmark("weight_files")
    monkeypatch.setattr(
        filled_models, "write_weights", lambda folder, held: weight_files.write_weights(folder, held, 64 << 10)
    )
    shards = filled_models.make_filled("tiny", tmp_path / "shards")
    files = sorted(path.name for path in shards.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    whole, parts = loaded(bf16).state_dict(), loaded(shards).state_dict()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
