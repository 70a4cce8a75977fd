"""The loss of a mixture of experts: the mean over the step's tokens, and the routers' balancing loss only where the
model's config asks for it, once a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compared_runs import REPLICAS, SPLIT
from started_commands import Ended, Runner
from torch.nn.functional import cross_entropy

from parallel_tune.data import IGNORED, EncodedRow

WEIGHT = 0.5
"""So large that the balancing loss cannot hide."""


def make_mixture(folder: Path, tokenizer: Any, asked: bool) -> Path:
    """A Mixtral whose config asks for the balancing loss, or does not."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=512, initializer_range=0.2,
        output_router_logits=asked, router_aux_loss_coef=WEIGHT, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def options(model: Path, *more: str) -> tuple[str, ...]:
    return (f"--model={model}", "--max_steps=2", "--target_modules=q_proj,v_proj", *more)


def sums(model: Any, rows: list[EncodedRow]) -> tuple[float, int, float]:
    """Of rows that go through the model together: the tokens' losses, how many, and the balancing loss."""
    from parallel_tune.data import collate

    batch = collate(rows, 0)
    with torch.no_grad():
        outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True)
        targets = batch["labels"][:, 1:]
        loss = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum")
    return float(loss), int((targets != IGNORED).sum()), float(outputs.aux_loss or 0)


def of_the_first_step(run: Ended, model: Path) -> tuple[float, float, float]:
    """Of the first step, with no help of the trainer: the mean loss of its tokens, and the mean of its micro-batches'
    balancing losses by their tokens; and the mean loss of the held-out rows."""
    import yaml
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from parallel_tune.config import make_config
    from parallel_tune.data.prepare import prepare_data
    from parallel_tune.sampler import GlobalBatches

    config = make_config(yaml.safe_load((run.run / "config.yaml").read_text()))
    train, held_out, _ = prepare_data(config, AutoTokenizer.from_pretrained(model))
    assert held_out is not None
    plan = run.plan
    batches = GlobalBatches(
        tuple(train.lengths), tuple(train.answer_tokens), plan["global_batch"], config.seed, plan["padding_free"]
    )
    shape = (plan["processes"], plan["micro_batch"], plan["gradient_accumulation_steps"])
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = [
        sums(loaded, [train[number] for number in micro_batch])
        for rank in batches.micro_batches(0, *shape)
        for micro_batch in rank
        if micro_batch
    ]
    tokens = sum(count for _, count, _ in found)
    balance = sum(balance * count for _, count, balance in found) / tokens
    loss, count, _ = sums(loaded, list(held_out))
    return sum(loss for loss, _, _ in found) / tokens, balance, loss / count


@pytest.mark.parametrize("asked", [False, True])
def test_a_step_has_the_balancing_loss_once_if_the_config_asks_for_it(
    tune: Runner, tiny_tokenizer: Any, tmp_path: Path, asked: bool
) -> None:
    model = make_mixture(tmp_path / "mixture", tiny_tokenizer, asked)
    alone = tune.in_turn(
        options(model, "--hardware=cpu:1"),
        options(model, "--hardware=cpu:1", "--per_device_train_batch_size=12"),
        options(model, "--hardware=cpu:1", "--per_device_train_batch_size=3", "--padding_free=off"),
    )
    replicas = tune.in_turn(options(model, *REPLICAS))
    for run in (*alone, *replicas):
        tokens, balance, held_out = of_the_first_step(run, model)
        assert run.losses[0] == pytest.approx(tokens + (WEIGHT * balance if asked else 0), rel=1e-5)
        assert run.report["held_out_loss_before"] == pytest.approx(held_out, rel=1e-5)
    if not asked:
        for run in (*alone[1:], *replicas):
            assert run.losses == pytest.approx(alone[0].losses, rel=1e-5)


def test_a_mixture_that_is_split_runs_in_lanes_and_keeps_its_config(
    tune: Runner, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Balancing losses, which nobody asked for, forbade the cut; and saved models asked for them."""
    model = make_mixture(tmp_path / "mixture", tiny_tokenizer, asked=False)
    run = tune.in_turn(options(model, *SPLIT, "--pipeline=on", "--full_finetuning"))[0]
    assert run.report["lanes_reason"] is None
    assert run.losses[0] == pytest.approx(of_the_first_step(run, model)[0], rel=1e-5)
    assert json.loads((run.run / "model" / "config.json").read_text())["output_router_logits"] is False
