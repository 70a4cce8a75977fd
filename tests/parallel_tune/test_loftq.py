"""LoftQ: the adapters begin as a correction of the 4-bit rounding, and merging takes that into account."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from strategies.errors import ConfigError

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def runs(tune: Any, tiny_model: Path, rows_file: Path) -> dict[str, Any]:
    """One step at a rate of nearly nothing, on weights that are rounded, without the correction and with it."""
    data = (f"--model={tiny_model}", f"--dataset={rows_file}", "--val_size=20", "--max_seq_length=64")
    still = (*data, "--max_steps=1", "--learning_rate=1e-12", "--r=32", "--lora_alpha=8", "--use_rslora")
    run_it = type(tune)(tune.folder, still)
    options = {
        "rounded": ("--load_in_4bit", "--hardware=cpu:1"),
        "corrected": ("--load_in_4bit", "--loftq_config={}", "--hardware=cpu:2", "--strategy=ddp"),
    }
    return {name: run_it(*chosen) for name, chosen in options.items()}


def test_the_correction_brings_back_most_of_what_rounding_took(runs: dict[str, Any], tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    from parallel_tune.engines.transformers import nf4

    whole = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    rounded = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, quantization_config=nf4(torch.float32), device_map={"": "cpu"}
    )
    from peft import PeftModel

    corrected = PeftModel.from_pretrained(rounded, runs["corrected"].run / "adapter").eval()
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        wanted, with_it = whole(ids).logits, corrected(ids).logits
        with corrected.disable_adapter():
            without = corrected(ids).logits
    assert (with_it - wanted).norm() < 0.6 * (without - wanted).norm()
    assert runs["corrected"].report["held_out_loss_before"] != runs["rounded"].report["held_out_loss_before"]


def test_a_merged_model_is_not_corrected_twice(runs: dict[str, Any], tune: Any, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    run = runs["corrected"].run
    tune("export", str(run), "--save_method=merged_16bit", f"--save_path={run / 'merged'}", base=False)
    name = "model.layers.2.mlp.down_proj.weight"
    merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32).state_dict()[name]
    whole = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).state_dict()[name]
    import bitsandbytes as bnb

    held, state = bnb.functional.quantize_4bit(whole, quant_type="nf4", compress_statistics=True)
    rounded = bnb.functional.dequantize_4bit(held, state)
    # With half of the rank, more than half of the rounding error is gone, and 16 bits add nearly nothing.
    assert (merged - whole).norm() < 0.6 * (rounded - whole).norm()


def test_without_the_unrounded_weights_it_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from parallel_tune.engines.loftq import UnroundedWeights

    (tmp_path / "config.json").write_text("{}")
    save_file({"a.weight": torch.zeros(4, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    weights = UnroundedWeights(str(tmp_path))
    for name in ("a.weight", "b.weight"):
        with pytest.raises(ConfigError, match=name):
            weights.get(name)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    save_file({"a.weight": torch.ones(4)}, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert UnroundedWeights(str(tmp_path)).get("a.weight").tolist() == [1.0] * 4
