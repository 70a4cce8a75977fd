"""What fitcheck-llm predicts, asked in an environment of its own that has it installed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from typing import Any

CODE = """
import dataclasses, json, sys
from fitcheck import config_parser, estimator
for line in sys.stdin:
    row = json.loads(line)
    try:
        config_parser._reject_unsupported(row["config"], "x")
        fields = config_parser._parse_fields(row["config"])
        values = {f.name: getattr(fields, f.name) for f in dataclasses.fields(fields)}
        config = config_parser.ModelConfig(name="x", num_params=config_parser._count_params(fields), **values)
        parts = estimator._compute_components(config, estimator.TrainingConfig(**row["training"]))
        mib = {f.name: getattr(parts, f.name) for f in dataclasses.fields(parts)}
        used = sum(mib.values())
        print(json.dumps({"allocated": (used - mib["overhead_mib"]) * 2**20, "used": used * 2**20}), flush=True)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
"""


def ask(python: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each row its bytes, `allocated` (the sum of its tensors) and `used` (its process overhead too), or `error`.

    Args:
        python: the interpreter of that environment.
        rows: `config`, a model's, and `training`, in fitcheck-llm's words.
    """
    lines = "\n".join(json.dumps(row) for row in rows)
    done = subprocess.run([python, "-c", CODE], input=lines, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]
