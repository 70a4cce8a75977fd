"""What NVIDIA's GPUs are: the figures that stand for a card that is declared rather than probed.

Memory is what NVML reports (nvidia-smi's total), not what the box says; the driver keeps a part of it that CUDA never
sees. Totals are from nvidia-smi output of each card; the reserve is NVML's own figure for H200 (read on one), else from
the total that CUDA shows in out-of-memory messages, else 1.3 percent. Rates are dense matrix products in the training
dtype (bf16, or fp16 before Ampere) with float32 accumulation, from NVIDIA's datasheets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SUSTAINED_SHARE = 0.66
"""Share of the datasheet's matrix rate that large products sustain (H100: about 650 of 989 TFLOP/s)."""


def sustained(tflops: float) -> float:
    """FLOP/s that large products sustain where the datasheet says so many TFLOP/s."""
    return tflops * 1e12 * SUSTAINED_SHARE


@dataclass(frozen=True)
class Gpu:
    """One model of GPU.

    Attributes:
        name: what `--hardware` calls it, memory size included.
        total_mib: all of its memory, as NVML reports it.
        reserved_mib: what the driver keeps of that.
        compute_capability: major, minor.
        peak_tflops: dense matrix rate of the datasheet.
        float32_tflops: likewise of float32 itself, without TF32, which torch leaves off.
    """

    name: str
    total_mib: int
    reserved_mib: int
    compute_capability: tuple[int, int]
    peak_tflops: float
    float32_tflops: float

    @property
    def model(self) -> str:
        """The name without its memory size, e.g. "A100"."""
        return self.name.rsplit("-", 1)[0]

    @property
    def supports_bf16(self) -> bool:
        return self.compute_capability >= (8, 0)

    @property
    def matmul_flops_per_second(self) -> float:
        """Sustained, not peak."""
        return sustained(self.peak_tflops)

    @property
    def float32_flops_per_second(self) -> float:
        """Sustained, not peak."""
        return sustained(self.float32_tflops)


GPUS: tuple[Gpu, ...] = (
    Gpu("V100-16GB", 16_384, 224, (7, 0), 125, 15.7),
    Gpu("V100-32GB", 32_768, 275, (7, 0), 125, 15.7),
    Gpu("T4-16GB", 15_360, 451, (7, 5), 65, 8.1),
    Gpu("RTX2080Ti-11GB", 11_264, 250, (7, 5), 54, 13.4),
    Gpu("A100-40GB", 40_960, 600, (8, 0), 312, 19.5),
    Gpu("A100-80GB", 81_920, 770, (8, 0), 312, 19.5),
    Gpu("A30-24GB", 24_576, 450, (8, 0), 165, 10.3),
    Gpu("A10-24GB", 23_028, 450, (8, 6), 125, 31.2),
    Gpu("A10G-24GB", 23_028, 450, (8, 6), 70, 31.2),
    Gpu("A40-48GB", 46_068, 500, (8, 6), 150, 37.4),
    Gpu("RTXA4000-16GB", 16_376, 300, (8, 6), 77, 19.2),
    Gpu("RTXA5000-24GB", 24_564, 330, (8, 6), 111, 27.8),
    Gpu("RTXA6000-48GB", 49_140, 450, (8, 6), 155, 38.7),
    Gpu("RTX3060-12GB", 12_288, 240, (8, 6), 26, 12.7),
    Gpu("RTX3070-8GB", 8_192, 200, (8, 6), 41, 20.3),
    Gpu("RTX3080-10GB", 10_240, 230, (8, 6), 60, 29.8),
    Gpu("RTX3080-12GB", 12_288, 240, (8, 6), 61, 30.6),
    Gpu("RTX3080Ti-12GB", 12_288, 240, (8, 6), 68, 34.1),
    Gpu("RTX3090-24GB", 24_576, 325, (8, 6), 71, 35.6),
    Gpu("RTX3090Ti-24GB", 24_564, 325, (8, 6), 80, 40),
    Gpu("L4-24GB", 23_034, 470, (8, 9), 121, 30.3),
    Gpu("L40-48GB", 46_068, 510, (8, 9), 181, 90.5),
    Gpu("L40S-48GB", 46_068, 510, (8, 9), 362, 91.6),
    Gpu("RTX6000Ada-48GB", 49_140, 620, (8, 9), 364, 91.1),
    Gpu("RTX4060Ti-16GB", 16_380, 320, (8, 9), 44, 22.1),
    Gpu("RTX4070-12GB", 12_282, 310, (8, 9), 58, 29.1),
    Gpu("RTX4080-16GB", 16_376, 360, (8, 9), 97, 48.7),
    Gpu("RTX4090-24GB", 24_564, 480, (8, 9), 165, 82.6),
    Gpu("H100-80GB", 81_559, 551, (9, 0), 989, 67),
    Gpu("H100NVL-94GB", 95_830, 620, (9, 0), 835, 60),
    Gpu("H200-141GB", 143_771, 616, (9, 0), 989, 67),
    Gpu("B200-180GB", 183_359, 800, (10, 0), 2_250, 75),
    Gpu("RTX5080-16GB", 16_303, 430, (12, 0), 113, 56.3),
    Gpu("RTX5090-32GB", 32_607, 490, (12, 0), 210, 104.8),
    Gpu("RTXPRO6000-96GB", 97_887, 640, (12, 0), 504, 126),
)

FALLBACK_PEAK_TFLOPS = {7: 60.0, 8: 100.0, 9: 989.0, 10: 2_250.0, 12: 200.0}
"""Peak rate by major compute capability, for a probed card that the table does not know."""

FALLBACK_FLOAT32_TFLOPS = {7: 8.0, 8: 20.0, 9: 67.0, 10: 75.0, 12: 60.0}
"""Likewise of float32."""


def plain(name: str) -> str:
    """A card's name without vendor, family and punctuation, for comparison: "NVIDIA GeForce RTX 3090" -> "rtx3090"."""
    return re.sub(r"nvidia|geforce|tesla|quadro|[^a-z0-9]", "", name.lower())


def known_gpu(nvml_name: str, total_mib: int) -> Gpu | None:
    """The table's row for a card that NVML names, or None."""
    name = plain(nvml_name)
    rows = [gpu for gpu in GPUS if name.startswith(plain(gpu.model))]
    if not rows:
        return None
    longest = max(len(gpu.model) for gpu in rows)
    return min((gpu for gpu in rows if len(gpu.model) == longest), key=lambda gpu: abs(gpu.total_mib - total_mib))
