"""A small estimator with the closed form of FACTS, and the devices and models that the tests plan with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from strategies.contracts import Arrangement, Device, Hardware, MemoryEstimate, Part, Workload

MIB = 2**20
CARDS = {"H100": (81_559, 6e14), "A100-40GB": (40_960, 2e14), "RTX3090": (24_576, 5e13), "T4": (15_360, 2e13)}


@dataclass(frozen=True)
class FakeEstimator:
    """LoRA rank 16 on all linear layers, plain cross-entropy; seconds from FLOP alone."""

    hidden: int
    intermediate: int
    kv: int
    vocabulary: int
    sequence_length: int = 2048
    bytes_per_weight: float = 2.0
    host: float = 0.2

    @property
    def layer_parameters(self) -> int:
        return 2 * self.hidden * (self.hidden + self.kv) + 3 * self.hidden * self.intermediate

    def memory(self, part: Part, arrangement: Arrangement, device: Device) -> MemoryEstimate:
        tokens = arrangement.micro_batch * self.sequence_length
        h, i, kv, n = self.hidden, self.intermediate, self.kv, part.num_layers
        adapters = n * 16 * (4 * h + 2 * (h + kv) + 3 * (h + i))
        if arrangement.gradient_checkpointing == "none":
            activations = tokens * n * (28.6 * h + 8.44 * i + 1.6 * kv)
        else:
            stored = 2 * h * n if arrangement.gradient_checkpointing == "full" else 0
            activations = tokens * (stored + 40.9 * h + 14.7 * i + 2.4 * kv)
        ends = (part.embedding + part.head) * self.vocabulary * h
        return MemoryEstimate(
            weights_bytes=int(n * self.layer_parameters * self.bytes_per_weight + 2 * ends),
            adapters_bytes=4 * adapters,
            gradients_bytes=4 * adapters,
            optimizer_bytes=8 * adapters,
            activations_bytes=int(activations * arrangement.lanes),
            cross_entropy_bytes=int(12 * self.vocabulary * tokens) if part.head else 0,
            buffers_bytes=4 * adapters if arrangement.processes > 1 else 0,
            context_bytes=600 * MIB if device.kind == "cuda" else 0,
            phase="backward",
        )

    def micro_batch_seconds(self, part: Part, arrangement: Arrangement, device: Device) -> float:
        tokens = arrangement.micro_batch * self.sequence_length
        passes = 4 if arrangement.gradient_checkpointing == "none" else 6
        weights = part.num_layers * self.layer_parameters + part.head * self.vocabulary * self.hidden
        return passes * tokens * weights / device.matmul_flops_per_second

    def host_seconds(self, part: Part, arrangement: Arrangement) -> float:
        return self.host * part.num_layers / 32 * (1 if arrangement.gradient_checkpointing == "none" else 1.5)


def cards(*names: str) -> Hardware:
    """Declared GPUs by name, all memory but 0.5 GiB free."""
    return Hardware(
        tuple(
            Device(i, name, "cuda", CARDS[name][0] * MIB, (CARDS[name][0] - 512) * MIB, True, CARDS[name][1])
            for i, name in enumerate(names)
        ),
        declared=True,
    )


def cpus(count: int, gib_each: int = 16) -> Hardware:
    """Virtual devices of one CPU."""
    size = gib_each * 2**30
    return Hardware(tuple(Device(i, "CPU", "cpu", size, size, True, 1e11) for i in range(count)), declared=True)


MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "1b": (16, {"hidden": 2048, "intermediate": 8192, "kv": 512, "vocabulary": 128_256}),
    "8b": (32, {"hidden": 4096, "intermediate": 14336, "kv": 1024, "vocabulary": 128_256}),
    "70b": (80, {"hidden": 8192, "intermediate": 28672, "kv": 1024, "vocabulary": 128_256}),
    "405b": (126, {"hidden": 16384, "intermediate": 53248, "kv": 1024, "vocabulary": 128_256}),
}


def model(size: str, four_bit: bool = False, **workload: Any) -> tuple[Workload, FakeEstimator]:
    """A Llama shape as workload and estimator."""
    layers, shape = MODELS[size]
    work = Workload(
        **{"model": size, "engine": "transformers", "num_layers": layers, "sequence_length": 2048} | workload
    )
    bytes_per_weight = 0.516 if four_bit else 2.0
    return work, FakeEstimator(**shape, sequence_length=work.sequence_length, bytes_per_weight=bytes_per_weight)


@pytest.fixture(scope="session", name="model")
def model_fixture() -> Callable[..., tuple[Workload, FakeEstimator]]:
    return model


@pytest.fixture(scope="session", name="cards")
def cards_fixture() -> Callable[..., Hardware]:
    return cards


@pytest.fixture(scope="session", name="cpus")
def cpus_fixture() -> Callable[..., Hardware]:
    return cpus
