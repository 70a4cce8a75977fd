"""The rows of a results file predicted anew, by today's formulas and by fitcheck-llm: no GPU needed."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from prediction_figures import figures, line, score
from rival import ask
from shapes import SHAPES

from parallel_tune.commands import read_config
from parallel_tune.memory import captured
from parallel_tune.prediction import TrainedRows, predict_for_rows
from strategies.contracts import Plan

HEAD_KERNEL = (2, 12)
"""The first torch whose attention over rows of any length takes grouped heads."""

OPTIM_BEFORE = "adamw_torch"
"""Of rows whose command line names no optimizer: the default when they were measured."""


def look_again(path: Path, rival: str) -> Path:
    """Predict the rows that carry their plan, add the rival's figures, and write the file anew."""
    record = json.loads(path.read_text())
    for row in record["rows"]:
        if "plan" in row and "failed" not in row:
            _predict(row)
            print(line(row))
    if rival:
        _add_rival(record["rows"], rival)
    record["figures"] = figures(record["rows"])
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _predict(row: dict[str, Any]) -> None:
    plan = Plan.from_json(json.dumps(row["plan"]))
    rows = TrainedRows(**row["predicted_for"] | {"sizes": tuple(row["predicted_for"]["sizes"])})
    minor = tuple(int(part) for part in row["versions"]["torch"].split(".")[:2])
    kind, sizes = SHAPES[row["shape"]]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": kind, **sizes}))
        config = read_arguments(row["arguments"], folder)
        # The kernel of the torch that ran the row, not of the one that is here.
        with (
            mock.patch("parallel_tune.planning.varlen_repeats_heads", lambda: minor < HEAD_KERNEL),
            mock.patch.object(captured, "varlen_repeats_heads", lambda: minor < HEAD_KERNEL),
        ):
            predicted = predict_for_rows(config, plan, rows)
    for device, memory in zip(row["devices"], predicted, strict=True):
        device["predicted_allocated_bytes"] = memory.allocated_bytes
        device["predicted_peak_bytes"] = memory.peak_bytes
    score(row)


def read_arguments(arguments: list[str], model: str) -> Any:
    """The configuration that a row's command line makes."""
    options: dict[str, Any] = {"model": model, "optim": OPTIM_BEFORE}
    for number, argument in enumerate(arguments):
        if argument.startswith("--"):
            following = arguments[number + 1 : number + 2]
            has_value = bool(following) and not following[0].startswith("--")
            options[argument.removeprefix("--")] = following[0] if has_value else True
    return read_config(None, options)


def _add_rival(rows: list[dict[str, Any]], python: str) -> None:
    measured = [row for row in rows if "allocated_error" in row]
    alike = [row for row in measured if not _beyond_it(row)]
    answers = ask(python, [{"config": _rival_config(row), "training": _rival_training(row)} for row in alike])
    for row in measured:
        if reason := _beyond_it(row):
            row["fitcheck_refusal"] = reason
    for row, answer in zip(alike, answers, strict=True):
        if "error" in answer:
            row["fitcheck_refusal"] = answer["error"]
            continue
        for kind, measured_as in (("allocated", "allocated_peak_bytes"), ("used", "used_peak_bytes")):
            row[f"fitcheck_{kind}_bytes"] = round(answer[kind])
            row[f"fitcheck_{kind}_error"] = answer[kind] / row[measured_as] - 1


def _beyond_it(row: dict[str, Any]) -> str:
    """Why it cannot be asked for a row; empty where it can."""
    if "plan" not in row and not row.get("in_view"):
        return "no plan"
    if row["engine"] == "unsloth":
        return "it knows no Unsloth"
    if row.get("captured"):
        return "it knows no captured steps"
    if len(row.get("devices", ())) > 1:
        return "it knows no stages"
    if row.get("data", "full") != "full":
        return "it knows only rows of one length"
    return ""


def _rival_config(row: dict[str, Any]) -> dict[str, Any]:
    kind, sizes = SHAPES[row["shape"]]
    return {"model_type": kind, **sizes}


def _rival_training(row: dict[str, Any]) -> dict[str, Any]:
    config = read_arguments(row.get("arguments", []), "x")
    lora = row["method"] != "full"
    return {
        "quantization": "nf4" if row["method"] == "4bit" else "none",
        "double_quant": row["method"] == "4bit",
        "optimizer": "adamw8bit" if "8bit" in config.optim else "adamw",
        "optimizer_dtype": "fp32" if lora else "bf16",
        "batch_size": row["rows"],
        "seq_len": row["tokens"],
        "lora_rank": config.r if lora else None,
        "lora_targets": list(config.target_modules),
        "grad_checkpoint": row["checkpointing"] != "none",
        "flash_attn": True,
    }
