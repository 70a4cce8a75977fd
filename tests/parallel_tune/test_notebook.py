"""The example notebook runs in a real kernel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import make_tiny_model

ROOT = Path(__file__).parents[2]
# In a process of its own: a kernel's libraries warn, and warnings are errors here.
EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient
path, out = sys.argv[1:]
notebook = nbformat.read(path, as_version=4)
NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": "."}}).execute()
nbformat.write(notebook, out)
"""


def output_of(notebook: Path) -> str:
    cells = json.loads(notebook.read_text())["cells"]
    # rich would draw its tables beside the text that they belong in.
    assert all(output["output_type"] != "display_data" for cell in cells for output in cell.get("outputs", []))
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return "".join("".join(text) for text in texts)


def test_the_notebook_trains_with_its_lines_in_the_cell(tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    shutil.copy(ROOT / "examples" / "short_answers.jsonl", tmp_path)
    command = [sys.executable, "-c", EXECUTE, str(ROOT / "examples" / "quickstart.ipynb"), "done.ipynb"]
    env = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    env |= {
        "IPYTHONDIR": str(tmp_path),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "HF_HOME": str(tmp_path / "hf"),
    }
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    said = output_of(tmp_path / "done.ipynb")
    assert "model_parallel True" in said
    assert "ddp with transformers: 2 processes" in said
    assert "step     4/4" in said
    assert "('ddp', 32, 'PeftModelForCausalLM')" in said


INTERRUPT = """
import sys
from jupyter_client.manager import start_new_kernel
model, data = sys.argv[1:]
manager, client = start_new_kernel(kernel_name="python3")

def run(code, interrupt_at=None):
    '''What a cell says, its error last; the kernel is interrupted as by the notebook's button.'''
    asked, said = client.execute(code), ""
    while True:
        message = client.get_iopub_msg(timeout=240)
        if message["parent_header"].get("msg_id") != asked:
            continue
        content = message["content"]
        said += str(content.get("text") or content.get("data", {}).get("text/plain") or "")
        if message["msg_type"] == "error":
            said += f"{content['ename']}: {content['evalue']}\\n"
        if interrupt_at and interrupt_at in said:
            manager.interrupt_kernel()
            interrupt_at = None
        if message["msg_type"] == "status" and content["execution_state"] == "idle":
            return said

options = f"model={model!r}, dataset={data!r}, hardware='cpu:1', max_seq_length=64, global_batch_size=4"
print(run("import os, parallel_tune, torch; torch.zeros(1); os.environ['ACCELERATE_MIXED_PRECISION'] = 'bf16'"))
print("FIRST", run(f"parallel_tune.tune({options}, max_steps=100000, output_dir='first run')", "step     3/"))
print("HINT", run("import sys; type(sys.last_value).__mro__[1].__name__, sys.last_value.hint"))
print("SECOND", run(f"run = parallel_tune.tune({options}, max_steps=2); run.report['steps'], len(run.metrics)"))
print("THIRD", run(f"parallel_tune.tune({options}, output_dir='first run')"))
print("THREAD", run(
    "import threading\\nruns = []\\n"
    f"thread = threading.Thread(target=lambda: runs.append(parallel_tune.tune({options}, max_steps=1)))\\n"
    "thread.start(); thread.join(); runs[0].report['steps']"
))
manager.shutdown_kernel(now=True)
"""


def test_a_kernel_outlives_an_interrupted_run_and_starts_the_next(tmp_path: Path) -> None:
    pytest.importorskip("ipykernel")
    make_tiny_model(tmp_path / "tiny")
    env = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    env |= {"IPYTHONDIR": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"), "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", INTERRUPT, str(tmp_path / "tiny"), str(ROOT / "examples" / "short_answers.jsonl")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    first, second, third, thread = (
        done.stdout.partition(f"{name} ")[2] for name in ("FIRST", "SECOND", "THIRD", "THREAD")
    )
    assert "Stopped: stopped by a signal after step" in first
    hint = first.partition("HINT ")[2].partition("SECOND")[0]
    # A command to copy: the folder's name has a space.
    assert "ParallelTuneError" in hint and f"Go on with `parallel-tune resume '{tmp_path}/first run'`" in hint
    assert list((tmp_path / "first run").glob("checkpoint-*"))
    assert "(2, 2)" in second
    assert "ConfigError: " in third and "holds a run already" in third
    assert thread.rstrip().endswith("1")
