"""Declared and probed devices."""

from __future__ import annotations

import subprocess
import sys

import pytest

from parallel_tune.gpus import GPUS, known_gpu
from parallel_tune.hardware import available_memory_bytes, parse_hardware, probe, probe_details
from parallel_tune.nvml import NvmlGpu, probe_gpus, read_nvml, visible_indices
from strategies.errors import ConfigError

MIB = 2**20
UUIDS = ["GPU-8851a751-8b21", "GPU-10b9176f-0298", "GPU-10c00000-0000"]


@pytest.mark.parametrize(
    ("text", "totals_mib"),
    [
        ("2xH100-80GB", [81_559, 81_559]),
        ("1xA100-40GB+1xRTX3090-24GB", [40_960, 24_576]),
        ("1xT4-16GB", [15_360]),
        ("1xRTX3060-12GB", [12_288]),
        ("1xH200-141GB", [143_771]),
        ("h100", [81_559]),
        ("2x rtx 4090 + l4-24gb", [24_564, 24_564, 23_034]),
        ("NVIDIA GeForce RTX 3090-24GB", [24_576]),
    ],
)
def test_declared_gpus(text: str, totals_mib: list[int]) -> None:
    hardware = parse_hardware(text)
    assert hardware.declared
    assert hardware.kind == "cuda"
    assert [d.capacity_bytes // MIB for d in hardware.devices] == totals_mib
    assert [d.index for d in hardware.devices] == list(range(len(totals_mib)))
    assert all(0.95 * d.capacity_bytes < d.free_bytes < d.capacity_bytes for d in hardware.devices)


@pytest.mark.parametrize(("text", "bf16"), [("T4", False), ("V100-16GB", False), ("RTX3060", True), ("H100", True)])
def test_bf16_by_compute_capability(text: str, bf16: bool) -> None:
    assert parse_hardware(text).devices[0].supports_bf16 is bf16


@pytest.mark.parametrize("count", [1, 2, 3])
def test_virtual_devices_share_the_memory(count: int) -> None:
    devices = parse_hardware(f"cpu:{count}").devices
    assert [d.kind for d in devices] == ["cpu"] * count
    assert devices[0].free_bytes * count <= available_memory_bytes() * 1.2
    assert devices[0].name == "CPU"
    assert not devices[0].supports_bf16


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("2xH100-81GB", "no GPU 'H100-81GB' is known", "H100-80GB"),
        ("RTX309", "no GPU 'RTX309' is known", "RTX3090-24GB"),
        ("A100", "'A100' comes in several sizes", "A100-40GB or A100-80GB"),
        ("", "'' is not understood", "2xH100-80GB"),
        ("2xH100-80GB+", "'' is not understood", "2xH100-80GB"),
        ("0xH100", "names 0 devices", "2xH100-80GB"),
        ("cpu:0", "'cpu:0' is not understood", "cpu:N"),
        ("cpu:two", "'cpu:two' is not understood", "cpu:N"),
        ("65xT4", "names 65 devices", "2xH100-80GB"),
    ],
)
def test_what_is_not_understood_is_said(text: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_hardware(text)
    assert message in refusal.value.message
    assert hint in refusal.value.hint


def test_names_of_the_table_are_unique_and_declarable() -> None:
    for gpu in GPUS:
        assert parse_hardware(gpu.name).devices[0].capacity_bytes == gpu.total_mib * MIB


@pytest.mark.parametrize(
    ("nvml_name", "total_mib", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 81_559, "H100-80GB"),
        ("NVIDIA H100 NVL", 95_830, "H100NVL-94GB"),
        ("NVIDIA A100-SXM4-40GB", 40_960, "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", 81_920, "A100-80GB"),
        ("NVIDIA A10G", 23_028, "A10G-24GB"),
        ("Tesla T4", 15_360, "T4-16GB"),
        ("Tesla V100-SXM2-32GB", 32_768, "V100-32GB"),
        ("NVIDIA GeForce RTX 3090 Ti", 24_564, "RTX3090Ti-24GB"),
        ("NVIDIA RTX 6000 Ada Generation", 49_140, "RTX6000Ada-48GB"),
        ("NVIDIA L40S", 46_068, "L40S-48GB"),
    ],
)
def test_probed_names_meet_the_table(nvml_name: str, total_mib: int, name: str) -> None:
    gpu = known_gpu(nvml_name, total_mib)
    assert gpu is not None
    assert gpu.name == name


def test_unknown_names_meet_nothing() -> None:
    assert known_gpu("NVIDIA Foo 9000", 1) is None


@pytest.mark.parametrize(
    ("visible", "indices"),
    [("0,1", [0, 1]), ("1", [1]), ("2, 0", [2, 0]), ("", []), ("-1", []), ("1,-1,0", [1]), ("NoDevFiles", []),
     ("GPU-8851", [0]), ("GPU-10b9176f-0298,0", [1, 0])],
)  # fmt: skip
def test_visible_devices(visible: str, indices: list[int]) -> None:
    assert visible_indices(visible, UUIDS) == indices


@pytest.mark.parametrize(
    ("visible", "message"),
    [("3", "'3' is no GPU"), ("0,0", "GPU 0 twice"), ("GPU-10", "'GPU-10' is 2 GPUs"), ("GPU-ff", "'GPU-ff' is no GPU"),
     ("MIG-1234", "MIG instance"), ("cuda:0", "'cuda:0' is no GPU")],
)  # fmt: skip
def test_visible_devices_that_are_not_there(visible: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        visible_indices(visible, UUIDS)


def gpus() -> list[NvmlGpu]:
    return [
        NvmlGpu(UUIDS[0], "NVIDIA GeForce RTX 3090", 24_576 * MIB, 24_000 * MIB, (8, 6)),
        NvmlGpu(UUIDS[1], "NVIDIA H100 80GB HBM3", 81_559 * MIB, 81_008 * MIB, (9, 0)),
        NvmlGpu(UUIDS[2], "NVIDIA Foo", 8_192 * MIB, 8_000 * MIB, (7, 5)),
    ]


def test_probed_devices_are_numbered_as_the_process_sees_them() -> None:
    found = probe_gpus({"CUDA_VISIBLE_DEVICES": "1,0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, gpus)
    assert [(d.index, d.name) for d in found.hardware.devices] == [
        (0, "NVIDIA H100 80GB HBM3"),
        (1, "NVIDIA GeForce RTX 3090"),
    ]
    assert found.uuids == (UUIDS[1], UUIDS[0])
    assert found.notes == ()
    assert not found.hardware.declared
    assert found.hardware.devices[0].free_bytes == 81_008 * MIB


def test_notes_about_order_and_hidden_gpus() -> None:
    assert "PCI_BUS_ID" in probe_gpus({}, gpus).notes[0]
    hidden = probe_gpus({"CUDA_VISIBLE_DEVICES": ""}, gpus)
    assert hidden.hardware.devices == ()
    assert "CUDA_VISIBLE_DEVICES='' hides all 3 GPUs." in hidden.notes


def test_an_unknown_card_gets_the_rate_of_its_generation() -> None:
    device = probe_gpus({"CUDA_VISIBLE_DEVICES": "2"}, gpus).hardware.devices[0]
    assert 1e13 < device.matmul_flops_per_second < 1e14
    assert not device.supports_bf16


def test_without_a_visible_gpu_there_is_one_virtual_device() -> None:
    found = probe_details({"CUDA_VISIBLE_DEVICES": ""})
    assert [d.kind for d in found.hardware.devices] == ["cpu"]
    assert any("cpu:1" in note for note in found.notes)


def test_probing_imports_no_torch() -> None:
    code = "import sys, parallel_tune.hardware as h; h.probe(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
def test_probe_agrees_with_cuda() -> None:
    import torch

    if not read_nvml() or not torch.cuda.is_available():
        pytest.skip("no GPU")
    devices = probe().devices
    assert len(devices) == torch.cuda.device_count()
    for device in devices:
        assert device.name == torch.cuda.get_device_name(device.index)
        free, total = torch.cuda.mem_get_info(device.index)
        assert free <= device.free_bytes <= device.capacity_bytes
        assert device.free_bytes >= 0.9 * total
        assert device.matmul_flops_per_second > 1e13
