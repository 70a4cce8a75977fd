"""What a model is made of, read from its config.json: the shapes that memory and time follow from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from parallel_tune.memory.positions import Positions, positions_of
from strategies.contracts import ModuleNames
from strategies.errors import ConfigError

QKV_BIAS_BY_DEFAULT = frozenset({"qwen2", "qwen2_moe"})
"""Families whose configs do not say that their query, key and value projections carry a bias."""
QK_NORM = frozenset({"qwen3", "qwen3_moe", "gemma3", "gemma3_text"})
"""Families that normalise queries and keys per head."""
FUSED_PROJECTIONS = frozenset({"phi3"})
"""Families with one linear for q, k, v and one for gate and up."""
OFFSET_NORM = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text"})
"""Families whose norm multiplies by 1 + weight in float32."""
KNOWN_TYPES = frozenset(
    {"llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3"}
    | {"gemma3_text", "phi3"}
)
"""Model types whose layers the closed form describes; others need `plan --trace`."""

_GEMMA3 = {
    "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
}  # fmt: skip
CLASS_DEFAULTS: dict[str, dict[str, int]] = {
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "gemma2": {"head_dim": 256},
    "gemma": {"head_dim": 256},
    "qwen3": {"head_dim": 128},
}
"""What published configs leave to transformers' classes, and nothing else in them tells."""


@dataclass(frozen=True)
class ModelFacts:
    """A decoder-only language model, as far as memory and time depend on it.

    Attributes:
        intermediate_size: width of a dense layer's feed-forward block.
        qkv_bias, o_bias, mlp_bias: which linears carry a bias.
        qk_norm: queries and keys are normalised per head.
        fused_projections: q, k, v are one linear and gate, up another (Phi-3).
        norms_per_layer: norms over the hidden size in each layer (2, or 4 in Gemma 2 and 3).
        offset_norm: the norms multiply by 1 + weight, in float32 (Gemma).
        num_experts: experts of a mixture layer; 0 for a dense model.
        dense_layers: layers of a mixture model that are dense all the same.
        sliding_window: tokens that a windowed layer looks back; 0 for none.
        windowed_layers: the layers that look back no further than the window.
        attention_softcap: attention scores pass through tanh (Gemma 2).
        final_softcap: the logits pass through tanh (Gemma 2).
        extra_parameters: parameters beside the text model (a vision tower), held with the embedding.
        dtype: the dtype that the weights are published in.
        quantized_4bit: the repository holds bitsandbytes 4-bit weights.
        other_quantization: what else the repository's weights are quantised by, e.g. "gptq".
        positions: how long its rows may be.
        foreign_mixer: what brings tokens together beside full and windowed attention, e.g. "linear_attention" layers.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    fused_projections: bool = False
    norms_per_layer: int = 2
    offset_norm: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    dense_layers: tuple[int, ...] = ()
    sliding_window: int = 0
    windowed_layers: tuple[int, ...] = ()
    attention_softcap: bool = False
    final_softcap: bool = False
    extra_parameters: int = 0
    dtype: str = "bfloat16"
    quantized_4bit: bool = False
    other_quantization: str = ""
    foreign_mixer: str = ""
    positions: Positions = field(default_factory=Positions)
    modules: ModuleNames = field(default_factory=ModuleNames)

    @property
    def query_size(self) -> int:
        """Width of all query heads together; not always the hidden size."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def closed_form_known(self) -> bool:
        """Whether the closed form describes this family; otherwise a trace is the better answer."""
        return self.model_type in KNOWN_TYPES

    def is_mixture(self, layer: int) -> bool:
        """Whether the layer's feed-forward block is a mixture of experts."""
        return self.num_experts > 0 and layer not in self.dense_layers


def facts_from_config(config: Mapping[str, Any], source: str = "config.json") -> ModelFacts:
    """Read the facts out of a Hugging Face config, nested text configs included.

    Args:
        config: the parsed config.json.
        source: what to call it in an error.

    Raises:
        ConfigError: a value that nothing can be said without is missing, or is not one that a model can have.
    """
    nested = config.get("text_config")
    text: dict[str, Any] = {**config, **nested} if isinstance(nested, Mapping) else dict(config)
    model_type = str(config.get("model_type") or text.get("model_type") or "")
    left_out = {name: value for name, value in CLASS_DEFAULTS.get(model_type, {}).items() if text.get(name) is None}
    text.update(left_out)
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [name for name in needed if text.get(name) is None]
    if missing:
        raise ConfigError(
            f"{source} (model_type {model_type or 'unknown'!r}) has no usable {', '.join(missing)}",
            "Only decoder-only language models whose config.json gives their sizes under these names can be planned.",
        )
    _check_counts(text, source, needed)
    heads = int(text["num_attention_heads"])
    layers = int(text["num_hidden_layers"])
    attention_bias = bool(text.get("attention_bias", False))
    # transformers stores Qwen's bias nowhere: its modelling code fixes it.
    qkv_bias = bool(text.get("qkv_bias", attention_bias)) or model_type in QKV_BIAS_BY_DEFAULT
    experts = int(text.get("num_local_experts") or text.get("num_experts") or 0)
    if experts and not text.get("num_experts_per_tok"):
        raise ConfigError(f"{source} has {experts} experts and no num_experts_per_tok", "Add how many a token goes to.")
    window, windowed = _windows(text, model_type, layers)
    vision = config.get("vision_config")
    return ModelFacts(
        model_type=model_type,
        hidden_size=int(text["hidden_size"]),
        intermediate_size=int(text["intermediate_size"]),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(text.get("num_key_value_heads") or heads),
        head_dim=int(text.get("head_dim") or int(text["hidden_size"]) // heads),
        vocab_size=int(text["vocab_size"]),
        tied_embeddings=bool(text.get("tie_word_embeddings", model_type.startswith("gemma"))),
        qkv_bias=qkv_bias,
        o_bias=attention_bias and model_type not in QKV_BIAS_BY_DEFAULT,
        mlp_bias=bool(text.get("mlp_bias", False)),
        qk_norm=model_type in QK_NORM,
        fused_projections=model_type in FUSED_PROJECTIONS,
        norms_per_layer=4 if model_type in {"gemma2", "gemma3", "gemma3_text"} else 2,
        offset_norm=model_type in OFFSET_NORM,
        num_experts=experts,
        experts_per_token=int(text.get("num_experts_per_tok") or 0) if experts else 0,
        moe_intermediate_size=int(text.get("moe_intermediate_size") or text["intermediate_size"]) if experts else 0,
        shared_expert_intermediate_size=int(text.get("shared_expert_intermediate_size") or 0) if experts else 0,
        dense_layers=_dense_layers(text, layers) if experts else (),
        sliding_window=window,
        windowed_layers=windowed,
        attention_softcap=bool(text.get("attn_logit_softcapping", model_type == "gemma2")),
        final_softcap=bool(text.get("final_logit_softcapping")),
        extra_parameters=_vision_parameters(vision, int(text["hidden_size"])) if isinstance(vision, Mapping) else 0,
        dtype=str(text.get("dtype") or text.get("torch_dtype") or "bfloat16"),
        quantized_4bit=_is_quantized_4bit(config),
        other_quantization=_other_quantization(config),
        foreign_mixer=_foreign_mixer(text),
        positions=positions_of(text),
        modules=_module_names(isinstance(nested, Mapping)),
    )


COUNTS = (
    "num_key_value_heads", "head_dim", "num_local_experts", "num_experts", "num_experts_per_tok",
    "moe_intermediate_size", "shared_expert_intermediate_size", "sliding_window", "max_window_layers",
    "sliding_window_pattern", "decoder_sparse_step",
)  # fmt: skip
"""What may be left out or be null, and is a number otherwise."""


def _check_counts(text: Mapping[str, Any], source: str, needed: tuple[str, ...]) -> None:
    for name in (*needed, *COUNTS):
        value = text.get(name)
        if value is None and name not in needed:
            continue
        if type(value) is not int or value < (1 if name in needed else 0):
            hint = "Restore the model's config.json."
            raise ConfigError(f"{source}: {name} is {value!r}, which no model can have", hint)
    heads, groups = text["num_attention_heads"], text.get("num_key_value_heads")
    if groups and heads % groups:
        raise ConfigError(
            f"{source}: {heads} attention heads cannot share {groups} key and value heads evenly",
            "Restore the model's config.json.",
        )


def _dense_layers(text: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Qwen's rule: listed layers, and all but every `decoder_sparse_step`-th, are dense."""
    listed = set(text.get("mlp_only_layers") or ())
    step = int(text.get("decoder_sparse_step") or 1)
    return tuple(i for i in range(layers) if i in listed or (i + 1) % step != 0)


def _windows(text: Mapping[str, Any], model_type: str, layers: int) -> tuple[int, tuple[int, ...]]:
    """Which layers look back only over a window, by each family's own rule where the config lists none."""
    window = int(text.get("sliding_window") or 0)
    if not window or text.get("use_sliding_window") is False:
        return 0, ()
    kinds = text.get("layer_types")
    if isinstance(kinds, list):
        return window, tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    if model_type == "gemma2":
        return window, tuple(range(0, layers, 2))
    if model_type in {"gemma3", "gemma3_text"}:
        pattern = int(text.get("sliding_window_pattern") or text.get("_sliding_window_pattern") or 6)
        return window, tuple(i for i in range(layers) if (i + 1) % pattern)
    if model_type.startswith("qwen"):
        if "use_sliding_window" not in text:
            return 0, ()
        return window, tuple(range(int(text.get("max_window_layers") or 0), layers))
    return window, tuple(range(layers))


def _foreign_mixer(text: Mapping[str, Any]) -> str:
    """Layers by their names in the config; models that list none show themselves by the sizes of their states."""
    kinds = text.get("layer_types")
    known = {"full_attention", "sliding_attention"}
    for kind in kinds if isinstance(kinds, list) else ():
        if kind not in known:
            return f"{kind} layers"
    prefixes = ("mamba_", "ssm_", "rwkv_", "lru_", "linear_conv_")
    named = (name for name in text if name.startswith(prefixes) or name in {"state_size", "conv_kernel"})
    return next((f"a {name}" for name in named), "")


def _vision_parameters(vision: Mapping[str, Any], text_hidden_size: int) -> int:
    """Parameters of a SigLIP tower and Gemma 3's projector (transformers modeling_siglip, modeling_gemma3)."""
    hidden = int(vision.get("hidden_size", 768))
    inner = int(vision.get("intermediate_size", 3072))
    patch = int(vision.get("patch_size", 16))
    positions = (int(vision.get("image_size", 224)) // patch) ** 2
    embeddings = 3 * patch * patch * hidden + hidden + positions * hidden
    attention = 4 * (hidden * hidden + hidden)
    layer = attention + 2 * hidden * inner + inner + hidden + 4 * hidden
    projector = hidden * text_hidden_size + hidden
    return embeddings + int(vision.get("num_hidden_layers", 12)) * layer + 2 * hidden + projector


def _is_quantized_4bit(config: Mapping[str, Any]) -> bool:
    quantization = config.get("quantization_config")
    return isinstance(quantization, Mapping) and bool(
        quantization.get("load_in_4bit") or quantization.get("_load_in_4bit")
    )


def _other_quantization(config: Mapping[str, Any]) -> str:
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping) or _is_quantized_4bit(config):
        return ""
    if quantization.get("load_in_8bit") or quantization.get("_load_in_8bit"):
        return "bitsandbytes in 8 bit"
    return str(quantization.get("quant_method") or "a method without a name")


def _module_names(multimodal: bool) -> ModuleNames:
    if not multimodal:
        return ModuleNames()
    inner = "model.language_model"
    return ModuleNames(
        embedding=(
            f"{inner}.embed_tokens",
            f"{inner}.rotary_emb",
            "model.vision_tower",
            "model.multi_modal_projector",
        ),
        layers=f"{inner}.layers",
        tail=(f"{inner}.norm",),
    )
