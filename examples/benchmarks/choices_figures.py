"""What comes out of examples/benchmarks/choices.py: whether each choice was right, and how right its memory."""

from __future__ import annotations

from typing import Any

from prediction_figures import mean_and_worst

Measured = dict[str, Any]
KINDS = {
    "allocated": ("predicted_allocated_bytes", "allocated_peak_bytes"),
    "used": ("predicted_peak_bytes", "used_peak_bytes"),
}


def score(row: Measured) -> None:
    """Add each device's errors of prediction, and whether all kept to what a card of the case has free."""
    for device in row["devices"]:
        for kind, (predicted, measured) in KINDS.items():
            if measured in device:
                device[f"{kind}_error"] = device[predicted] / device[measured] - 1
    used = [device["used_peak_bytes"] for device in row["devices"] if "used_peak_bytes" in device]
    row["kept_to_card"] = max(used) <= row["card_bytes"] if used else None


def fits(row: Measured) -> bool:
    """Whether the run ended on cards of the size of the case's. What lies outside torch's allocator is not held down
    there, so that a run may end which a real card would not have held."""
    return not row["ran_out_of_memory"] and row["kept_to_card"] is not False


def verdict(chosen: Measured, other: Measured) -> tuple[bool, str]:
    """Whether the choice was right, and why."""
    if not fits(chosen):
        return False, "the choice does not fit"
    if not fits(other):
        return True, f"{other['strategy']} does not fit"
    faster = chosen["tokens_per_second"] / other["tokens_per_second"]
    return faster > 1, f"{faster:.2f} times as fast as {other['strategy']}"


def figures(rows: list[Measured]) -> dict[str, Any]:
    """Cases of which both runs were measured, right and wrong ones, and the errors of the chosen runs."""
    cases: dict[str, dict[str, Measured]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})["chosen" if row["chosen"] else "other"] = row
    pairs = [
        (pair["chosen"], pair["other"])
        for pair in cases.values()
        if len(pair) == len(("chosen", "other")) and not any("failed" in row for row in pair.values())
    ]
    verdicts = {chosen["case"]: (chosen, *verdict(chosen, other)) for chosen, other in pairs}
    found: dict[str, Any] = {
        "cases": len(pairs),
        "right": sum(right for _, right, _ in verdicts.values()),
        "wrong": sum(not right for _, right, _ in verdicts.values()),
        "wrong_cases": [case for case, (_, right, _) in verdicts.items() if not right],
        "sides": {},
        "verdicts": {case: f"{chosen['strategy']}: {why}" for case, (chosen, _, why) in verdicts.items()},
        "planned_slower": [chosen["case"] for chosen, other in pairs if _planned_slower(chosen, other)],
        "failed": [row["what"] for row in rows if "failed" in row],
    }
    for chosen, right, _ in verdicts.values():
        side = found["sides"].setdefault(chosen["side"], {"cases": 0, "right": 0})
        side["cases"] += 1
        side["right"] += right
    measured = [row for row in rows if "failed" not in row]
    # A plan that was refused was run all the same.
    found["false_fits"] = [row["what"] for row in measured if row["planned_to_fit"] and not fits(row)]
    found["false_refusals"] = [row["what"] for row in measured if not row["planned_to_fit"] and fits(row)]
    return found | _errors([row for row in measured if row["chosen"] and not row["ran_out_of_memory"]])


def _planned_slower(chosen: Measured, other: Measured) -> bool:
    """Whether the plans themselves, for the declared cards, had the other one faster."""
    both = chosen["planned_to_fit"] and other["planned_to_fit"]
    return bool(both and chosen["planned_tokens_per_second"] < other["planned_tokens_per_second"])


def _errors(rows: list[Measured]) -> dict[str, float]:
    devices = [device for row in rows for device in row["devices"]]
    names = {kind: f"{kind}_error" for kind in KINDS}
    return mean_and_worst({kind: [each[name] for each in devices if name in each] for kind, name in names.items()})


def line(row: Measured) -> str:
    """A run for people."""
    what = f"{row['what']:58}"
    if "failed" in row:
        return f"{what} FAILED: {row['failed']}"
    if row["ran_out_of_memory"]:
        return f"{what} ran out of memory{'' if row['planned_to_fit'] else ', as planned'}: {row['said']}"
    shown = [f"{what} {row['strategy']:14} {row['tokens_per_second']:9,.0f} tokens/s"]
    for device in row["devices"]:
        gib = [f"{device[name] / 2**30:.2f}" if name in device else "?" for names in KINDS.values() for name in names]
        shown.append(f"allocated {gib[0]} / {gib[1]}, used {gib[2]} / {gib[3]} GiB")
    return "  ".join(shown)
