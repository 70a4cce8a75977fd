"""Exact parameter counts of a model, by the place that each parameter has in memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from parallel_tune.memory.facts import ModelFacts
from strategies.contracts import Part

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
DEFAULT_TARGETS = ATTENTION_TARGETS + MLP_TARGETS
"""The seven linears of a layer that LoRA adapts unless the user says otherwise."""
ALL_LINEAR = "all-linear"
"""peft's word for every linear but the head."""
EXPERT_TARGETS = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": MLP_TARGETS}
"""Families whose stacked experts peft adapts, and the names that stand for their gates, ups and downs (peft 0.21; not
Qwen2-MoE)."""


@dataclass(frozen=True)
class Linear:
    """One weight matrix of a layer; `bias` says whether it carries one."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weight_parameters(self) -> int:
        return self.inputs * self.outputs

    @property
    def bias_parameters(self) -> int:
        return self.outputs if self.bias else 0


@dataclass(frozen=True)
class PartParameters:
    """Parameters of a part of the model.

    Attributes:
        linear: weights of nn.Linear modules in the layers: what 4-bit loading quantises.
        linear_modules: how many such modules there are.
        expert: weights of fused expert tensors, which bitsandbytes leaves alone in transformers 5.
        other: norms, biases, routers and whatever stands beside the text model.
        embedding: the token embedding; a tied head that stands apart from it is counted there, not here.
        head: the output projection, 0 when it is the embedding itself.
    """

    linear: int
    linear_modules: int
    expert: int
    other: int
    embedding: int
    head: int

    @property
    def total(self) -> int:
        return self.linear + self.expert + self.other + self.embedding + self.head


def attention_linears(facts: ModelFacts) -> tuple[Linear, ...]:
    """The projections of one attention block."""
    hidden, query, kv = facts.hidden_size, facts.query_size, facts.kv_size
    output = Linear("o_proj", query, hidden, facts.o_bias)
    if facts.fused_projections:
        return (Linear("qkv_proj", hidden, query + 2 * kv, facts.qkv_bias), output)
    return (
        Linear("q_proj", hidden, query, facts.qkv_bias),
        Linear("k_proj", hidden, kv, facts.qkv_bias),
        Linear("v_proj", hidden, kv, facts.qkv_bias),
        output,
    )


def mlp_linears(facts: ModelFacts, layer: int) -> tuple[Linear, ...]:
    """The linears of one feed-forward block; of a mixture, those of the shared expert only."""
    hidden = facts.hidden_size
    inner = facts.shared_expert_intermediate_size if facts.is_mixture(layer) else facts.intermediate_size
    if not inner:
        return ()
    down = Linear("down_proj", inner, hidden, facts.mlp_bias)
    shared_gate = (Linear("shared_expert_gate", hidden, 1),) if facts.is_mixture(layer) else ()
    if facts.fused_projections:
        return (Linear("gate_up_proj", hidden, 2 * inner, facts.mlp_bias), down, *shared_gate)
    gate = Linear("gate_proj", hidden, inner, facts.mlp_bias)
    return (gate, Linear("up_proj", hidden, inner, facts.mlp_bias), down, *shared_gate)


@lru_cache(maxsize=4096)
def layer_linears(facts: ModelFacts, layer: int) -> tuple[Linear, ...]:
    """All nn.Linear modules of one layer."""
    return attention_linears(facts) + mlp_linears(facts, layer)


def expert_parameters(facts: ModelFacts, layer: int) -> int:
    """Weights of the experts of one layer: gate, up and down, kept as two stacked tensors by transformers 5."""
    if not facts.is_mixture(layer):
        return 0
    return 3 * facts.num_experts * facts.hidden_size * facts.moe_intermediate_size


@lru_cache(maxsize=4096)
def layer_other_parameters(facts: ModelFacts, layer: int) -> int:
    """Norms, biases and the router of one layer."""
    norms = facts.norms_per_layer * facts.hidden_size + (2 * facts.head_dim if facts.qk_norm else 0)
    biases = sum(linear.bias_parameters for linear in layer_linears(facts, layer))
    router = facts.num_experts * facts.hidden_size if facts.is_mixture(layer) else 0
    return norms + biases + router


@lru_cache(maxsize=8192)
def part_parameters(facts: ModelFacts, part: Part) -> PartParameters:
    """Count the parameters of a part: its layers, and the embedding, final norm and head where it holds them.

    A tied head in a part without the embedding is a second copy of that weight, which this counts as the head.
    """
    layers = range(part.first_layer, part.last_layer + 1)
    linears = [linear for layer in layers for linear in layer_linears(facts, layer)]
    table = facts.vocab_size * facts.hidden_size
    return PartParameters(
        linear=sum(linear.weight_parameters for linear in linears),
        linear_modules=len(linears),
        expert=sum(expert_parameters(facts, layer) for layer in layers),
        other=sum(layer_other_parameters(facts, layer) for layer in layers)
        + (facts.hidden_size if part.head else 0)
        + (facts.extra_parameters if part.embedding else 0),
        embedding=table if part.embedding else 0,
        head=table if part.head and not (facts.tied_embeddings and part.embedding) else 0,
    )


def whole(facts: ModelFacts) -> Part:
    """The part that is the whole model."""
    return Part(first_layer=0, last_layer=facts.num_layers - 1, embedding=True, head=True)


def total_parameters(facts: ModelFacts) -> int:
    """Parameters of the whole model, a tied weight counted once."""
    return part_parameters(facts, whole(facts)).total


def adapted_linears(facts: ModelFacts, layer: int, targets: tuple[str, ...]) -> tuple[Linear, ...]:
    """The linears of a layer that LoRA adapts: those that exist under a targeted name, as peft matches them.

    Where peft takes gate, up and down for the experts' names, the same linears of dense layers stay as they are
    (`_convert_peft_config_moe`).
    """
    linears = layer_linears(facts, layer)
    if facts.model_type in EXPERT_TARGETS:
        linears = tuple(linear for linear in linears if linear.name not in MLP_TARGETS)
    return linears if ALL_LINEAR in targets else tuple(linear for linear in linears if linear.name in targets)


def adapted_experts(facts: ModelFacts, layer: int, targets: tuple[str, ...]) -> tuple[bool, bool]:
    """Whether peft adapts the stacked gates and ups of a layer's experts, and whether their stacked downs.

    peft's `_convert_peft_config_moe` maps the names that single experts had before transformers 5 to the stacked
    tensors, for some families.
    """
    names = EXPERT_TARGETS.get(facts.model_type) if facts.is_mixture(layer) else None
    if names is None:
        return False, False
    gate, up, down = (ALL_LINEAR in targets or name in targets for name in names)
    return gate and up, down


@lru_cache(maxsize=4096)
def adapter_shapes(facts: ModelFacts, layer: int, rank: int, targets: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """Rows and columns of every LoRA matrix of one layer.

    A linear from i to o features gets A of rank x i and B of o x rank (Hu et al. 2021). peft gives each expert its
    own pair, gate and up fused at twice the rank, and with `all-linear` adapts the router as well.
    """
    shapes = [
        shape
        for linear in adapted_linears(facts, layer, targets)
        for shape in ((rank, linear.inputs), (linear.outputs, rank))
    ]
    shapes += expert_adapter_shapes(facts, layer, rank, targets)
    if ALL_LINEAR in targets and any(adapted_experts(facts, layer, targets)):
        shapes += [(rank, facts.hidden_size), (facts.num_experts, rank)]
    return tuple(shapes)


def expert_adapter_shapes(facts: ModelFacts, layer: int, rank: int, targets: tuple[str, ...]) -> list[tuple[int, int]]:
    """Rows and columns of the LoRA matrices of one layer's stacked experts: gate and up together, then down."""
    experts, hidden, inner = facts.num_experts, facts.hidden_size, facts.moe_intermediate_size
    gates, downs = adapted_experts(facts, layer, targets)
    gate_and_up = [(2 * rank * experts, hidden), (2 * inner, 2 * rank * experts)] if gates else []
    return gate_and_up + ([(rank * experts, inner), (hidden, rank * experts)] if downs else [])


def adapter_parameters(facts: ModelFacts, part: Part, rank: int, targets: tuple[str, ...] = DEFAULT_TARGETS) -> int:
    """LoRA parameters of a part's layers."""
    layers = range(part.first_layer, part.last_layer + 1)
    return sum(rows * columns for layer in layers for rows, columns in adapter_shapes(facts, layer, rank, targets))
