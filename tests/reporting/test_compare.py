"""compare: three runs by hand and what the table, the pictures and the refusals say of them."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from parallel_tune import cli
from parallel_tune.reporting import compare as comparing
from parallel_tune.reporting import pictures
from parallel_tune.reporting.figures import load
from parallel_tune.rundir import RunDir
from strategies.contracts import Plan
from strategies.errors import ConfigError


@pytest.fixture
def three(run_maker: Callable[..., RunDir], make_plan: Callable[..., Plan]) -> list[RunDir]:
    return [
        run_maker("one", make_plan(1, global_batch=8), 125),
        run_maker("two", make_plan(2, global_batch=16), 63),
        run_maker("qlora", make_plan(2, global_batch=16), 63, load_in_4bit=True, run_name="$2 of <b>4-bit</b>"),
    ]


def test_table_holds_the_reports_figures(three: list[RunDir]) -> None:
    runs = [load(run.path) for run in three]
    names = comparing.unique_names(runs)
    assert names == ["one", "two", "$2 of <b>4-bit</b>"]
    for run, directory, name in zip(runs, three, names, strict=True):
        report = json.loads(directory.report.read_text())
        cells = dict(zip(comparing.HEAD, comparing.row(run, name), strict=True))
        assert cells["strategy"] == report["strategy"] and cells["engine"] == report["engine"]
        assert int(cells["processes"]) == report["world_size"]
        assert int(cells["global batch"]) == report["global_batch"]
        assert int(cells["steps"]) == report["steps"]
        assert int(cells["samples"].replace(",", "")) == report["samples"]
        assert int(cells["tokens"].replace(",", "")) == report["tokens"]
        assert cells["tokens/s"] == f"{report['tokens_per_second']:,.0f}"
        assert cells["samples/s"] == f"{report['samples'] / report['seconds']:,.2f}"
        assert cells["final loss"] == f"{report['final_loss']:.4f}"
        assert cells["peak memory"] == ("21.40 GiB" if report["world_size"] == 1 else "21.70 GiB")
    assert [run.kind for run in runs] == ["LoRA r16", "LoRA r16", "QLoRA r16"]


def test_the_held_out_loss_is_that_of_the_result_or_else_of_the_last_evaluation(three: list[RunDir]) -> None:
    run = load(three[0].path)
    assert run.report is not None
    last = f"{run.held_out[-1]['eval_loss']:.4f}"
    best = replace(run, report={**run.report, "held_out_loss_after": 1.25})
    unfinished, without = replace(run, report=None), replace(run, report=None, held_out=[])
    for case, said in ((best, "1.2500"), (unfinished, last), (without, "–")):
        assert comparing.row(case, "a run")[comparing.HEAD.index("held-out loss")] == said


def test_ddp_does_an_epoch_in_half_the_steps(three: list[RunDir]) -> None:
    runs = [load(run.path) for run in three]
    charts = comparing.make_charts(runs, ["one", "two", "qlora"])
    titles = [chart.frame.title for chart in charts]
    assert titles == ["Training loss by step", "Epochs done by step", "Training loss over time", "Throughput"]
    slopes = [curve.points[-1][1] / curve.points[-1][0] for curve in charts[1].curves]
    assert slopes[1] / slopes[0] == pytest.approx(2.0)
    assert charts[2].curves[0].points[-1][0] == pytest.approx(json.loads(three[0].report.read_text())["seconds"])
    # Runs that coincide are drawn one inside the other; those apart are not.
    assert [curve.width for curve in charts[1].curves] == [2.0, 4.5, 2.0]
    assert [curve.width for curve in charts[0].curves] == [2.0, 2.0, 2.0]


def test_runs_that_nearly_coincide_are_all_seen() -> None:
    """One step apart, or many runs, hide no curve."""
    near = [(float(step), 1.0 / (1 + step)) for step in range(40)]
    once = [(x, y + (0.2 if x == 31 else 0.001)) for x, y in near]
    far = [(x, y + 0.3) for x, y in near]
    assert [curve.width for curve in comparing.nested_curves(["a", "b", "c"], [near, once, far])] == [4.5, 2.0, 2.0]
    widths = [curve.width for curve in comparing.nested_curves(list("abcdefgh"), [near] * 8)]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == 8
    assert widths[0] <= 10 and widths[-1] == 2.0


def test_the_picture_holds_the_table_of_speeds(three: list[RunDir], tmp_path: Path) -> None:
    runs = [load(run.path) for run in three]
    head, *rows = comparing.speed_rows(runs, ["one", "two", "qlora"])
    assert head == ["run", "trained", "processes", "samples/s", "tokens/s", "final loss"]
    for row, run in zip(rows, runs, strict=True):
        cells = dict(zip(head, row, strict=True))
        assert cells["samples/s"] == f"{run.totals.samples_per_second:,.2f}"
        assert cells["tokens/s"] == f"{run.totals.tokens_per_second:,.0f}"
    figure = pictures.make_figure([], [head, *rows])
    said = [
        cell.get_text().get_text()
        for axes in figure.axes
        for table in axes.tables
        for cell in table.get_celld().values()
    ]
    assert sorted(said) == sorted(text for row in (head, *rows) for text in row)


@pytest.mark.parametrize("name", ["20261130-003844-SmolLM2-135M-Instruct-model_parallel", "n" * 200])
def test_long_names_lie_over_nothing_in_the_picture(name: str, three: list[RunDir]) -> None:
    """Those of runs that were given none are long."""
    runs, names = [load(run.path) for run in three], [f"{number}-{name}" for number in range(3)]
    charts = comparing.make_charts(runs, names)
    figure = pictures.make_figure([(chart.frame, chart.curves) for chart in charts], comparing.speed_rows(runs, names))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert legend.get_window_extent().x0 >= 0 and legend.get_window_extent().x1 <= figure.bbox.x1
    (table,) = figure.axes[-1].tables
    for line in range(len(runs) + 1):
        boxes = [table[line, column].get_text().get_window_extent() for column in range(6)]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
        assert boxes[0].x0 >= 0 and boxes[-1].x1 <= figure.bbox.x1


def test_command_prints_and_writes(three: list[RunDir], tmp_path: Path) -> None:
    output = tmp_path / "there" / "compare"
    result = CliRunner().invoke(cli.program, ["compare", *(str(run.path) for run in three), "--output", str(output)])
    assert result.exit_code == 0, result.output
    lines = dict(line.split(maxsplit=1) for line in result.output.splitlines() if line)
    assert lines["steps"].split() == ["125", "63", "63"]
    html = (output / "compare.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;4-bit&lt;/b&gt;" in html and "<b>4-bit" not in html
    assert html.count("<polyline") == 12
    png = (output / "compare.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    assert width > 1000 and height > 600


def test_without_matplotlib_the_page_is_there_and_the_picture_is_missed(
    three: list[RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparing, "have_matplotlib", lambda: False)
    comparing.compare([run.path for run in three], tmp_path)
    assert (tmp_path / "compare.html").exists() and not (tmp_path / "compare.png").exists()
    assert pictures.MISSING in capsys.readouterr().out


def test_a_folder_that_is_no_run_is_refused(three: list[RunDir], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run directory"):
        comparing.compare([three[0].path, tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused(three: list[RunDir], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        comparing.compare([three[0].path], tmp_path / "file")


def test_runs_of_one_name_are_told_apart(run_maker: Callable[..., RunDir], make_plan: Callable[..., Plan]) -> None:
    runs = [load(run_maker(f"{parent}/run", make_plan(1), 3).path) for parent in ("a", "b")]
    assert comparing.unique_names(runs) == ["run (a/run)", "run (b/run)"]
