"""Tiny models and the two ways of running a step, for the tests of lanes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from strategies.pipeline import Lanes

torch.set_num_threads(1)
CPU = torch.device("cpu")
VOCAB = 31
CUTS = {1: [0], 2: [0, 2], 3: [0, 1, 3], 4: [0, 1, 2, 3]}
Gradients = dict[str, Tensor | None]


def tiny(kind: str = "full", dropout: float = 0.0, layers: int = 4, config: str = "LlamaConfig", **more: Any) -> Any:
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "tie_word_embeddings": kind == "tied",
        "attention_dropout": dropout,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**shape, **more))
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=dropout))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return model.train()


def batches(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    result = []
    for index in range(count):
        ids = torch.randint(3, VOCAB, (1, 4 + index % 3), generator=generator)
        result.append({"input_ids": ids, "labels": ids})
    return result


def checkpointing(model: Any, mode: str) -> None:
    if mode == "off":
        return
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})


def loss_of(model: Any) -> Any:
    return lambda index, batch: model(**batch, use_cache=False).loss


def gradients(model: nn.Module) -> Gradients:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def naive(model: Any, inputs: Sequence[Any], calls: int = 1) -> tuple[list[Tensor], Gradients]:
    model.zero_grad(set_to_none=True)
    losses = []
    for batch in list(inputs) * calls:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    return losses, gradients(model)


def in_lanes(lanes: Lanes, model: Any, inputs: Sequence[Any], calls: int = 1) -> tuple[list[Tensor], Gradients]:
    model.zero_grad(set_to_none=True)
    losses = [loss for _ in range(calls) for loss in lanes.run(inputs, loss_of(model))]
    return losses, gradients(model)


def assert_same(expected: tuple[list[Tensor], Gradients], found: tuple[list[Tensor], Gradients]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(expected[0], found[0], strict=True))
    for name, gradient in expected[1].items():
        other = found[1][name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or (other is not None and torch.equal(gradient, other)), name


def assert_at_rest(lanes: Lanes) -> None:
    """No lane works, none holds a token or a job."""
    assert lanes._job is None
    assert all(thread.is_alive() for thread in lanes._threads)
