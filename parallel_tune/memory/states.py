"""Bytes that live through a whole run: weights, adapters, gradients, optimizer states."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.parameters import (
    PartParameters,
    adapted_linears,
    adapter_shapes,
    layer_linears,
    part_parameters,
)
from parallel_tune.memory.settings import TrainingSettings
from strategies.contracts import Part
from strategies.errors import ConfigError

NF4_BLOCK = 64
"""Weights that share one scale in bitsandbytes' 4-bit form."""
NF4_SCALE_BLOCK = 256
"""Scales that share one float32 scale of their own (double quantisation)."""
NF4_TABLE_BYTES = 16 * 4 + 256 * 4 + 4
"""Per matrix: the 16 nf4 values, the 256 values of the 8-bit scales, and their offset, all float32."""
BNB_8BIT_BLOCK = 256
"""Optimizer states that share one float32 scale in bitsandbytes' 8-bit form."""
BNB_8BIT_SMALLEST = 4096
"""Tensors with fewer elements keep float32 states (bitsandbytes min_8bit_size)."""


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer keeps and needs for each trainable element.

    Attributes:
        states: moments per element.
        eight_bit: the moments are bitsandbytes' 8-bit blocks.
        paged: the moments live in unified memory, which the driver can move to the host.
        foreach_temporaries: whole-model temporaries in the weights' dtype at the step.
    """

    states: int
    eight_bit: bool = False
    paged: bool = False
    foreach_temporaries: int = 0


OPTIMIZERS = {
    "adamw_torch": Optimizer(2, foreach_temporaries=1),
    "adamw_torch_fused": Optimizer(2),
    "adamw_8bit": Optimizer(2, eight_bit=True),
    "adamw_bnb_8bit": Optimizer(2, eight_bit=True),
    "paged_adamw_8bit": Optimizer(2, eight_bit=True, paged=True),
    "paged_adamw_32bit": Optimizer(2, paged=True),
    "lion_8bit": Optimizer(1, eight_bit=True),
    "lion_32bit": Optimizer(1),
    "sgd": Optimizer(0),
}
"""By transformers' names. adamw_torch keeps one extra list on CUDA: `_multi_tensor_adamw` takes the square roots of all
second moments at once (torch.optim.adamw); the fused kernel takes none."""


def optimizer_named(name: str) -> Optimizer:
    """The optimizer that transformers knows under this name.

    Raises:
        ConfigError: its memory is not known.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"the memory of optimizer {name!r} is not known", f"Choose one of {', '.join(OPTIMIZERS)}.")
    return OPTIMIZERS[name]


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one part on one device that activations do not touch.

    Attributes:
        optimizer_temporaries_bytes: what the optimizer step holds on top, for its duration.
    """

    weights_bytes: int
    adapters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    optimizer_temporaries_bytes: int


def nf4_bytes(parameters: int, modules: int) -> int:
    """Bytes of linears in nf4 with double quantisation (Dettmers et al. 2023): half a byte per weight, a byte per
    block of 64, a float32 per 256 such blocks, and each matrix's tables."""
    scales = math.ceil(parameters / NF4_BLOCK)
    return parameters // 2 + scales + 4 * math.ceil(scales / NF4_SCALE_BLOCK) + modules * NF4_TABLE_BYTES


def weight_bytes(counts: PartParameters, settings: TrainingSettings) -> int:
    """Bytes of the base weights."""
    if not settings.load_in_4bit:
        return counts.total * settings.weight_bytes
    rest = counts.total - counts.linear
    return nf4_bytes(counts.linear, counts.linear_modules) + rest * settings.weight_bytes


def trainable_sizes(facts: ModelFacts, settings: TrainingSettings, part: Part) -> tuple[int, int]:
    """Trainable elements of a part: all, and those whose states an 8-bit optimizer keeps in float32.

    The latter are tensors too small for 8-bit states, and the embedding's weight, a tied head's with it: Trainer asks
    bitsandbytes for 32 bits of every nn.Embedding (transformers' `create_optimizer`, and Unsloth's own).
    """
    total = float32_states = 0
    for layer, count in _kinds(facts, part):
        sizes = _adapter_sizes(facts, settings, layer) if settings.method == "lora" else _vector_sizes(facts, layer)
        total += count * sum(sizes)
        float32_states += count * sum(size for size in sizes if size < BNB_8BIT_SMALLEST)
    if settings.method == "lora":
        return total, float32_states
    # Text alone gives a vision tower no gradient, and then no optimizer state.
    outside = facts.extra_parameters if part.embedding else 0
    counts = part_parameters(facts, part)
    if part.head and facts.hidden_size < BNB_8BIT_SMALLEST:
        float32_states += facts.hidden_size  # the norm before the head
    return counts.total - outside - lent_parameters(facts, part), float32_states + counts.embedding


def lent_parameters(facts: ModelFacts, part: Part) -> int:
    """Of a tied head apart from its embedding: a copy, whose gradient goes back and which no optimizer knows."""
    lent = facts.tied_embeddings and part.head and not part.embedding
    return facts.vocab_size * facts.hidden_size if lent else 0


def _kinds(facts: ModelFacts, part: Part) -> list[tuple[int, int]]:
    """A layer for each kind that a part has, and how many there are: mixtures and dense ones."""
    layers = range(part.first_layer, part.last_layer + 1)
    kinds = [[layer for layer in layers if facts.is_mixture(layer) is mixture] for mixture in (False, True)]
    return [(alike[0], len(alike)) for alike in kinds if alike]


def _adapter_sizes(facts: ModelFacts, settings: TrainingSettings, layer: int) -> list[int]:
    """Elements of each tensor that LoRA trains in a layer."""
    adapted = adapted_linears(facts, layer, settings.lora_targets)
    sizes = [r * c for r, c in adapter_shapes(facts, layer, settings.lora_rank, settings.lora_targets)]
    if settings.use_dora:
        sizes += [linear.outputs for linear in adapted]
    biased = {"none": (), "lora_only": adapted, "all": layer_linears(facts, layer)}[settings.bias]
    return sizes + [linear.bias_parameters for linear in biased]


def _vector_sizes(facts: ModelFacts, layer: int) -> list[int]:
    """Elements of each vector of a layer; its matrices are never small."""
    vectors = [facts.hidden_size] * facts.norms_per_layer + ([facts.head_dim] * 2 if facts.qk_norm else [])
    return vectors + [linear.bias_parameters for linear in layer_linears(facts, layer)]


def optimizer_state_bytes(optimizer: Optimizer, trainable: int, float32_states: int, element_bytes: int) -> int:
    """Moments of so many trainable elements, of which an 8-bit optimizer keeps `float32_states` in float32."""
    if not optimizer.eight_bit:
        return optimizer.states * trainable * element_bytes
    blocks = trainable - float32_states
    return optimizer.states * (blocks + 4 * math.ceil(blocks / BNB_8BIT_BLOCK) + 4 * float32_states)


@lru_cache(maxsize=8192)
def state_bytes(facts: ModelFacts, settings: TrainingSettings, part: Part) -> StateBytes:
    """Weights, adapters, gradients and optimizer states of a part; torch keeps moments in the parameter's dtype."""
    optimizer = optimizer_named(settings.optimizer)
    trainable, float32_states = trainable_sizes(facts, settings, part)
    element = settings.adapter_bytes if settings.method == "lora" else settings.weight_bytes
    states = optimizer_state_bytes(optimizer, trainable, float32_states, element)
    return StateBytes(
        weights_bytes=weight_bytes(part_parameters(facts, part), settings),
        adapters_bytes=trainable * element if settings.method == "lora" else 0,
        gradients_bytes=trainable * element,
        optimizer_bytes=0 if optimizer.paged else states,
        optimizer_temporaries_bytes=optimizer.foreach_temporaries * trainable * element,
    )


@dataclass(frozen=True)
class TableBytes:
    """Gradients of the embedding and the head, where they are trained.

    Attributes:
        head_gradient_bytes: also of a tied head elsewhere, where it comes back to the embedding.
        shared: both are one weight, which lives on this device.
        lent: the head is a copy of the embedding's weight, made for each pass, by lanes for each step; its gradient
            leaves with the pass.
    """

    head_gradient_bytes: int
    embedding_gradient_bytes: int
    shared: bool
    lent: bool

    @property
    def gradient_bytes(self) -> int:
        """What they leave behind."""
        kept = 0 if self.shared or self.lent else self.head_gradient_bytes
        return kept + self.embedding_gradient_bytes

    @property
    def passing_bytes(self) -> int:
        """What lies beside gradients that exist already while the layers are played backwards."""
        return self.head_gradient_bytes if self.shared or self.lent else 0


def table_bytes(facts: ModelFacts, settings: TrainingSettings, part: Part) -> TableBytes:
    """Gradients of a part's embedding and head."""
    table = facts.vocab_size * facts.hidden_size * settings.weight_bytes if settings.method == "full" else 0
    shared = facts.tied_embeddings and part.embedding
    return TableBytes(
        head_gradient_bytes=table if part.head or shared else 0,
        embedding_gradient_bytes=table if part.embedding else 0,
        shared=shared,
        lent=lent_parameters(facts, part) > 0,
    )
