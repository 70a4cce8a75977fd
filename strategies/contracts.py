"""Frozen value types that the application and the strategies exchange. Units are in the names."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from strategies.errors import ConfigError

Checkpointing = Literal["none", "full", "unsloth"]
"""Activation checkpointing: off, each layer recomputed, or recomputed with its input kept in host memory."""


@dataclass(frozen=True)
class Device:
    """One device that a strategy may use.

    Attributes:
        index: position among the visible devices (the CUDA ordinal, or the virtual device's number).
        kind: "cuda", or "cpu" for a virtual device of a machine without GPUs.
        capacity_bytes: all of its memory, as NVML reports it.
        free_bytes: what is free before the run.
        matmul_flops_per_second: sustained dense matrix rate, in half precision on a GPU.
        float32_flops_per_second: likewise in float32, where that is another.
    """

    index: int
    name: str
    kind: Literal["cuda", "cpu"]
    capacity_bytes: int
    free_bytes: int
    supports_bf16: bool = True
    matmul_flops_per_second: float = 1e11
    float32_flops_per_second: float | None = None


@dataclass(frozen=True)
class Hardware:
    """The devices of one machine; `declared` when the user named them instead of them being probed."""

    devices: tuple[Device, ...]
    declared: bool = False

    @property
    def kind(self) -> Literal["cuda", "cpu"]:
        return self.devices[0].kind


@dataclass(frozen=True)
class ModuleNames:
    """Where a causal language model keeps its parts, as dotted module names.

    Attributes:
        embedding: modules that run before the first layer (token embedding, rotary embedding).
        layers: the list of decoder layers, e.g. "model.layers".
        tail: modules that run after the last layer (final norm), without the head.
        head: the output projection, e.g. "lm_head".
    """

    embedding: tuple[str, ...] = ("model.embed_tokens", "model.rotary_emb")
    layers: str = "model.layers"
    tail: tuple[str, ...] = ("model.norm",)
    head: str = "lm_head"


@dataclass(frozen=True)
class Workload:
    """What is to be trained, as far as a strategy needs to know; None means that the plan may choose.

    Attributes:
        sequence_length: tokens of a full row.
        global_batch: samples per optimizer step over all devices.
        micro_batch: rows that one device forwards at once.
        tied_embeddings: whether the head shares the embedding's weight.
        pipeline: whether a split may keep several micro-batches in flight.
        force_lanes: it shall, on virtual devices too.
        capture: whether steps may be captured as CUDA graphs.
        force_capture: whether they must be, though an eager plan may be faster.
        lanes: how many then; as many as stages if None.
        stages: parts of a split; more than devices share them.
    """

    model: str
    engine: Literal["unsloth", "transformers"]
    num_layers: int
    sequence_length: int
    modules: ModuleNames = field(default_factory=ModuleNames)
    global_batch: int | None = None
    micro_batch: int | None = None
    gradient_accumulation_steps: int | None = None
    gradient_checkpointing: Checkpointing | None = None
    tied_embeddings: bool = False
    pipeline: bool = True
    force_lanes: bool = False
    capture: bool = False
    force_capture: bool = False
    lanes: int | None = None
    stages: int | None = None
    max_devices: int | None = None


@dataclass(frozen=True)
class Part:
    """Consecutive layers of the model that one device holds: `first_layer` to `last_layer`, both included."""

    first_layer: int
    last_layer: int
    embedding: bool
    head: bool

    @property
    def num_layers(self) -> int:
        return self.last_layer - self.first_layer + 1


@dataclass(frozen=True)
class Arrangement:
    """How the global batch of one optimizer step is worked off.

    Attributes:
        processes: replicas, one process each.
        micro_batch: rows of one forward pass.
        gradient_accumulation_steps: forward passes of one process per optimizer step.
        lanes: micro-batches in flight at once in one process (1: none overlaps).
        stages: devices over which one replica is split.
        captured: forward and backward of a micro-batch are replayed as CUDA graphs, one or a few for each device.
    """

    processes: int
    micro_batch: int
    gradient_accumulation_steps: int
    gradient_checkpointing: Checkpointing
    lanes: int = 1
    stages: int = 1
    captured: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """Predicted bytes on one device at the moment of its peak; the parts add up to the peak.

    Attributes:
        phase: which phase holds the peak ("cross_entropy", "backward" or "optimizer").
        buffers_bytes: gradient buckets and other live tensors of the strategy.
        context_bytes: CUDA context, NCCL and library workspaces, outside the tensor allocator.
        reserve_bytes: what the allocator holds beyond live tensors.
        caution_bytes: what past runs used beyond the prediction; no part of the peak, but room that a plan must leave.
    """

    weights_bytes: int
    adapters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    cross_entropy_bytes: int
    buffers_bytes: int = 0
    context_bytes: int = 0
    reserve_bytes: int = 0
    phase: str = ""
    caution_bytes: int = 0

    @property
    def allocated_bytes(self) -> int:
        """Live tensors at the peak."""
        return (
            self.weights_bytes
            + self.adapters_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.cross_entropy_bytes
            + self.buffers_bytes
        )

    @property
    def peak_bytes(self) -> int:
        """What the device shows in use at the peak."""
        return self.allocated_bytes + self.context_bytes + self.reserve_bytes

    @property
    def needed_bytes(self) -> int:
        """What must be usable for this to fit."""
        return self.peak_bytes + self.caution_bytes


@dataclass(frozen=True)
class Verdict:
    """Whether a strategy fits, and why or why not, with numbers."""

    fits: bool
    reason: str


@dataclass(frozen=True)
class DevicePlan:
    """One device of a plan. `layers` is [first, last]; `memory` says what fills it at the peak.

    Attributes:
        corrected_peak_bytes: the predicted peak and what past runs here used beyond theirs; None without such runs.
        past_runs: how many they are.
        traced_allocated_bytes, closed_form_allocated_bytes: live tensors of the same step by either count, where a
            trace was asked for; without the libraries' workspaces.
    """

    index: int
    name: str
    kind: Literal["cuda", "cpu"]
    capacity_bytes: int
    free_bytes: int
    predicted_allocated_bytes: int
    predicted_peak_bytes: int
    layers: tuple[int, int]
    memory: MemoryEstimate
    corrected_peak_bytes: int | None = None
    past_runs: int = 0
    traced_allocated_bytes: int | None = None
    closed_form_allocated_bytes: int | None = None


@dataclass(frozen=True)
class Rejection:
    """A strategy that was not taken, and why."""

    strategy: str
    reason: str


@dataclass(frozen=True)
class Suggestion:
    """A single change that would make the run fit, verified by planning it."""

    change: str
    strategy: str
    predicted_peak_bytes: int


@dataclass(frozen=True)
class Plan:
    """A decided run. Workers obey it and never decide again.

    Attributes:
        device_map: module name -> device index; {"": "local_rank"} when each process holds a replica.
        lanes: micro-batches in flight at once (1: the naive schedule).
        dtype: the compute dtype, "bfloat16", "float16" or "float32".
        reduce_dtype: in which processes sum their gradients, "float32" (gradients' own) or "bfloat16".
        padding_free: rows of a micro-batch are joined, and attention keeps to each of them.
        captured: forward and backward are recorded once for each size of micro-batch, and replayed.
        uncaptured_reason: why not; empty where they are, or where the strategy has no use for it.
        compiled: what is recorded is of layers that torch.compile has compiled.
        rows_known: memory and speed are those of the run's own rows; else all rows count as full.
        padded_reason: why rows are padded though nobody asked for it; else empty.
        left_out: those of the reasons that are about devices which the run does not use.
        launch: the command that starts the training processes.
        estimate: what counted the memory, "closed_form" or "trace".
        constants: what was measured on this machine, by the devices' names; others have the built-in constants.
        basis: for people, what the figures rest on.
    """

    strategy: str
    fits: bool
    engine: Literal["unsloth", "transformers"]
    processes: int
    devices: tuple[DevicePlan, ...]
    device_map: Mapping[str, int | str]
    micro_batch: int
    gradient_accumulation_steps: int
    global_batch: int
    gradient_checkpointing: Checkpointing
    predicted_tokens_per_second: float
    lanes: int = 1
    dtype: str = "bfloat16"
    reduce_dtype: str = "float32"
    padding_free: bool = False
    padded_reason: str = ""
    captured: bool = False
    uncaptured_reason: str = ""
    compiled: bool = False
    rows_known: bool = False
    reasons: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    suggestions: tuple[Suggestion, ...] = ()
    launch: tuple[str, ...] = ()
    estimate: str = "closed_form"
    constants: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    basis: tuple[str, ...] = ()

    @property
    def visible(self) -> tuple[int, ...]:
        """Indices of the devices that the run's processes see, in the plan's order, each once."""
        return tuple(dict.fromkeys(device.index for device in self.devices))

    @property
    def ordinals(self) -> tuple[int, ...]:
        """Each planned device's position among the visible ones; several stages may share a device."""
        return tuple(self.visible.index(device.index) for device in self.devices)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: the text is not a plan.
        """
        try:
            raw = json.loads(text)
            devices = tuple(
                DevicePlan(**{**d, "layers": tuple(d["layers"]), "memory": MemoryEstimate(**d["memory"])})
                for d in raw.pop("devices")
            )
            return cls(
                devices=devices,
                reasons=tuple(raw.pop("reasons")),
                left_out=tuple(raw.pop("left_out", ())),
                rejected=tuple(Rejection(**r) for r in raw.pop("rejected")),
                suggestions=tuple(Suggestion(**s) for s in raw.pop("suggestions")),
                launch=tuple(raw.pop("launch")),
                basis=tuple(raw.pop("basis", ())),
                **raw,
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"not a plan: {type(error).__name__}: {error}",
                "Give the plan.json of a run directory made by this version of parallel-tune.",
            ) from error
