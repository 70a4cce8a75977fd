"""Constants are measured once by a process of its own, kept, and said; nothing that lies in the cache can hurt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from parallel_tune import machine
from parallel_tune.cli import program
from parallel_tune.memory import constants
from parallel_tune.memory.constants import Measured, NotMeasured, in_child, measure_once, path_of, read, write
from parallel_tune.memory.machine_key import MachineKey, machine_key, torch_versions
from parallel_tune.memory.settings import CUDA_DEFAULTS
from parallel_tune.nvml import Probe
from strategies.contracts import Device, Hardware, Plan
from strategies.errors import ConfigError, RunFailed

MIB = 1 << 20
KEY = MachineKey("NVIDIA H200", "580.65.06", "2.11.0+cu130", "13.0", "0.50.2")
FOUND = Measured(700 * MIB, 16 * MIB, 20 * MIB, 3 * MIB, 800 * MIB, 2)
UUIDS = ["GPU-aaaa", "GPU-bbbb"]
SAID = {
    "context_bytes": 700 * MIB, "workspace_bytes": 16 * MIB, "segment_bytes": 20 * MIB,
    "nf4_scratch_bytes": 3 * MIB, "nccl_bytes": 800 * MIB, "gpus": 2, "notes": [],
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "parallel-tune"


def child(folder: Path, body: str) -> tuple[str, ...]:
    """A measuring command that notes its start in `starts` and goes on with `body`."""
    script = folder / "measuring.py"
    start = f"import json, os, sys, time\nopen({str(folder / 'starts')!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
    script.write_text(start + f"SAID = {SAID!r}\n" + textwrap.dedent(body))
    return (sys.executable, str(script))


def starts(folder: Path) -> list[str]:
    path = folder / "starts"
    return path.read_text().splitlines() if path.exists() else []


def test_a_measurement_is_kept_and_read_again() -> None:
    assert read(KEY) is None
    write(KEY, FOUND)
    assert read(KEY) == FOUND
    taken = FOUND.constants
    assert (taken.context_bytes, taken.nccl_bytes, taken.nf4_scratch_bytes) == (700 * MIB, 800 * MIB, 3 * MIB)
    assert taken.reserve_fraction == CUDA_DEFAULTS.reserve_fraction
    alone = replace(FOUND, nccl_bytes=None, nf4_scratch_bytes=None).constants
    assert (alone.nccl_bytes, alone.nf4_scratch_bytes) == (CUDA_DEFAULTS.nccl_bytes, 0)


@pytest.mark.parametrize("field", ["gpu", "driver", "torch", "cuda", "bitsandbytes"])
def test_another_machine_or_stack_knows_nothing_of_it(field: str) -> None:
    write(KEY, FOUND)
    other = replace(KEY, **{field: "else"})
    assert read(other) is None
    # Even where two keys come to one file name.
    path_of(KEY).rename(path_of(other))
    assert read(other) is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"format": 1}', "[" * 100_000, "\x00\xff", "GARBAGE"],
)
def test_an_unreadable_file_is_measured_anew(text: str, tmp_path: Path) -> None:
    path_of(KEY).parent.mkdir(parents=True)
    path_of(KEY).write_bytes(text.encode("latin-1"))
    assert read(KEY) is None
    measured = measure_once(KEY, UUIDS, lambda uuids: in_child(uuids, child(tmp_path, "print(json.dumps(SAID))")))
    assert read(KEY) == measured == replace(FOUND, measured_at=measured.measured_at)


@pytest.mark.parametrize(
    ("name", "value"),
    [("context_bytes", 0), ("context_bytes", -1), ("context_bytes", 1.5), ("nccl_bytes", "many"), ("gpus", None),
     ("workspace_bytes", None), ("segment_bytes", True), ("context_bytes", 1 << 50), ("notes", 3), ("format", 2)],
)  # fmt: skip
def test_a_figure_that_cannot_be_is_measured_anew(name: str, value: object) -> None:
    write(KEY, FOUND)
    raw = json.loads(path_of(KEY).read_text())
    path_of(KEY).write_text(json.dumps({**raw, name: value}))
    assert read(KEY) is None


def test_the_child_sees_its_cards_and_no_others_and_is_told_of_4_bit(tmp_path: Path) -> None:
    body = """
        print("a library greets")
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-aaaa,GPU-bbbb"
        print(json.dumps(SAID))
    """
    for in_4bit in (False, True):
        assert in_child(UUIDS, child(tmp_path, body), in_4bit=in_4bit) == FOUND
    assert starts(tmp_path) == ["GPU-aaaa GPU-bbbb", "GPU-aaaa GPU-bbbb --in_4bit"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise SystemExit('another process is changing its use')", "code 1: another process is changing its use"),
        ("os.kill(os.getpid(), 9)", "code -9"),
        ("pass", "gave no constants"),
        ("print('no json')", "gave no constants"),
        ("print(json.dumps({**SAID, 'context_bytes': -5}))", "context_bytes is -5"),
        ("print('[]')", "gave no constants"),
    ],
)
def test_a_failed_measurement_says_why_and_leaves_nothing(body: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(NotMeasured, match=reason):
        measure_once(KEY, UUIDS, lambda uuids: in_child(uuids, child(tmp_path, body)))
    assert read(KEY) is None


def test_a_measurement_that_hangs_is_ended_with_its_own_children(tmp_path: Path) -> None:
    body = """
        import subprocess
        peer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open(os.path.join(os.path.dirname(__file__), "peer"), "w").write(str(peer.pid))
        time.sleep(600)
    """
    with pytest.raises(NotMeasured, match="more than 3 s"):
        in_child(UUIDS, child(tmp_path, body), timeout_seconds=3)
    peer = Path(f"/proc/{(tmp_path / 'peer').read_text()}/stat")
    deadline = time.monotonic() + 30
    while peer.exists() and peer.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline  # killed, it goes when the system gets round to it
        time.sleep(0.05)


RACER = """
import sys
import time
from parallel_tune.memory.constants import in_child, measure_once
from parallel_tune.memory.machine_key import MachineKey
key = MachineKey("NVIDIA H200", "580.65.06", "2.11.0+cu130", "13.0", "0.50.2")
print(measure_once(key, ["GPU-aaaa", "GPU-bbbb"], lambda uuids: in_child(uuids, sys.argv[1:])).context_bytes)
"""


def test_of_several_processes_one_measures(tmp_path: Path) -> None:
    command = child(tmp_path, "time.sleep(2); print(json.dumps(SAID))")
    argv = [sys.executable, "-c", RACER, *command]
    racers = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    answers = [racer.communicate(timeout=120)[0].strip() for racer in racers]
    assert answers == [str(700 * MIB)] * 6
    assert len(starts(tmp_path)) == 1


def test_a_racer_that_is_killed_leaves_the_others_their_turn(tmp_path: Path) -> None:
    slow = subprocess.Popen([sys.executable, "-c", RACER, *child(tmp_path, "time.sleep(600)")])
    while not starts(tmp_path):
        assert slow.poll() is None
    slow.kill()
    slow.wait()
    command = child(tmp_path, "print(json.dumps(SAID))")
    second = subprocess.run([sys.executable, "-c", RACER, *command], capture_output=True, text=True, timeout=120)
    assert second.stdout.strip() == str(700 * MIB)


def test_readers_never_see_half_a_file() -> None:
    write(KEY, FOUND)
    writer = (
        "from parallel_tune.memory.constants import *\nfrom parallel_tune.memory.machine_key import MachineKey\n"
        f"key, found = {KEY!r}, {FOUND!r}\n"
        "for _ in range(150): write(key, found)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", writer]) for _ in range(2)]
    reads = 0
    while any(writer.poll() is None for writer in writers):
        assert read(KEY) == FOUND
        reads += 1
    assert [writer.returncode for writer in writers] == [0, 0]
    assert reads
    assert [path.name for path in path_of(KEY).parent.iterdir() if path.name.endswith(".part")] == []


def test_the_key_reads_the_versions_that_torch_has() -> None:
    import torch

    assert torch_versions() == (torch.__version__, torch.version.cuda or "none")
    assert machine_key("NVIDIA H200", "1").gpu == "NVIDIA H200"


def two_h200s(monkeypatch: pytest.MonkeyPatch) -> Hardware:
    devices = tuple(Device(i, "NVIDIA H200", "cuda", 150 << 30, 149 << 30) for i in range(2))
    monkeypatch.setattr(machine, "probe_details", lambda _: Probe(Hardware(devices), tuple(UUIDS)))
    monkeypatch.setattr(machine, "driver_version", lambda: "580.65.06")
    return Hardware(devices)


def test_a_plan_uses_what_is_known_and_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = two_h200s(monkeypatch)

    def never(_: Sequence[str]) -> Measured:
        raise AssertionError("measured")

    unknown = machine.know(hardware, "never", never)
    assert unknown.measured == {}
    assert "built in" in unknown.said[0]
    write(unknown.keys["NVIDIA H200"], replace(FOUND, measured_at="2026-11-01 10:00:00"))
    known = machine.know(hardware, "never", never)
    assert known.measured["NVIDIA H200"].context_bytes == 700 * MIB
    assert "measured here on 2026-11-01, MiB: context 700" in known.said[0]
    assert machine.know(hardware, "missing", never).measured == known.measured


def test_a_training_run_measures_what_is_missing_and_goes_on_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hardware = two_h200s(monkeypatch)
    fails = child(tmp_path, "raise SystemExit('card in use')")
    failed = machine.know(hardware, "missing", lambda uuids: in_child(uuids, fails))
    assert failed.measured == {}
    assert "could not be measured: the measuring process ended with code 1: card in use" in failed.said[0]
    assert "built in" in failed.said[1]
    with pytest.raises(RunFailed, match="card in use"):
        machine.know(hardware, "always", lambda uuids: in_child(uuids, fails))
    works = child(tmp_path, "print(json.dumps(SAID))")
    for when in ("missing", "missing", "always"):
        made = machine.know(hardware, when, lambda uuids: in_child(uuids, works))  # type: ignore[arg-type]
        assert made.measured["NVIDIA H200"].nccl_bytes == 800 * MIB
    assert starts(tmp_path) == ["GPU-aaaa GPU-bbbb"] * 4  # two that failed, the first that was missing, the asked one


def test_one_card_is_measured_again_when_a_second_one_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = two_h200s(monkeypatch)
    key = machine.know(hardware).keys["NVIDIA H200"]
    write(key, replace(FOUND, nccl_bytes=None, gpus=1))
    single = Hardware(hardware.devices[:1])
    asked: list[Sequence[str]] = []

    def measure(uuids: Sequence[str]) -> Measured:
        asked.append(uuids)
        return FOUND

    assert "NCCL built in" in machine.know(single, "missing", measure).said[0]
    assert asked == []
    assert machine.know(hardware, "missing", measure).measured["NVIDIA H200"].nccl_bytes == 800 * MIB
    assert asked == [UUIDS]


def test_what_4_bit_weights_take_is_measured_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = two_h200s(monkeypatch)
    asked: list[bool] = []

    def in_child(_: Sequence[str], in_4bit: bool) -> Measured:
        asked.append(in_4bit)
        return FOUND if in_4bit else replace(FOUND, nf4_scratch_bytes=None)

    monkeypatch.setattr(machine.constants, "in_child", in_child)
    without = machine.know(hardware, "missing")
    assert "4-bit" not in without.said[0]
    assert "4-bit scratch built in" in machine.know(hardware, in_4bit=True).said[0]
    assert "4-bit scratch 3" in machine.know(hardware, "missing", in_4bit=True).said[0]
    machine.know(hardware, "missing")
    machine.know(hardware, "missing", in_4bit=True)
    assert asked == [False, True]
    machine.know(hardware, "always")
    # Where a machine has no bitsandbytes, nothing is there to be measured, however often it is asked.
    monkeypatch.setattr(machine, "machine_key", lambda name, _: replace(KEY, gpu=name, bitsandbytes="none"))
    for _ in range(2):
        machine.know(hardware, "missing", in_4bit=True)
    assert asked == [False, True, True, False]


def test_a_cache_that_cannot_be_written_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hardware = two_h200s(monkeypatch)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    made = machine.know(hardware, "missing", lambda _: FOUND)
    assert made.measured == {}
    assert "the cache cannot be written" in made.said[0]


def test_declared_devices_use_nothing_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from parallel_tune.nvml import NvmlGpu

    write(KEY, FOUND)
    card = NvmlGpu("GPU-aaaa", "NVIDIA H200", 143_771 * MIB, 143_000 * MIB, (9, 0))
    monkeypatch.setattr(machine, "read_nvml", lambda: [card])
    output = CliRunner().invoke(program, ["plan", "--hardware", "2xH200-141GB", "--json"]).output
    plan = json.loads(output)
    assert plan["constants"] == {}
    assert "nothing measured on this machine's NVIDIA H200 is used" in plan["basis"][0]
    assert Plan.from_json(output).basis == tuple(plan["basis"])
    other = json.loads(CliRunner().invoke(program, ["plan", "--hardware", "T4-16GB", "--json"]).output)
    assert "H200 is used" not in other["basis"][0]
    with pytest.raises(ConfigError, match="declared"):
        machine.know(replace(Hardware(tuple(Device(0, "x", "cuda", 1, 1) for _ in "a")), declared=True), "always")


def test_a_plan_says_whose_constants_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = two_h200s(monkeypatch)
    from parallel_tune import decision

    monkeypatch.setattr(decision, "probe", lambda _: hardware)
    write(machine.know(hardware).keys["NVIDIA H200"], FOUND)
    # Captured graphs would add their own to the context.
    asked = ["plan", "--strategy", "ddp", "--capture", "off"]
    plan = json.loads(CliRunner().invoke(program, [*asked, "--json"]).output)
    assert plan["constants"]["NVIDIA H200"]["nccl_bytes"] == 800 * MIB
    assert [device["memory"]["context_bytes"] for device in plan["devices"]] == [1500 * MIB] * 2
    assert "measured here" in CliRunner().invoke(program, asked).output


def test_the_measuring_steps_run_on_a_cpu_too_and_import_no_compiler() -> None:
    code = (
        "import sys, torch\nfrom parallel_tune.memory.measure import train_a_little\n"
        "train_a_little(torch.device('cpu'), torch.bfloat16)\nprint('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


class BusyCard:
    """NVML of a card on which another process takes more with each look; it tells processes apart, or does not."""

    class NVMLError(Exception):
        pass

    def __init__(self, tells: bool) -> None:
        self._tells, self._others = tells, 0

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        self._others += 100 * MIB
        return SimpleNamespace(used=self._others + 900 * MIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:  # noqa: N802
        if not self._tells:
            raise self.NVMLError(handle)
        used = {os.getpid(): 900 * MIB, 1: self._others}
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in used.items()]


@pytest.fixture
def gpu_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], Any]:
    """A GPU of which torch's allocator holds 200 MiB."""
    import torch

    from parallel_tune.memory import measure

    monkeypatch.setattr(measure, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 200 * MIB)
    return lambda tells: measure.Gpu(UUIDS[0], 0, BusyCard(tells))


def test_what_others_take_meanwhile_is_not_measured(gpu_of: Callable[[bool], Any]) -> None:
    assert gpu_of(True).outside_bytes() == 700 * MIB


def test_nothing_is_measured_where_others_cannot_be_told_from_this_process(gpu_of: Callable[[bool], Any]) -> None:
    with pytest.raises(RuntimeError, match="another process is changing"):
        gpu_of(False).outside_bytes()


def test_the_measuring_process_fails_in_words_without_a_gpu() -> None:
    with pytest.raises(NotMeasured, match=r"NVML|pynvml|CUDA"):
        in_child(["GPU-none"])
    assert constants.MEASURE[1] == "-P"
    assert os.environ.get("CUDA_VISIBLE_DEVICES") != "GPU-none"
