"""A split model computes bit for bit what the model in one piece computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from strategies.errors import ConfigError
from strategies.stages import dissect, split

torch.set_num_threads(1)
CPU = torch.device("cpu")
VOCAB = 61
CUTS = {1: [0], 2: [0, 2], 3: [0, 1, 3], 4: [0, 1, 2, 4]}
FAMILIES = ["llama", "qwen3", "gemma3", "mistral"]


def tiny_model(family: str = "llama", tied: bool = False, layers: int = 5, lora: bool = False, seed: int = 0) -> Any:
    import transformers

    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    names = {
        "llama": ("LlamaConfig", {}),
        "qwen3": ("Qwen3Config", {}),
        # Two kinds of mask and rotary table: later layers of a stage want extras that its first did not get.
        "gemma3": ("Gemma3TextConfig", {"sliding_window": 4, "layer_types": _alternating(layers)}),
        "mistral": ("MistralConfig", {"sliding_window": 5}),
    }
    name, more = names[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**shape, **more)
    model = transformers.AutoModelForCausalLM.from_config(config)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return model.train()


def _alternating(layers: int) -> list[str]:
    return ["full_attention" if index % 3 == 2 else "sliding_attention" for index in range(layers)]


def micro_batches(count: int = 2, rows: int = 2, length: int = 9) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    batches = []
    for index in range(count):
        ids = torch.randint(3, VOCAB, (rows, length + index), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, -2:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def checkpointing(model: Any, mode: str) -> None:
    if mode != "off":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})


def train_step(model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[list[torch.Tensor], dict[str, Any]]:
    model.zero_grad(set_to_none=True)
    losses = []
    for batch in batches:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    return losses, {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(left: tuple[Any, Any], right: tuple[Any, Any]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(left[0], right[0], strict=True))
    assert left[1].keys() == right[1].keys()
    for name, gradient in left[1].items():
        other = right[1][name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or torch.equal(gradient, other), name


@pytest.mark.parametrize("mode", ["off", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_bitwise_those_of_the_whole_model(
    family: str, tied: bool, lora: bool, mode: str
) -> None:
    model = tiny_model(family, tied, lora=lora)
    checkpointing(model, mode)
    batches = micro_batches()
    expected = train_step(model, batches)
    assert any(gradient is not None and gradient.any() for gradient in expected[1].values())
    for count in (2, 3, 4):
        stages = split(model, CUTS[count], [CPU] * count)
        assert_same(expected, train_step(model, batches))
        # Recomputation does not count, and with LoRA stage 0 trains too: each boundary is crossed once each way.
        assert [(c.forward, c.backward) for c in stages.crossings] == [(2, 2)] * (count - 1)
        stages.undo()
    assert_same(expected, train_step(model, batches))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_names_classes_ties_and_state_stay_and_undo_takes_all_back(family: str, tied: bool) -> None:
    model = tiny_model(family, tied)
    classes = {name: type(module) for name, module in model.named_modules()}
    state = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    stages = split(model, CUTS[3], [CPU] * 3)
    for name, module in model.named_modules():
        assert isinstance(module, classes[name])
        assert type(module).__name__ == classes[name].__name__
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == state
    if tied:
        assert model.lm_head.weight is model.get_input_embeddings().weight
    stages.undo()
    stages.undo()
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_parameter_is_in_exactly_one_stage(tied: bool, lora: bool) -> None:
    model = tiny_model("qwen3", tied, lora=lora)
    stages = split(model, CUTS[3], [CPU] * 3)
    owned = [id(parameter) for stage in stages.parameters for parameter in stage.values()]
    assert sorted(owned) == sorted(id(parameter) for parameter in model.parameters())
    assert len(set(owned)) == len(owned)
    for stage, (first, last) in enumerate([(0, 0), (1, 2), (3, 4)]):
        indices = {
            int(name.split("layers.")[1].split(".")[0]) for name in stages.parameters[stage] if "layers." in name
        }
        assert indices == set(range(first, last + 1))
    rest = [[name for name in stage if "layers." not in name] for stage in stages.parameters]
    prefix = "base_model.model." if lora else ""
    head = [] if tied else [f"{prefix}lm_head.weight"]
    assert rest == [[f"{prefix}model.embed_tokens.weight"], [], [f"{prefix}model.norm.weight", *head]]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_and_generation_with_a_cache_are_the_same(family: str, tied: bool) -> None:
    model = tiny_model(family, tied, lora=True).eval()
    batch = micro_batches(1)[0]
    prompt = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}

    def outputs() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            logits = model(**batch).logits
        return logits, model.generate(**prompt, max_new_tokens=6, do_sample=False)

    expected = outputs()
    stages = split(model, CUTS[4], [CPU] * 4)
    found = outputs()
    assert torch.equal(expected[0], found[0])
    assert torch.equal(expected[1], found[1])
    assert [c.backward for c in stages.crossings] == [0, 0, 0]


def test_no_storage_is_shared_over_a_boundary_and_extras_are_copied_once_a_stage() -> None:
    model = tiny_model("gemma3", layers=6)
    split(model, [0, 3], [CPU] * 2)
    seen: list[set[int]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [args[0], kwargs["attention_mask"], *kwargs["position_embeddings"], kwargs["position_ids"]]
        seen.append({tensor.untyped_storage().data_ptr() for tensor in tensors})

    for layer in dissect(model).layers:
        layer.register_forward_pre_hook(note, with_kwargs=True)
    kept = []  # storages must stay alive, else an address could come twice
    for layer in dissect(model).layers:
        layer.register_forward_hook(lambda _m, args, out: kept.append((args, out)))
    model(**micro_batches(1)[0], use_cache=False)
    first, second = set().union(*seen[:3]), set().union(*seen[3:])
    assert not first & second
    # Three hidden states; two masks, two pairs of rotary tables, one vector of positions, shared by the three layers.
    assert len(second) == 3 + 2 + 4 + 1


def test_nothing_is_held_after_a_pass_or_a_failed_one() -> None:
    model = tiny_model("llama", tied=True)
    stages = split(model, CUTS[3], [CPU] * 3)
    model(**micro_batches(1)[0], use_cache=False)
    assert not stages._roads.in_pass()
    with pytest.raises(IndexError):
        model(**micro_batches(1)[0], use_cache=False, logits_to_keep=object())
    assert not stages._roads.in_pass()


def test_a_frozen_tied_head_follows_a_weight_that_is_overwritten() -> None:
    model = tiny_model("llama", tied=True, lora=True)
    other = copy.deepcopy(model)
    split(model, CUTS[2], [CPU] * 2)
    batches = micro_batches()
    assert_same(train_step(other, batches), train_step(model, batches))
    for each in (model, other):
        with torch.no_grad():
            each.get_input_embeddings().weight.mul_(1.5)
    assert_same(train_step(other, batches), train_step(model, batches))


def test_training_keeps_split_and_whole_model_equal_over_steps() -> None:
    whole = tiny_model("gemma3", tied=True)
    model = copy.deepcopy(whole)
    split(model, CUTS[4], [CPU] * 4)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (whole, model)]
    for _ in range(3):
        assert_same(train_step(whole, micro_batches()), train_step(model, micro_batches()))
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("lora", [False, True], ids=["trained", "frozen"])
def test_a_deep_copy_of_a_split_model_is_split_and_right(lora: bool) -> None:
    model = tiny_model(tied=True, lora=lora)
    expected = train_step(model, micro_batches())
    stages = split(model, CUTS[3], [CPU] * 3)
    other = copy.deepcopy(model)
    assert_same(expected, train_step(other, micro_batches()))
    assert [c.forward for c in stages.crossings] == [2, 2]
    assert_same(expected, train_step(model, micro_batches()))


@pytest.mark.parametrize("lora", [False, True])
def test_accelerate_hooks_are_removed(lora: bool) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = tiny_model(lora=lora)
    expected = train_step(model, micro_batches())
    # accelerate hooks the base model while it loads, and PEFT's wrapper answers for its attributes.
    base = model.get_base_model() if lora else model
    add_hook_to_module(base, AlignDevicesHook("cpu", io_same_device=True))
    split(model, CUTS[2], [CPU] * 2)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    assert_same(expected, train_step(model, micro_batches()))


def test_a_forward_that_came_after_accelerates_hook_stays() -> None:
    """Unsloth sets its fused kernels on modules that are hooked already; what the hook had wrapped is older."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = tiny_model()
    first, second, third = (model.model.layers[index].mlp for index in (0, 1, 2))
    for mlp in (first, second, third):
        add_hook_to_module(mlp, AlignDevicesHook("meta"))
    hooked, before = second.forward, third._old_forward
    first.forward = torch.zeros_like
    second.forward = lambda hidden: hooked(hidden) + 1
    split(model, [0, 2], [CPU, CPU])
    hidden = torch.ones(2, 3, 16)
    assert first(hidden).eq(0).all()
    torch.testing.assert_close(second(hidden), second._old_forward(hidden) + 1)
    assert third.forward == before


def test_four_bit_weights() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_model(layers=4)
    for layer in dissect(model).layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    shape = (linear.in_features, linear.out_features)
                    packed = bitsandbytes.nn.Linear4bit(*shape, bias=False, quant_type="nf4")
                    packed.load_state_dict(linear.state_dict())
                    setattr(parent, name, packed.to("cpu"))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    expected = train_step(model, micro_batches())
    split(model, [0, 2], [CPU] * 2)
    assert_same(expected, train_step(model, micro_batches()))


@pytest.mark.parametrize("cuts", [[], [1], [0, 0], [0, 3, 2], [0, 5]])
def test_cuts_that_do_not_divide_the_layers_are_refused(cuts: list[int]) -> None:
    with pytest.raises(ConfigError, match="do not divide 5 layers"):
        split(tiny_model(), cuts, [CPU] * len(cuts))


def test_other_refusals() -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match="2 stages but 3 devices"):
        split(model, [0, 2], [CPU] * 3)
    stages = split(model, [0, 2], [CPU] * 2)
    with pytest.raises(ConfigError, match="split already"):
        split(model, [0, 2], [CPU] * 2)
    stages.undo()
    layers = dissect(model).layers
    layers[4].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
    with pytest.raises(ConfigError, match=r"down_proj\.weight is shared by stages 0 and 1"):
        split(model, [0, 2], [CPU] * 2)
    model.config.num_hidden_layers = 9
    with pytest.raises(ConfigError, match="no list of 9 layers"):
        split(model, [0, 2], [CPU] * 2)
