"""The example notebook runs in a real kernel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
