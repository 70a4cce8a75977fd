"""What an optimizer keeps, against the states of one that transformers' Trainer has made and stepped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

from parallel_tune.memory import TrainingSettings  # noqa: E402
from parallel_tune.memory.facts import facts_from_config  # noqa: E402
from parallel_tune.memory.parameters import whole  # noqa: E402
from parallel_tune.memory.states import state_bytes  # noqa: E402

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
}


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_torch"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_full_training_keeps_the_embeddings_moments_in_float32(tied: bool, optimizer: str, tmp_path: Path) -> None:
    sizes = {**SIZES, "tie_word_embeddings": tied}
    facts = facts_from_config({"model_type": "qwen3", **sizes})
    config = transformers.AutoConfig.for_model("qwen3", **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    settings = TrainingSettings(method="full", weights_dtype="float32", optimizer=optimizer)
    assert state_bytes(facts, settings, whole(facts)).optimizer_bytes == moments_bytes(model, optimizer, tmp_path)


def moments_bytes(model: Any, optimizer: str, folder: Path) -> int:
    """Bytes of the moments after a step, with what belongs to them alone: bitsandbytes' value tables are shared."""
    arguments = transformers.TrainingArguments(str(folder), optim=optimizer, report_to="none", use_cpu=True)
    stepped = transformers.Trainer(model, arguments).create_optimizer()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    stepped.step()
    kept = {
        value.data_ptr(): value.nbytes
        for state in stepped.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.dim() > 0 and not name.startswith("qmap")
    }
    return sum(kept.values())
