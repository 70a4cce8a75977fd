"""Loaded models whose loss is computed chunk by chunk: the same loss and gradients, real logits without labels; and
models that it would change are refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from parallel_tune import chunked_loss
from parallel_tune.data import IGNORED, EncodedRow, collate
from parallel_tune.fused_head import use_chunked_loss
from parallel_tune.memory.tracker import LiveBytes
from strategies.errors import ConfigError
from strategies.pipeline import Lanes
from strategies.stages import split

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CAP = {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 1.5}
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama, tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=8),
    "phi (a bias)": transformers.PhiConfig(**SIZES),
    "opt (contiguous)": transformers.OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
                                               num_attention_heads=4, word_embed_proj_dim=32),
    "mamba (float32)": transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True),
    "gemma2": transformers.Gemma2Config(**SIZES, **CAP),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, **CAP),
    "granite": transformers.GraniteConfig(**SIZES, logits_scaling=6.0),
    "cohere": transformers.CohereConfig(**SIZES, logit_scale=0.5),
}  # fmt: skip
REFUSED: dict[str, tuple[Any, str]] = {
    "scaled unsaid": (transformers.HyperCLOVAXConfig(**SIZES, logits_scaling=1.0), "between head and loss"),
    "scaled otherwise": (transformers.HyperCLOVAXConfig(**SIZES, logits_scaling=6.0), "model's own is"),
    "head of two parts": (transformers.GPTNeoXConfig(**SIZES), "not a torch.nn.Linear"),
    "no loss function": (transformers.LlamaConfig(**SIZES), "computes its loss otherwise"),
    "another loss": (transformers.LlamaConfig(**SIZES), "its loss is strange"),
    "needs logits": (transformers.LlamaConfig(**SIZES), "forward needs logits"),
}
SESSION: Any = SimpleNamespace(device=torch.device("cpu"))
TARGETS = torch.tensor(37)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "FUSED_CHUNK_ROWS", 8)


def make_rows() -> list[EncodedRow]:
    generator = torch.Generator().manual_seed(1)
    rows: list[EncodedRow] = []
    for length in (19, 7, 13):
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [*[IGNORED] * 4, *ids[4:]]})
    return rows


ROWS = make_rows()


def make(config: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).train()
    for parameter in model.parameters():
        parameter.data *= 3  # logits of some size
    return model


def adapted(config: Any) -> Any:
    model = get_peft_model(make(config), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def passed(model: Any, items: Any = TARGETS) -> tuple[torch.Tensor, dict[str, Any]]:
    model.zero_grad(set_to_none=True)
    more = {} if items is None else {"num_items_in_batch": items}
    loss = model(**collate(ROWS, 0), **more, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(found: Any, expected: Any) -> None:
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-6)
    for name, gradient in expected[1].items():
        other = found[1][name]
        assert (gradient is None) == (other is None), name
        if gradient is not None:
            assert float((other - gradient).norm()) <= 2e-6 * float(gradient.norm()) + 1e-7, name


@pytest.mark.parametrize("items", [None, TARGETS], ids=["mean", "items"])
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_are_the_models_own(name: str, items: Any) -> None:
    expected = passed(make(CONFIGS[name]), items)
    model = make(CONFIGS[name])
    use_chunked_loss(model, ROWS, SESSION, torch.float32)
    assert model.training
    assert_same(passed(model, items), expected)


def test_an_adapted_model_keeps_its_frozen_head_without_a_gradient(tmp_path: Path) -> None:
    plain, model = adapted(CONFIGS["llama"]), adapted(CONFIGS["llama"])
    use_chunked_loss(model, ROWS, SESSION, torch.float32)
    found = passed(model)
    assert_same(found, passed(plain))
    assert found[1]["base_model.model.lm_head.weight"] is None
    for each, folder in ((plain, tmp_path / "plain"), (model, tmp_path / "fused")):
        each.save_pretrained(folder)
    saved = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("plain", "fused")]
    assert saved[0] == saved[1]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "fused" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_the_model_is_what_it_was_to_all_others(tmp_path: Path) -> None:
    plain, model = make(CONFIGS["gemma2"]), make(CONFIGS["gemma2"])
    use_chunked_loss(model, ROWS, SESSION, torch.float32)
    assert isinstance(model, type(plain)) and type(model).__name__ == type(plain).__name__
    assert list(model.state_dict()) == list(plain.state_dict())
    passed(model)
    ids = torch.tensor([ROWS[0]["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)
        assert model(ids, labels=ids).logits is None
        generated = [each.generate(ids, max_new_tokens=6, do_sample=False) for each in (model, plain)]
    assert torch.equal(*generated)
    model.save_pretrained(tmp_path / "fused")
    plain.save_pretrained(tmp_path / "plain")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "fused" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_evaluating_makes_no_gradients_and_no_logits() -> None:
    model = make(transformers.LlamaConfig(**{**SIZES, "vocab_size": 20_000}))
    use_chunked_loss(model, ROWS, SESSION, torch.float32)
    ids = torch.randint(3, 64, (1, 100))
    with torch.no_grad(), LiveBytes() as tracker:
        tracker.count([*model.parameters(), *model.buffers()])
        before = tracker.live_bytes
        loss = model(ids, labels=ids, use_cache=False).loss
        peak = max(tracker.peaks_bytes.values()) - before
    assert not loss.requires_grad
    assert 8 * 20_000 * 4 < peak < 2 * 8 * 20_000 * 4 < 100 * 20_000 * 4


@pytest.mark.parametrize("kind", ["full", "tied", "lora"])
@pytest.mark.parametrize("lanes", [0, 1, 2])
def test_split_models_hand_the_same_on(kind: str, lanes: int) -> None:
    config = CONFIGS["llama, tied" if kind == "tied" else "llama"]
    build = adapted if kind == "lora" else make
    plain, model = build(config), build(config)
    stages = split(model, [0, 1], [torch.device("cpu")] * 2)
    use_chunked_loss(model, ROWS, SESSION, torch.float32)
    batches = [collate([row], 0) for row in ROWS]

    def forward(of: Any) -> Any:
        return lambda _, batch: of(**batch, num_items_in_batch=TARGETS, use_cache=False).loss

    def steps(of: Any) -> list[torch.Tensor]:
        losses = [forward(of)(0, batch) for batch in batches]
        for loss in losses:
            loss.backward()
        return [loss.detach() for loss in losses]

    expected = steps(plain)
    if lanes:
        pipeline = Lanes(stages, lanes)
        try:
            found = pipeline.run(batches, forward(model), backward=lambda loss: loss.backward())
            assert pipeline.reason is None
        finally:
            pipeline.close()
    else:
        found = steps(model)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-6, atol=0.0)
    for (name, one), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)


def spoilt(case: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model as remote code may have it."""
    kind = type(model)

    def own_loss(self: Any, input_ids: Any = None, labels: Any = None, **_: Any) -> Any:
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        wide = logits.view(-1, 64) if case == "needs logits" else logits.flatten(0, 1)
        loss = None if labels is None else torch.nn.functional.cross_entropy(wide, labels.flatten())
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)

    def strange(**_: Any) -> Any:
        raise AssertionError("never called")

    if case == "another loss":
        model.loss_function = strange
    if case in ("no loss function", "needs logits"):
        monkeypatch.setattr(kind, "forward", own_loss)
    if case == "head of two parts":
        model.set_output_embeddings(torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 64)))
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_it_would_change_is_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, why = REFUSED[case]
    model = spoilt(case, make(config), monkeypatch)
    with pytest.raises(ConfigError, match=f"--cross_entropy fused: .*{why}") as caught:
        use_chunked_loss(model, ROWS, SESSION, torch.float32)
    assert "--cross_entropy plain" in caught.value.hint


def test_a_run_of_such_a_model_ends_before_it_trains(tune: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    sizes = {**SIZES, "vocab_size": len(tiny_tokenizer), "logits_scaling": 6.0}
    make(transformers.HyperCLOVAXConfig(**sizes)).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model = (f"--model={tmp_path}", "--trace", "--hardware=cpu:1", "--cross_entropy=fused")
    ended = replace(tune, base=tune.base[1:]).ended(*model)
    assert ended.code == 2
    assert "this model's loss cannot be computed chunk by chunk" in ended.err and "--cross_entropy plain" in ended.err
    assert not (ended.run / "metrics.jsonl").exists()


def test_an_adapted_head_is_refused() -> None:
    model = get_peft_model(make(CONFIGS["llama"]), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ConfigError, match=r"its head is a peft.*Linear"):
        use_chunked_loss(model, ROWS, SESSION, torch.float32)
