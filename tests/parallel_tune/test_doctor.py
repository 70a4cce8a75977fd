"""`parallel-tune doctor`, on real processes: this machine as it is, and with one thing wrong at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from packaging.requirements import Requirement

from parallel_tune import doctor, doctor_machine, doctor_packages
from parallel_tune.doctor_check import Check
from parallel_tune.doctor_machine import Holder
from parallel_tune.hardware import parse_hardware
from strategies.contracts import Device

GIB = 2**30


def checks_of(ended: Any) -> dict[str, list[dict[str, str]]]:
    """The checks of a --json answer, by name."""
    found: dict[str, list[dict[str, str]]] = {}
    for check in json.loads(ended.out)["checks"]:
        found.setdefault(check["name"], []).append(check)
    return found


def problems_of(ended: Any) -> list[str]:
    return [check["said"] for check in json.loads(ended.out)["checks"] if check["state"] == "problem"]


def test_a_sound_machine_is_ready(tune: Any, tmp_path: Path) -> None:
    """Beside a folder of the name of one of our packages, which is told."""
    (tmp_path / "strategies").mkdir()
    (tmp_path / "strategies" / "__init__.py").write_text("raise SystemExit('imported')")
    secret = {"HF_TOKEN": "hf_secret", "HF_ENDPOINT": "https://me:password@mirror.example/x", "HF_HUB_OFFLINE": "1"}
    ended = tune.ended("doctor", "--json", base=False, env=secret, cwd=tmp_path)
    assert ended.code == 0, ended.err
    found = checks_of(ended)
    assert json.loads(ended.out)["ready"] is True
    assert "torch " in found["packages"][0]["said"] and "transformers " in found["packages"][0]["said"]
    assert found["processes"][0]["said"] == "2 processes on the loopback, by gloo: meet and sum"
    assert found["GPUs"][0]["said"].endswith("training on the CPU (cpu:1).")
    assert str(tmp_path / "outputs") in found["outputs"][0]["said"]
    said = found["Hub"][0]["said"]
    assert "offline (HF_HUB_OFFLINE set)" in said and "mirror.example" in said and "a token is set in HF_TOKEN" in said
    assert "secret" not in ended.out + ended.err and "password" not in ended.out + ended.err
    assert any(str(tmp_path) in check["said"] for check in found["strategies"])
    assert [path.name for path in tmp_path.iterdir()] == ["strategies"], "looking leaves nothing behind"


def test_what_is_wrong_is_named_with_what_to_do(tune: Any, tmp_path: Path) -> None:
    """Several at once: none hides another."""
    for name, version in (("peft", "0.1"), ("intruder", "1.0")):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (tmp_path / "intruder-1.0.dist-info" / "top_level.txt").write_text("strategies\n")
    env = {"PYTHONPATH": str(tmp_path), "GLOO_SOCKET_IFNAME": "absent0", "RANK": "1"}
    ended = tune.ended("doctor", "--json", "--output_dir=/dev/null/runs", base=False, env=env)
    assert ended.code == 2 and "Traceback" not in ended.err
    found, problems = checks_of(ended), " | ".join(problems_of(ended))
    assert "intruder brings a package named strategies too" in problems
    assert "/dev/null is no folder" in problems
    assert "by gloo, did not sum" in problems and "absent0" in problems
    assert "RANK" in problems
    assert any("peft 0.1 is outside" in check["said"] and check["state"] == "warning" for check in found["packages"])
    for check in json.loads(ended.out)["checks"]:
        assert check["hint"] or check["state"] not in ("problem", "warning")
    shown = tune.ended("doctor", "--output_dir=/dev/null/runs", base=False)
    assert shown.code == 2
    assert "problem  outputs" in shown.out and shown.out.endswith("1 problem to solve before a run.\n")


def test_a_package_that_shadows_ours_stops_the_doctor_too(tune: Any, tmp_path: Path) -> None:
    (tmp_path / "strategies").mkdir()
    (tmp_path / "strategies" / "__init__.py").write_text("raise SystemExit('imported')")
    ended = tune.ended("doctor", base=False, env={"PYTHONPATH": str(tmp_path)})
    assert ended.code == 2 and "shadows the one of parallel-tune" in ended.err


def test_processes_that_take_too_long_are_ended(environment: dict[str, str]) -> None:
    check = doctor_machine.meet("gloo", parse_hardware("cpu:2").devices, environment, timeout_seconds=0.2)
    assert check.state == "problem" and "no answer within" in check.said
    assert not [child for child in psutil.Process().children(True) if "doctor_worker" in " ".join(child.cmdline())]


def test_one_process_sums_by_itself(environment: dict[str, str]) -> None:
    check = doctor_machine.meet("gloo", parse_hardware("cpu:1").devices, environment)
    assert (check.state, check.said) == ("ok", "1 process on the loopback, by gloo: meet and sum")


def test_a_torch_that_does_not_load_is_told_from_processes_that_do_not_meet(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so is broken')")
    broken = environment | {"PYTHONPATH": str(tmp_path)}
    check = doctor_machine.meet("gloo", parse_hardware("cpu:2").devices, broken)
    assert check.state == "problem" and "libtorch.so is broken" in check.said and "import torch" in check.hint


def test_a_backend_without_its_device_is_a_problem(environment: dict[str, str]) -> None:
    """As torch says it on a GPU that it cannot use."""
    check = doctor_machine.meet("nccl", parse_hardware("cpu:1").devices, environment)
    assert check.state == "problem" and "by nccl, did not sum" in check.said and "code" not in check.said


def test_missing_packages() -> None:
    wanted = [Requirement("no-such-package>=1"), Requirement("click>=8")]
    present, missing = doctor_packages.required(wanted)
    assert present.said.startswith("click ") and "no-such" not in present.said
    assert (missing.state, missing.said) == ("problem", "no-such-package is not installed")
    states = [doctor_packages.optional(wanted[:1], gpus)[0].state for gpus in (True, False)]
    assert states == ["warning", "note"]
    assert doctor_packages.python(">=4").state == "problem"


def test_memory_that_others_hold_is_a_warning_with_their_names() -> None:
    cards = [Device(i, "T4", "cuda", 16 * GIB, free * GIB, False, 1e12) for i, free in enumerate((10, 16, 14))]
    first, third = doctor_machine.busy(cards, [Holder(0, 7, "python", 5 * GIB), Holder(0, 8, "Xorg", None)])
    assert first.said == "6.0 GiB of device 0 (T4) are taken: python (7) 5.0 GiB, Xorg (8)"
    assert "device 2" in third.said and "not seen from here" in third.said


def test_gpus_that_are_not_there_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    card = doctor_machine.nvml.NvmlGpu("GPU-1", "NVIDIA H200", 140 * GIB, 140 * GIB, (9, 0))
    monkeypatch.setattr("parallel_tune.nvml.read_nvml", lambda: [card])
    checks = doctor._safely("GPUs", lambda: doctor_machine.gpus({"CUDA_VISIBLE_DEVICES": "0,3"}))
    assert checks == [Check("GPUs", "problem", checks[0].said, checks[0].hint)]
    assert "'3' is no GPU of this machine" in checks[0].said


def test_caches_that_cannot_be_made_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """They were "not made yet", and a run could start."""
    for name in ("XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.setenv(name, f"/dev/null/{name}")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    own, models = doctor.caches()
    assert (own.state, models.state) == ("warning", "warning")
    assert "/dev/null cannot be written" in own.said and "XDG_CACHE_HOME" in own.hint
    assert "/dev/null/HF_HOME/hub cannot be made" in models.said and "HF_HOME" in models.hint


def test_sizes_follow_no_links(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "blob").write_bytes(b"x" * 1000)
    (tmp_path / "link").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert 1000 <= doctor.size_bytes(tmp_path) < 1000 + 2 * 256


def test_a_screen_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    checks = [Check("packages", "warning", "word " * 60, "do " * 40), Check("Hub", "note", "online")]
    lines = doctor.render(checks).splitlines()
    assert max(map(len, lines)) <= 70
    assert lines[-1] == "A run can start."
