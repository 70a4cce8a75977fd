"""The doctor on a machine with GPUs: it names them, and processes on them meet."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def test_gpus_are_listed_and_meet(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "parallel_tune", "doctor", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads(done.stdout)["checks"]
    said = {name: [c["said"] for c in checks if c["name"] == name] for name in ("GPUs", "processes", "constants")}
    count = torch.cuda.device_count()
    assert all(f"{index} {torch.cuda.get_device_name(index)}" in said["GPUs"][0] for index in range(count))
    processes = "2 processes" if count > 1 else "1 process"
    assert f"{processes} on the loopback, by nccl: meet and sum" in said["processes"]
    assert said["constants"]
