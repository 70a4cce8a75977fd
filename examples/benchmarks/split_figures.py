"""Figures of split_speed.py and its picture, both made of the rows alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from running import apart

LEAST_SHARE = 0.97
"""Of its stage times that a naive run must reach: below, it wastes time itself, and the comparison does not count."""

PAIRS = {"lanes": "naive", "captured-lanes": "captured-naive"}
"""Each way in lanes, and the naive one that it is held against."""


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By case: what lanes gain, eager and captured, how near that comes to the bound, and how far losses are apart."""
    found: dict[str, dict[str, Any]] = {}
    for case in dict.fromkeys(row["case"] for row in rows if "way" in row):
        ways = {row["way"]: row for row in rows if row["case"] == case and "way" in row and "failed" not in row}
        found[case] = {}
        for way, naive in PAIRS.items():
            if way in ways and naive in ways:
                found[case][way] = gain(ways[way], ways[naive])
        if "naive" in ways and "captured-lanes" in ways:
            found[case]["captured_lanes_over_naive"] = (
                ways["naive"]["step_seconds"] / ways["captured-lanes"]["step_seconds"]
            )
            found[case]["losses_apart"] = apart(ways["captured-lanes"]["losses"], ways["naive"]["losses"])
    return found


def gain(lanes: dict[str, Any], naive: dict[str, Any]) -> dict[str, Any]:
    """Of lanes over the naive way."""
    stages, count = len(lanes["cuts"]), lanes["micro_batches"]
    bound = stages * count / (count + stages - 1)
    speedup = naive["step_seconds"] / lanes["step_seconds"]
    slower = sum(lanes["stage_seconds"]) / sum(naive["stage_seconds"])
    return {
        "speedup": speedup,
        "bound": bound,
        "share_of_bound": speedup / bound,
        # What cards that all work at once take longer, at lower clocks: no schedule can win that back.
        "stages_slower": slower - 1,
        "share_of_bound_but_for_that": speedup * slower / bound,
        "naive_stage_times_share": naive["stage_times_share"],
        "counts": (naive["stage_times_share"] or 0.0) >= LEAST_SHARE,
        "losses_apart": apart(lanes["losses"], naive["losses"]),
    }


def draw(result: Path) -> list[Path]:
    """A PNG for each case of a result file, beside it: the last step of each way, one below the other."""
    from parallel_tune.reporting.schedule import Schedule, draw_schedules

    rows = json.loads(result.read_text())["rows"]
    drawn = []
    for case in dict.fromkeys(row["case"] for row in rows if row.get("timeline")):
        schedules = [
            Schedule(row["way"].replace("-", " "), row["timeline"], [(d["index"], d["name"]) for d in row["devices"]])
            for row in rows
            if row["case"] == case and row.get("timeline")
        ]
        path = result.with_name(f"{result.stem}.{case.replace(':', '-')}.png")
        draw_schedules(schedules, path)
        drawn.append(path)
    return drawn
