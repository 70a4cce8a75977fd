"""What of a training run its memory depends on, beside the model and the devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from parallel_tune.memory.parameters import DEFAULT_TARGETS
from strategies.errors import ConfigError

MIB = 1 << 20
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class TrainingSettings:
    """How a model is trained, as far as memory and time depend on it.

    Attributes:
        method: every weight, or LoRA adapters beside frozen ones.
        load_in_4bit: the frozen linears are held as nf4 with double quantisation.
        lora_targets: names of the adapted linears; ("all-linear",) for all but the head.
        use_dora: each adapted linear has a trained magnitude per output beside its two matrices.
        bias: which biases train beside adapters, in peft's words.
        compute_dtype: dtype of the forward pass, and of weights that are not quantised.
        weights_dtype: dtype of the weights when it is not the compute dtype (float32 master weights).
        optimizer: transformers' name of the optimizer.
        cross_entropy: "plain" makes all logits at once; "fused" never holds more than a chunk of them; "returned" makes
            them all, works in place and returns them.
        sequence_length: tokens of a full row.
        packed: rows are joined without padding into one.
        attention_mask: whether attention gets an explicit mask, a square of the tokens; None for what the batches need:
            rows that are joined, or padded to the longest of several, do, unless the engine has kernels that do not.
        eager_attention: attention scores are made as a matrix of each head (`--attn_implementation eager`).
        lora_dtype: dtype of the adapters.
        repeats_heads: attention without a mask keeps grouped keys and values once for each head.
        spare_tokens: by which Unsloth's attention fills up the rows of a micro-batch; None for rows of full length.
        segments_grow: torch's allocator is set up so (allocator.py), and holds little beyond live tensors.
    """

    method: Literal["full", "lora"] = "lora"
    load_in_4bit: bool = False
    lora_rank: int = 16
    lora_targets: tuple[str, ...] = DEFAULT_TARGETS
    lora_dropout: float = 0.0
    use_dora: bool = False
    bias: str = "none"
    compute_dtype: str = "bfloat16"
    weights_dtype: str | None = None
    optimizer: str = "adamw_torch_fused"
    cross_entropy: Literal["plain", "fused", "returned"] = "plain"
    engine: Literal["unsloth", "transformers"] = "transformers"
    sequence_length: int = 2048
    packed: bool = False
    attention_mask: bool | None = None
    eager_attention: bool = False
    lora_dtype: str = "float32"
    repeats_heads: bool = False
    spare_tokens: int | None = None
    segments_grow: bool = True

    def __post_init__(self) -> None:
        for name in ("compute_dtype", "weights_dtype", "lora_dtype"):
            value = getattr(self, name)
            if value is not None and value not in DTYPE_BYTES:
                raise ConfigError(f"{name} is {value!r}", f"Choose one of {', '.join(DTYPE_BYTES)}.")
        if self.load_in_4bit and self.method == "full":
            raise ConfigError(
                "load_in_4bit is set for a full fine-tuning", "4-bit weights cannot be trained: use LoRA beside them."
            )
        if self.method == "lora" and self.lora_rank < 1:
            raise ConfigError(f"lora_rank is {self.lora_rank}", "Give a rank of at least 1, or train in full.")
        if self.sequence_length < 1:
            raise ConfigError(f"sequence_length is {self.sequence_length}", "Give at least one token.")

    @property
    def compute_bytes(self) -> int:
        """Bytes of one element of the forward pass."""
        return DTYPE_BYTES[self.compute_dtype]

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight that is not quantised."""
        return DTYPE_BYTES[self.weights_dtype or self.compute_dtype]

    @property
    def adapter_bytes(self) -> int:
        """Bytes of one adapter weight."""
        return DTYPE_BYTES[self.lora_dtype]

    def masked(self, micro_batch: int) -> bool:
        """Whether attention over a micro-batch of this many rows gets an explicit mask."""
        if self.attention_mask is not None:
            return self.attention_mask
        return self.eager_attention or (self.engine == "transformers" and (self.packed or micro_batch > 1))

    def mask_width(self, micro_batch: int) -> int:
        """Tokens that a token's row of the mask has: those of its own row, or of all rows where they are joined."""
        return self.sequence_length * (micro_batch if self.packed else 1)

    @property
    def autocast(self) -> bool:
        """Whether the Trainer runs the forward pass under autocast: it does whenever it computes in 16 bits."""
        return self.compute_bytes == 2


@dataclass(frozen=True)
class MachineConstants:
    """Bytes that the tensor allocator does not see; to be measured per GPU model and software stack.

    Attributes:
        context_bytes: what a process holds on the device before its first tensor.
        nccl_bytes: what a process group adds after its first all-reduce.
        reserve_fraction: what the caching allocator holds beyond live tensors at the peak, as a share of them.
        loss_reserve_logits: the same after a loss that makes all logits at once, where segments do not grow: so many
            times the logits.
        checkpointed_loss_reserve_bytes: likewise where checkpoints are recomputed between two losses: small tensors
            then split the freed logits' blocks, and the next loss needs new ones. Never more than half of the loss.
        nf4_scratch_bytes: what bitsandbytes holds beside the tensors that the formulas count.
        workspace_bytes: cuBLAS workspaces, which the tensor allocator does see.
        segment_bytes: what the allocator takes at least beyond live tensors, since it takes memory in whole segments.
        heap_share: what the C allocator holds beyond live tensors on a CPU, as a share of the activations and the loss.
    """

    context_bytes: int
    nccl_bytes: int
    reserve_fraction: float
    nf4_scratch_bytes: int = 0
    workspace_bytes: int = 0
    loss_reserve_logits: float = 0.0
    checkpointed_loss_reserve_bytes: int = 0
    segment_bytes: int = 0
    heap_share: float = 0.0


CUDA_DEFAULTS = MachineConstants(
    context_bytes=768 * MIB,
    nccl_bytes=848 * MIB,
    reserve_fraction=0.02,
    workspace_bytes=64 * MIB,
    loss_reserve_logits=1.25,
    checkpointed_loss_reserve_bytes=1792 * MIB,
)
"""Unmeasured cards get an H200's (torch 2.11, driver 580). Workspaces: 32 MiB each for the threads of forward and
backward. Context: 767 MiB in all of 17 runs. Reserve: chosen by the 21 runs of tests/test_memory_measured.py, so they
are no test of it: 0.1-2% behind a fused loss, 1.1-1.6 times the logits behind a plain one, 1.4-2.2 GiB where layers
are recomputed as well, whatever their size. NCCL: what it took between two H200s over NVLink (NCCL 2.28)."""

CPU_DEFAULTS = MachineConstants(context_bytes=590 * MIB, nccl_bytes=0, reserve_fraction=0.0, heap_share=1.0)
"""Context: what a worker holds that has imported torch 2.13, transformers 5.17, peft, trl and bitsandbytes (x86-64
Linux). Heap: chosen by seven runs of SmolLM2-135M in float32 with glibc (LoRA, nf4, full; one and two processes;
recomputed and not), 0.3 to 1.4 times the activations and the loss. Four other runs were then predicted 21% too low to
20% too high; without it 14 to 37% too low. Fixing the size from which glibc gives memory back keeps a process closer to
its live tensors, and made runs a fifth slower."""
