"""Rows joined in one give the losses and gradients of padded rows; models that would mix them are found out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from parallel_tune.config import TrainConfig, make_config
from parallel_tune.data import IGNORED, EncodedRow, boundary_arguments, collate, fill_up, join
from parallel_tune.hardware import parse_hardware
from parallel_tune.memory.facts import ModelFacts, facts_from_config
from parallel_tune.padding_free import decide_padding
from parallel_tune.row_arguments import model_arguments
from parallel_tune.row_attention import use_row_attention
from parallel_tune.row_check import settle_padding
from strategies.errors import ConfigError

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = {"head_dim": 8, "sliding_window": 6}
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**SIZES),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=8),
    "mistral": transformers.MistralConfig(**SIZES, **WINDOW),
    "gemma2": transformers.Gemma2Config(**SIZES, **WINDOW, query_pre_attn_scalar=8),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, **WINDOW, query_pre_attn_scalar=8),
    "phi3": transformers.Phi3Config(**SIZES),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4),
}
LENGTHS = (3, 20, 2, 17, 9, 5, 13)
CPU = torch.device("cpu")


def make_rows() -> list[EncodedRow]:
    generator = torch.Generator().manual_seed(1)
    rows: list[EncodedRow] = []
    for length in LENGTHS:
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED, *ids[1:]]})
    rows[1]["labels"][:12] = [IGNORED] * 12
    return rows


ROWS = make_rows()
TARGETS = torch.tensor(sum(label != IGNORED for row in ROWS for label in row["labels"]))


def make(name: str) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])  # some tests change it
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    for parameter in model.parameters():
        parameter.data *= 3  # attention counts
    return model


def step(model: Any, batches: Iterator[dict[str, Any]]) -> tuple[float, torch.Tensor]:
    """Loss and gradient of a global batch."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=TARGETS).loss
        loss.backward()
        total += float(loss.detach())
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def padded(micro_batch: int) -> Iterator[dict[str, Any]]:
    return (collate(ROWS[at : at + micro_batch], 0) for at in range(0, len(ROWS), micro_batch))


def joined(micro_batch: int, engine: str = "transformers") -> Iterator[dict[str, Any]]:
    for at in range(0, len(ROWS), micro_batch):
        batch = join(ROWS[at : at + micro_batch], 0)
        yield {**batch, **boundary_arguments(batch.pop("row_lengths"), engine, CPU)}


def test_a_joined_batch_has_positions_and_targets_of_its_rows_alone() -> None:
    rows: list[EncodedRow] = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7]},
        {"input_ids": [8, 9, 10, 11], "labels": [8, 9, 10, 11], "row_lengths": [2, 2]},
    ]
    batch = join(rows, 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 9, IGNORED, 11]]
    assert batch["row_lengths"] == [3, 2, 2]
    assert boundary_arguments([3, 2, 2], "transformers", CPU)["cu_seq_lens_q"].tolist() == [0, 3, 5, 7]
    assert boundary_arguments([3, 2, 2], "unsloth", CPU)["packed_seq_lengths"].tolist() == [3, 2, 2]
    empty = join([], 3)
    assert (empty["input_ids"].tolist(), empty["labels"].tolist()) == ([[3, 3]], [[IGNORED, IGNORED]])
    assert (empty["position_ids"].tolist(), empty["row_lengths"]) == ([[0, 1]], [2])


@pytest.mark.parametrize("micro_batch", [1, 2, 3, len(LENGTHS)])
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_are_those_of_padded_rows(name: str, micro_batch: int) -> None:
    model = make(name)
    loss, gradient = step(model, padded(len(ROWS)))
    own = step(model, joined(micro_batch))  # transformers' mask, made from the positions
    use_row_attention(model)
    ours = step(model, joined(micro_batch))
    again = step(model, padded(micro_batch))  # padding on the right needs no mask
    for other_loss, other in (own, ours, again):
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert float((other - gradient).norm() / gradient.norm()) < 1e-5


@pytest.mark.parametrize("checkpointed", [False, True])
def test_attention_really_needs_the_boundaries(checkpointed: bool) -> None:
    model = make("llama")
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    use_row_attention(model)
    loss, gradient = step(model, joined(3))
    without = ({name: batch[name] for name in ("input_ids", "position_ids", "labels")} for batch in joined(3))
    other_loss, other = step(model, without)
    assert abs(other_loss - loss) > 1e-4
    assert float((other - gradient).norm() / gradient.norm()) > 0.01
    assert step(model, padded(3))[0] == pytest.approx(loss, rel=1e-5)


SESSION: Any = SimpleNamespace(device=CPU, any=lambda flag: flag)
PLAN: Any = SimpleNamespace(padding_free=True, padded_reason="", engine="transformers")


def settle(model: Any, config: TrainConfig) -> str | None:
    return settle_padding(model, ROWS, config, PLAN, SESSION, torch.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_check_passes_models_that_keep_rows_apart(name: str) -> None:
    model = make(name)
    assert settle(model, make_config({})) is None
    assert model.config._attn_implementation == "parallel_tune_rows"
    assert model.training


MIXERS: dict[str, Any] = {
    "convolutions": transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"] * 2),
    "attention of its own": transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2),
}


@pytest.mark.parametrize("name", MIXERS)
def test_the_check_finds_models_that_mix_rows(name: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MIXERS[name])
    for parameter in model.parameters():
        parameter.data *= 3
    loss, gradient = step(model, padded(3))
    reason = settle(model, make_config({}))
    assert reason is not None and "when others stand beside it" in reason
    assert model.config._attn_implementation == "sdpa" or name != "convolutions"
    again, same = step(model, padded(3))
    assert again == loss and torch.equal(same, gradient)
    for options in ({"padding_free": "on"}, {"packing": True}):
        with pytest.raises(ConfigError, match="would mix them: the outputs of a row change"):
            settle(model, make_config(options))


CHUNKS = {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 32, "no_rope_layers": [1, 1, 1, 0]}
WINDOWED: dict[str, tuple[Any, bool]] = {
    "of some layers": (transformers.Exaone4Config(**SIZES, sliding_window=18, sliding_window_pattern=4), True),
    "in the mask alone": (transformers.PhimoeConfig(**SIZES, sliding_window=18, num_local_experts=4), False),
    "of chunks": (transformers.Llama4TextConfig(**SIZES, **CHUNKS, attention_chunk_size=18), False),
    "longer than all rows": (transformers.PhimoeConfig(**SIZES, sliding_window=20, num_local_experts=4), True),
}
"""Models whose windows are longer than what is tried of each row, and whether our attention keeps to them."""


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_that_attention_is_not_told_of_is_found(name: str) -> None:
    torch.manual_seed(0)
    config, keeps = WINDOWED[name]
    # Not in training: PhiMoE's routers draw numbers then.
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for parameter in model.parameters():
        parameter.data *= 3
    loss, gradient = step(model, padded(3))
    reason = settle(model, make_config({}))
    assert (reason is None) == keeps and ("does not keep to" in (reason or "") or keeps), reason
    again, same = step(model, joined(3) if keeps else padded(3))
    assert again == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(same, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_a_forward_that_takes_no_boundaries_is_a_reason() -> None:
    model = make("llama")
    forward = model.forward

    def strict(input_ids: Any, position_ids: Any = None, use_cache: bool = True) -> Any:
        return forward(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)

    model.forward = strict
    reason = settle(model, make_config({}))
    assert reason is not None and "takes no row boundaries (TypeError" in reason


def test_unsloths_tables_that_follow_the_length_stay_padded() -> None:
    plan: Any = SimpleNamespace(padding_free=True, padded_reason="", engine="unsloth")
    model = make("llama")
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    reason = settle_padding(model, ROWS, make_config({}), plan, SESSION, torch.float32)
    assert reason == "Unsloth scales its dynamic rotary tables by the length of the whole batch"
    with pytest.raises(ConfigError, match=r"--packing joins rows .* dynamic rotary tables"):
        settle_padding(model, ROWS, make_config({"packing": True}), plan, SESSION, torch.float32)
    model.config.rope_parameters = {"rope_type": "llama3", "rope_theta": 1e4}
    assert settle_padding(model, ROWS, make_config({}), plan, SESSION, torch.float32) is None


def facts(name: str = "llama", **changes: Any) -> ModelFacts:
    return facts_from_config({**CONFIGS[name].to_dict(), **changes})


H100, T4, CPUS = (parse_hardware(text) for text in ("1xH100-80GB", "1xT4-16GB", "cpu:2"))


def test_padding_is_left_out_where_attention_can_keep_to_rows() -> None:
    for name in CONFIGS:
        assert decide_padding(make_config({}), facts(name), "transformers", H100, "bfloat16").free
    for engine in ("transformers", "unsloth"):
        for hardware, dtype in ((H100, "bfloat16"), (CPUS, "float32")):
            assert decide_padding(make_config({}), facts(), engine, hardware, dtype).free  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "model", "engine", "hardware", "dtype", "why"),
    [
        ({"padding_free": "off"}, facts(), "transformers", H100, "bfloat16", ""),
        ({}, facts(), "transformers", T4, "float16", "no kernel on"),
        ({}, facts(), "transformers", H100, "float32", "no kernel in float32"),
        ({"attn_implementation": "eager"}, facts(), "transformers", H100, "bfloat16", "eager attention"),
        ({}, facts("gemma2"), "unsloth", H100, "bfloat16", "Unsloth has no padding-free attention for gemma2"),
        ({}, facts(layer_types=["linear_attention"] * 4), "transformers", H100, "bfloat16", "linear_attention layers"),
        ({}, facts(mamba_d_state=16), "unsloth", CPUS, "float32", "a mamba_d_state"),
    ],
)
def test_else_rows_are_padded_and_it_says_why(
    options: dict[str, Any], model: ModelFacts, engine: Any, hardware: Any, dtype: str, why: str
) -> None:
    padding = decide_padding(make_config(options), model, engine, hardware, dtype)
    assert not padding.free
    assert why in padding.reason and bool(why) == bool(padding.reason)


def test_what_cannot_be_is_refused_where_it_was_asked_for() -> None:
    mixed = replace(facts(), foreign_mixer="linear_attention layers")
    for option, named in (({"padding_free": "on"}, "--padding_free on"), ({"packing": True}, "--packing")):
        with pytest.raises(ConfigError, match=f"{named} joins rows .* linear_attention layers"):
            decide_padding(make_config(option), mixed, "transformers", H100, "bfloat16")
        # What is only slow is done.
        assert decide_padding(make_config(option), facts(), "transformers", T4, "float16").free
    with pytest.raises(ConfigError, match="packing joins rows"):
        make_config({"packing": True, "padding_free": "off"})


@pytest.mark.parametrize("name", CONFIGS)
def test_joined_rows_at_a_fixed_size_give_the_same(name: str) -> None:
    """What fills a batch up changes nothing: neither in attention nor in the loss."""
    model = make(name)
    use_row_attention(model)
    groups = [ROWS[:3], ROWS[3:], []]
    joined = [join(rows, 0) for rows in groups]
    fixed = [fill_up(batch, 0, 64, 5) for batch in joined]
    assert all(batch["input_ids"].shape == (1, 64) for batch in fixed)
    loss, gradient = step(model, (model_arguments(batch, "transformers")[0] for batch in joined))
    filled_loss, filled_gradient = step(model, (model_arguments(batch, "transformers")[0] for batch in fixed))
    assert filled_loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(filled_gradient, gradient, rtol=1e-5, atol=1e-6)
