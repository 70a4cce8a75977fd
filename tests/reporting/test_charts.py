"""Axes with round ticks, curves that keep their peaks, and the schedule of a pipelined step."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel_tune.reporting.axes import make_axis, size
from parallel_tune.reporting.figures import read_timeline
from parallel_tune.reporting.html import Markup, tag
from parallel_tune.reporting.line_chart import Curve, Frame, line_chart, thin
from parallel_tune.reporting.schedule import Schedule, busy_shares, draw_schedules, places_of, schedule_chart

FINITE = st.floats(-1e9, 1e9, allow_nan=False)


@given(st.lists(FINITE, min_size=1, max_size=20), st.booleans(), st.booleans(), st.booleans())
def test_an_axis_holds_its_values_with_few_ticks(values: list[float], whole: bool, zero: bool, tight: bool) -> None:
    axis = make_axis(values, whole=whole, zero=zero, tight=tight)
    slack = 1e-6 * (axis.high - axis.low)
    assert axis.low < axis.high
    assert all(axis.low - slack <= value <= axis.high + slack for value in values)
    assert 1 <= len(axis.ticks) <= 9
    assert len(set(axis.labels())) == len(axis.ticks)
    assert not whole or all(tick == int(tick) for tick in axis.ticks)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0, 2e-4], ["0", "0.5e-4", "1.0e-4", "1.5e-4", "2.0e-4"]),
        ([0, 14_900], ["0", "5,000", "10,000", "15,000"]),
        ([1.09, 1.97], ["1.0", "1.5", "2.0"]),
        ([10.65, 10.77], ["10.65", "10.70", "10.75", "10.80"]),
    ],
)
def test_labels(values: list[float], labels: list[str]) -> None:
    assert make_axis(values, count=4).labels() == labels


def test_thinning_keeps_order_ends_and_peaks() -> None:
    points = [(float(x), 0.0) for x in range(10_000)]
    points[7_777] = (7_777.0, 99.0)
    points[3_333] = (3_333.0, -5.0)
    kept = thin(points, 600)
    assert len(kept) <= 600
    assert {(7_777.0, 99.0), (3_333.0, -5.0)} <= set(kept)
    assert kept == sorted(kept)


def test_a_chart_of_one_point_and_one_of_none() -> None:
    frame = Frame("Loss", "step", "loss")
    assert "<polyline" in line_chart(frame, [Curve("only", [(1.0, 2.0)])])
    assert line_chart(frame, [Curve("none", [])]) == ""


def test_text_and_attributes_are_escaped() -> None:
    assert tag("p", "<&>", title='"x"') == '<p title="&quot;x&quot;">&lt;&amp;&gt;</p>'
    assert tag("p", Markup("<br/>")) == "<p><br/></p>"


def test_sizes_name_their_unit() -> None:
    assert size(3 * 2**29) == "1.50 GiB"
    assert size(2**20) == "1.0 MiB"


SEGMENTS: list[dict[str, Any]] = [
    {"stage": 0, "micro_batch": 0, "direction": "forward", "start": 10.0, "end": 11.0},
    {"stage": 1, "micro_batch": 0, "direction": "forward+backward", "start": 11.0, "end": 13.0},
    {"stage": 0, "micro_batch": 1, "direction": "forward", "start": 11.0, "end": 12.0},
    {"stage": 0, "micro_batch": 0, "direction": "backward", "start": 13.0, "end": 14.0},
]


def test_schedule_says_who_was_busy(make_plan: Any) -> None:
    assert busy_shares(SEGMENTS) == {0: 0.75, 1: 0.5}
    places = places_of(make_plan(2, "model_parallel").devices)
    picture = schedule_chart([Schedule("", SEGMENTS, places)])
    assert picture.count("<rect") == 4
    assert ">75% busy<" in picture and ">50% busy<" in picture
    assert "micro-batch 0, backward: 3000.0 to 4000.0 ms" in picture
    assert schedule_chart([]) == ""


def test_schedules_share_one_axis_whatever_their_clocks_began_at(make_plan: Any, tmp_path: Path) -> None:
    places = places_of(make_plan(2, "model_parallel").devices)
    naive = [
        {"stage": 0, "micro_batch": 0, "direction": "forward", "start": 90.0, "end": 91.0},
        {"stage": 1, "micro_batch": 0, "direction": "forward+backward", "start": 91.0, "end": 93.0},
        {"stage": 0, "micro_batch": 0, "direction": "backward", "start": 93.0, "end": 98.0},
    ]
    both = [Schedule("naive <b>", naive, places), Schedule("lanes $2", SEGMENTS, places)]
    picture = schedule_chart(both)
    assert "naive &lt;b&gt;: 8,000 ms, devices 50% busy on average" in picture
    assert "lanes $2: 4,000 ms, devices 62% busy on average" in picture
    assert picture.count("time within the step (ms)") == 1
    # The naive step's end is the axis' end; the other's last bar ends in the middle of it.
    wide = [float(found) for found in re.findall(r'<rect x="150" y="\d+" width="([\d.]+)"', picture)]
    assert wide == [pytest.approx(860 / 8 - 1), pytest.approx(860 / 8 - 1)]
    draw_schedules(both, tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["schedule.png"]


def test_a_timeline_is_read_in_both_forms_and_a_broken_one_is_none(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    assert read_timeline(path) == []
    path.write_text(json.dumps({"step": 3, "segments": SEGMENTS}))
    assert read_timeline(path) == SEGMENTS
    path.write_text(json.dumps(SEGMENTS))
    assert read_timeline(path) == SEGMENTS
    path.write_text('[{"stage": 0}]')
    assert read_timeline(path) == []
