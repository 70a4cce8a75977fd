"""The real launchers: each child refuses with exit code 4 where accelerate would have raised its ValueError."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"],
    "accelerate launch": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"],
}
# Each child leaves its code and message in a file: launchers replace exit codes and mix outputs.
REFUSE = """
import os, pathlib, sys
from parallel_tune.refusal import check_settings, find_launch
from strategies.errors import ParallelTuneError
code, message = 0, ""
try:
    check_settings("model_parallel", None, find_launch(os.environ))
except ParallelTuneError as error:
    code, message = error.exit_code, str(error)
assert "torch" not in sys.modules
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(f"{code} {message}")
"""
ACCELERATE = """
import os, pathlib, sys
import torch
from accelerate import Accelerator
model = torch.nn.Linear(2, 2)
model.hf_device_map = {"first": 0, "second": 1}
message = ""
try:
    Accelerator(cpu=True).prepare(model)
except ValueError as error:
    message = str(error)
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(message)
os._exit(0)
"""


def run_under(launcher: str, script: str, tmp_path: Path) -> list[str]:
    """What the two children wrote."""
    path = tmp_path / "script.py"
    path.write_text(script)
    out = tmp_path / "out"
    out.mkdir()
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("ACCELERATE_", "TORCHELASTIC_", "SLURM_"))}
    root = str(Path(__file__).parents[2])
    env = clean | {"PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", *LAUNCHERS[launcher], str(path), str(out)]
    subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, timeout=240, check=False)
    return [(out / str(rank)).read_text() for rank in range(2)]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_each_child_refuses_before_torch_is_imported(launcher: str, tmp_path: Path) -> None:
    for said in run_under(launcher, REFUSE, tmp_path):
        assert said.startswith("4 --strategy model_parallel splits one model")
        assert f"but {launcher} started 2 processes" in said


def test_what_accelerate_says_instead(tmp_path: Path) -> None:
    for said in run_under("torchrun", ACCELERATE, tmp_path):
        assert "You can't train a model that has been loaded with `device_map='auto'` in any distributed mode" in said
