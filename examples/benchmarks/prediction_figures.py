"""What comes out of the rows of examples/benchmarks/prediction.py: errors of each, and of all."""

from __future__ import annotations

import statistics
from typing import Any

Measured = dict[str, Any]
KINDS = ("allocated", "used")


def score(row: Measured) -> None:
    """Add a run's predicted and measured bytes of its one card, and the errors of the predictions.

    Stages that share the card are one process: the context is there once, and its peak is at most the sum of theirs,
    which they do not reach at one moment. That is a bound (`is_bound`) and no prediction.

    What was used is what the run's report says; of a row that ran beside others (`jobs`), what was seen of its own
    processes from outside. `used_by` says whose use it is, the "process" or the "card".

    Raises:
        ValueError: nothing was seen of them.
    """
    devices = row["devices"]
    row["predicted_allocated_bytes"] = sum(device["predicted_allocated_bytes"] for device in devices)
    row["predicted_peak_bytes"] = sum(device["predicted_peak_bytes"] for device in devices)
    for planned in row["plan"]["devices"][1:]:
        row["predicted_peak_bytes"] -= planned["memory"]["context_bytes"]
    row["is_bound"] = len(devices) > 1
    for name in ("allocated_peak_bytes", "reserved_peak_bytes", "used_peak_bytes"):
        row[name] = devices[0][name]
    row["used_by"] = devices[0].get("used_by", "card")
    if row.get("jobs", 1) > 1:
        if row["process_used_peak_bytes"] is None:
            raise ValueError(f"NVML named no process of {row['name']!r} while it ran beside others")
        row["used_peak_bytes"], row["used_by"] = row["process_used_peak_bytes"], "process"
    row["allocated_error"] = row["predicted_allocated_bytes"] / row["allocated_peak_bytes"] - 1
    row["used_error"] = row["predicted_peak_bytes"] / row["used_peak_bytes"] - 1


def figures(rows: list[Measured]) -> dict[str, Any]:
    """Mean and worst of the errors' sizes.

    Rows that were in view when a formula or a constant was made are counted apart: they are no test of it; and so are
    those of another allocator, of which predictions know nothing.
    """
    fixed = [row for row in rows if row.get("allocator")]
    rows = [row for row in rows if not row.get("allocator")]
    fresh = [row for row in rows if not row.get("in_view")]
    found = _errors(fresh)
    for name in ("transformers", "unsloth"):
        found[name] = _errors([row for row in fresh if row["engine"] == name])
    found["captured"] = _errors([row for row in fresh if row.get("captured")])
    bounds = [row for row in fresh if row.get("is_bound")]
    found["bounds"] = len(bounds)
    found["bounds_that_hold"] = sum(row["allocated_error"] >= 0 for row in bounds)
    found["in_view"] = _errors([row for row in rows if row.get("in_view")])
    found["fixed_segments"] = _errors(fixed)
    refused = [row for row in fresh if row.get("may_fail")]
    found["refused_rows"] = len(refused)
    found["refused_rows_that_ran_out_of_memory"] = sum(bool(row.get("ran_out_of_memory")) for row in refused)
    found["failed"] = [row["name"] for row in fresh if "failed" in row and not row.get("ran_out_of_memory")]
    rival = [row for row in fresh if "fitcheck_used_error" in row]
    if rival:
        found["fitcheck"] = {"rows": len(rival), "refused": sum("fitcheck_refusal" in row for row in fresh)}
        found["fitcheck"] |= _errors_of(rival, "fitcheck_")
        found["ours_on_these"] = _errors(rival)
    return found


def _errors(rows: list[Measured]) -> dict[str, Any]:
    measured = [row for row in rows if "allocated_error" in row and not row.get("is_bound")]
    false_fits = sum(bool(row.get("ran_out_of_memory")) and not row.get("may_fail") for row in rows)
    return {"rows": len(measured), **_errors_of(measured, ""), "false_fits": false_fits}


def _errors_of(rows: list[Measured], prefix: str) -> dict[str, float]:
    return mean_and_worst({kind: [row[f"{prefix}{kind}_error"] for row in rows] for kind in KINDS})


def mean_and_worst(errors: dict[str, list[float]]) -> dict[str, float]:
    """Of each kind's errors, by size; a kind without any has none."""
    found = {}
    for kind, signed in errors.items():
        if sizes := [abs(error) for error in signed]:
            found[f"{kind}_mean_error"] = round(statistics.mean(sizes), 6)
            found[f"{kind}_worst_error"] = round(max(sizes), 6)
    return found


def line(row: Measured) -> str:
    """A row for people."""
    what = f"{row['name']:38} {row['tokens']:>6} x {row['rows']:<2} {row['seconds']:6.1f} s "
    if "failed" in row:
        said = "ran out of memory" if row["ran_out_of_memory"] else f"FAILED: {row['failed']}"
        return f"{what} {said}{', as it should' if row['may_fail'] and row['ran_out_of_memory'] else ''}"
    gib = [row[name] / 2**30 for name in ("predicted_allocated_bytes", "allocated_peak_bytes")]
    used = [row[name] / 2**30 for name in ("predicted_peak_bytes", "used_peak_bytes")]
    return (
        f"{what} allocated {gib[0]:6.2f} / {gib[1]:6.2f} GiB {row['allocated_error']:+7.2%}"
        f"   used {used[0]:6.2f} / {used[1]:6.2f} GiB {row['used_error']:+7.2%}"
    )
