"""Builds the real model, adapters included, on whatever tensors the caller's mode makes: fake ones, for a trace."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from parallel_tune.memory.anatomy import anatomy
from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.parameters import ALL_LINEAR
from parallel_tune.memory.settings import TrainingSettings
from parallel_tune.memory.states import NF4_BLOCK, NF4_SCALE_BLOCK
from strategies.contracts import Part
from strategies.errors import ConfigError

NOT_OF_A_CUT_MODEL = frozenset({"layer_types", "quantization_config", "text_config", "vision_config"})
"""What of a model's config does not hold for a few of its layers."""


class _DequantisedMatmul(torch.autograd.Function):
    """What bitsandbytes' MatMul4Bit holds: the whole 16-bit weight, for the duration of each product."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, layer: CountedLinear4bit) -> torch.Tensor:
        ctx.layer = layer
        weight = layer.dequantised(inputs.dtype)
        return torch.nn.functional.linear(inputs, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.layer.dequantised(gradient.dtype), None


class CountedLinear4bit(torch.nn.Module):
    """Stands for a double-quantised nf4 linear: the same bytes at rest and in use, no meaningful numbers."""

    def __init__(self, linear: torch.nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        size = linear.weight.numel()
        scales = -(-size // NF4_BLOCK)
        self.weight = torch.nn.Parameter(torch.empty(size // 2, dtype=torch.uint8), requires_grad=False)
        self.weight.compress_statistics, self.weight.quant_type = True, "nf4"  # type: ignore[attr-defined]
        self.compute_dtype, self.compute_type_is_set, self.quant_state = dtype, True, None
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8))
        self.register_buffer("scales_of_scales", torch.empty(-(-scales // NF4_SCALE_BLOCK), dtype=torch.float32))
        self.register_buffer("tables", torch.empty(16 + 256 + 1, dtype=torch.float32))
        self.bias = linear.bias

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.weight.device)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = _DequantisedMatmul.apply(inputs, self)  # type: ignore[no-untyped-call]
        return result if self.bias is None else result + self.bias


@contextmanager
def _counted_as_bitsandbytes() -> Iterator[None]:
    """Let peft take CountedLinear4bit for bitsandbytes' own, so that its 4-bit adapter layer is what runs."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError("a 4-bit trace needs bitsandbytes", "pip install bitsandbytes") from error
    original = bitsandbytes.nn.Linear4bit
    bitsandbytes.nn.Linear4bit = CountedLinear4bit
    try:
        yield
    finally:
        bitsandbytes.nn.Linear4bit = original


def config_values(facts: ModelFacts) -> dict[str, Any]:
    """A text config that builds a model with these facts."""
    f = facts
    values: dict[str, Any] = {
        "model_type": "gemma3_text" if f.model_type == "gemma3" else f.model_type,
        "hidden_size": f.hidden_size,
        "intermediate_size": f.intermediate_size,
        "num_hidden_layers": f.num_layers,
        "num_attention_heads": f.num_heads,
        "num_key_value_heads": f.num_kv_heads,
        "head_dim": f.head_dim,
        "vocab_size": f.vocab_size,
        "tie_word_embeddings": f.tied_embeddings,
        "attention_bias": f.o_bias or (f.qkv_bias and not f.model_type.startswith("qwen2")),
        "mlp_bias": f.mlp_bias,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    if f.model_type == "gemma2":
        values["attn_logit_softcapping"] = 50.0 if f.attention_softcap else None
        values["final_logit_softcapping"] = 30.0 if f.final_softcap else None
    if f.num_experts:
        values |= {
            "num_experts" if f.model_type.startswith("qwen") else "num_local_experts": f.num_experts,
            "num_experts_per_tok": f.experts_per_token,
            "moe_intermediate_size": f.moe_intermediate_size,
            "shared_expert_intermediate_size": f.shared_expert_intermediate_size,
            "mlp_only_layers": list(f.dense_layers),
        }
    values["sliding_window"] = f.sliding_window or None
    # A cut may have none of the windowed layers, and a family's own rule would make some.
    if f.sliding_window and f.model_type != "phi3":
        values["layer_types"] = [
            "sliding_attention" if i in f.windowed_layers else "full_attention" for i in range(f.num_layers)
        ]
    return values


def cut_to(facts: ModelFacts, layers: tuple[int, ...]) -> ModelFacts:
    """The model that has only these layers, in this order."""
    return dataclasses.replace(
        facts,
        num_layers=len(layers),
        windowed_layers=tuple(new for new, old in enumerate(layers) if old in facts.windowed_layers),
        dense_layers=tuple(new for new, old in enumerate(layers) if old in facts.dense_layers),
    )


def cut_config(own: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
    """A model's own config for as many layers as the facts have; what lists a value a layer is shortened."""
    whole = own["num_hidden_layers"]
    values = {key: value for key, value in own.items() if key not in NOT_OF_A_CUT_MODEL}
    values = {
        key: value[: facts.num_layers] if isinstance(value, list) and len(value) == whole else value
        for key, value in values.items()
    }
    values["num_hidden_layers"] = facts.num_layers
    if own.get("layer_types"):
        values["layer_types"] = [
            "sliding_attention" if i in facts.windowed_layers else "full_attention" for i in range(facts.num_layers)
        ]
    return values


def build_model(
    facts: ModelFacts,
    settings: TrainingSettings,
    part: Part,
    device: torch.device,
    overrides: Mapping[str, Any] | None = None,
) -> Any:
    """The trainable model of one device: only what `part` holds of it keeps its weights, and no value means anything.

    Built on the meta device first, since Module.to fails on fake tensors, and since nothing is to be initialised.

    Args:
        facts: the model, already cut to the layers of the part.
        overrides: the model's own config, where the facts do not carry all (an architecture that they do not describe).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    values = cut_config(overrides, facts) if overrides else config_values(facts)
    if part.embedding is not part.head:
        values["tie_word_embeddings"] = False
    config = AutoConfig.for_model(**values)
    config.use_cache = False
    dtype = getattr(torch, settings.weights_dtype or settings.compute_dtype)
    # Flash attention's own kernels take no fake tensors, and keep what sdpa's do.
    attention = "eager" if settings.eager_attention else "sdpa"
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        _quieten_router(model)
        names = anatomy(model, facts.num_layers)
        if not part.embedding:
            model.get_input_embeddings().weight = torch.nn.Parameter(torch.empty(0, dtype=dtype))
        if not part.head:
            for name in (*names.tail, names.head):
                model.set_submodule(name, torch.nn.Identity())
        if settings.load_in_4bit:
            _quantise(model.get_submodule(names.layers), getattr(torch, settings.compute_dtype))
        model.train()
        if settings.method == "lora":
            model = _with_adapters(model, settings)
    _materialise(model, device)
    return model


def _materialise(model: torch.nn.Module, device: torch.device) -> None:
    """Give every meta tensor real bytes, or fake ones; tied parameters stay tied."""
    made: dict[torch.Tensor, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in made:
                empty = torch.zeros_like(parameter, device=device)
                made[parameter] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
            if parameter is not None:
                module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros_like(buffer, device=device)


def _quieten_router(model: Any) -> None:
    # The loop over experts asks which of them were hit; fake tensors cannot answer, grouped products need not ask.
    if getattr(model.config, "num_experts", 0) or getattr(model.config, "num_local_experts", 0):
        model.config._experts_implementation = "grouped_mm"


def _quantise(layers: Any, dtype: torch.dtype) -> None:
    for layer in layers:
        for name, module in list(layer.named_modules()):
            if type(module) is torch.nn.Linear:
                parent, _, leaf = name.rpartition(".")
                setattr(layer.get_submodule(parent), leaf, CountedLinear4bit(module, dtype))


def _with_adapters(model: Any, settings: TrainingSettings) -> Any:
    from peft import LoraConfig, get_peft_model

    targets: str | list[str] = list(settings.lora_targets)
    if ALL_LINEAR in settings.lora_targets:
        # peft looks for linears by their class, and would not see the counted ones.
        counted = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, CountedLinear4bit)}
        targets = sorted(counted) or ALL_LINEAR
    config = LoraConfig(
        r=settings.lora_rank,
        target_modules=targets,
        lora_dropout=settings.lora_dropout,
        use_dora=settings.use_dora,
        bias=settings.bias,
        task_type="CAUSAL_LM",
    )
    if settings.load_in_4bit:
        model.is_loaded_in_4bit = True
        with _counted_as_bitsandbytes():
            adapted = get_peft_model(model, config)
    else:
        adapted = get_peft_model(model, config)
    wanted = getattr(torch, settings.lora_dtype)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(wanted)
    return adapted.base_model.model
