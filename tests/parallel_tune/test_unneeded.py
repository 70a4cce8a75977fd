"""Quantizers are left out of a training process that quantises nothing, and of no other."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from parallel_tune.config import make_config
from parallel_tune.unneeded import QUANTIZERS, unneeded_packages


@pytest.mark.parametrize(
    ("options", "engine", "left_out"),
    [
        ({}, "transformers", QUANTIZERS),
        ({"full_finetuning": True, "optim": "sgd"}, "transformers", QUANTIZERS),
        ({"load_in_4bit": True}, "transformers", ()),
        ({"optim": "adamw_8bit"}, "transformers", ()),
        ({"optim": "paged_adamw_32bit"}, "transformers", ()),
        ({"optim": "lion_32bit"}, "transformers", ()),
        ({}, "unsloth", ()),
        ({"model": "/nowhere"}, "transformers", ()),
    ],
)
def test_what_a_run_has_no_use_for(
    options: dict[str, Any], engine: str, left_out: tuple[str, ...], tied_model: Path
) -> None:
    config = make_config({"model": str(tied_model), **options})
    assert unneeded_packages(config, engine) == left_out


def test_a_model_whose_files_are_quantised_needs_its_quantizer(tied_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tied_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "torchao"}}))
    assert unneeded_packages(make_config({"model": str(folder)}), "transformers") == ()


def test_what_is_left_out_is_not_imported_by_those_who_would() -> None:
    program = """
import colorsys, sys
from parallel_tune.unneeded import QUANTIZERS, leave_out
leave_out([*QUANTIZERS, "colorsys"])
assert sys.modules["colorsys"] is colorsys, "what is imported already stays"
import parallel_tune.training
import peft, transformers, trl
assert not transformers.utils.is_bitsandbytes_available() and not peft.import_utils.is_bnb_available()
print(*sorted(name for name in sys.modules if name.partition(".")[0] in QUANTIZERS and sys.modules[name]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
