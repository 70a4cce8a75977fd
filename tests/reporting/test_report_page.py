"""report.html: one file that needs nothing, whose numbers are those of report.json, of ended and of broken runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from parallel_tune.reporting.run_page import smooth, try_to_write_page, write_page
from parallel_tune.rundir import Outcome, RunDir
from strategies.contracts import Plan
from strategies.errors import ConfigError

VOID = {"meta", "br"}


class Page(HTMLParser):
    """The text and the elements of a page; a page whose tags do not pair is refused."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)
            if self.open[-1] in ("td", "th"):
                self.rows[-1][-1] += data

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.elements}


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_figures_are_those_of_the_report(run_maker: Callable[..., RunDir], make_plan: Callable[..., Plan]) -> None:
    run = run_maker("a run", make_plan(2, global_batch=16), 63)
    page = read(write_page(run.path))
    report = json.loads(run.report.read_text())
    for said in (
        f"{report['steps']}",
        f"{report['samples']:,}",
        f"{report['tokens']:,}",
        f"{report['tokens_per_second']:,.0f}",
        f"{report['final_loss']:.4f}",
        "predicted for the longest row trained, 431 tokens",
        "a replica needs 35.7 GiB a card at micro-batch 2 without checkpointing",
        "model_parallel: would fit, 12,240 tokens/s predicted against 15,800",
        "2.0e-4",
    ):
        assert said in page.texts, said
    memory = next(row for row in page.rows if row[0] == "1 H100 80GB HBM3" and len(row) == 9)
    assert memory[1:5] == ["35.70 GiB", "21.50 GiB", "21.70 GiB", "-0.9%"]  # in use
    assert memory[5:] == ["34.18 GiB", "20.10 GiB", "19.90 GiB", "+1.0%"]  # live tensors
    assert ["max_seq_length", "2048"] in page.rows
    assert any("torch 2.11.0+cu130" in text for text in page.texts)


def test_curves_hold_every_step(run_maker: Callable[..., RunDir], make_plan: Callable[..., Plan]) -> None:
    run = run_maker("short", make_plan(1), 12)
    page = read(write_page(run.path))
    lines = [attributes for name, attributes in page.elements if name == "polyline"]
    counts = [len((line["points"] or "").split()) for line in lines]
    # Loss by step and by epoch, each with one evaluation (before); learning rate; throughput and its prediction.
    assert counts == [12, 1, 12, 1, 12, 12, 2]
    heights = [float(point.split(",")[1]) for point in (lines[0]["points"] or "").split()]
    assert heights[-1] > heights[0]  # down on the page is a lower loss


def test_one_file_without_scripts_or_network(run_maker: Callable[..., RunDir], make_plan: Callable[..., Plan]) -> None:
    page = read(write_page(run_maker("a run", make_plan(2), 60).path))
    assert not page.names & {"script", "link", "img", "iframe", "object"}
    for _, attributes in page.elements:
        assert not {"src", "href"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    text = "".join(page.texts)
    assert "http://" not in text and "https://" not in text


def test_names_of_users_are_escaped(run_maker: Callable[..., RunDir], make_plan: Callable[..., Plan]) -> None:
    evil = "x<script>alert(1)</script>\"'&"
    run = run_maker("a run", make_plan(1), 5, model=f"me/{evil.replace('/', '')}", dataset=evil, run_name=evil)
    page = read(write_page(run.path))
    assert "script" not in page.names
    assert ["dataset", evil] in page.rows


def test_a_failed_run_is_shown_with_what_it_measured(
    run_maker: Callable[..., RunDir], make_plan: Callable[..., Plan]
) -> None:
    run = run_maker("failed", make_plan(2), 9, outcome=Outcome(1, "the loss is nan at step 9"))
    page = read(write_page(run.path))
    assert "failed: the loss is nan at step 9" in page.texts
    measured = {row[0]: row[7] for row in page.rows if len(row) == 9}
    assert measured["0 H100 80GB HBM3"] == "33.90 GiB"  # from the rows of metrics
    assert measured["1 H100 80GB HBM3"] == "–"  # which speak of the first process's device alone
    assert any("installed when this page was made" in text for text in page.texts)


def test_a_stopped_run_says_so(run_maker: Callable[..., RunDir], make_plan: Callable[..., Plan]) -> None:
    run = run_maker("stopped", make_plan(1), 9, outcome=Outcome(75, "stopped by a signal after step 9 of 20"))
    assert "stopped by a signal after step 9 of 20" in read(write_page(run.path)).texts


def test_a_run_without_a_step_has_no_page(
    run_maker: Callable[..., RunDir], make_plan: Callable[..., Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_maker("nothing", make_plan(1), 3)
    run.metrics.write_text('{"step": 0, "epoch": 0.0, "eval_loss": 2.0}\n')
    with pytest.raises(ConfigError, match="no training step"):
        write_page(run.path)
    try_to_write_page(run.path)
    assert capsys.readouterr().out == ""


def test_a_page_that_cannot_be_written_does_not_hide_the_run(
    run_maker: Callable[..., RunDir], make_plan: Callable[..., Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_maker("a run", make_plan(1), 3)
    run.report.write_text("{")
    try_to_write_page(run.path)
    assert "no report.html" in capsys.readouterr().err


def test_sums_go_over_all_parts_of_a_resumed_run(
    run_maker: Callable[..., RunDir], make_plan: Callable[..., Plan]
) -> None:
    run = run_maker("resumed", make_plan(1), 10)
    rows: list[dict[str, Any]] = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    again = [{**row, "loss": 0.5} for row in rows if row["step"] >= 8]
    with run.metrics.open("a") as file:
        file.write("torn\n" + "".join(json.dumps(row) + "\n" for row in again))
    page = read(write_page(run.path))
    assert f"{sum(row.get('tokens', 0) for row in rows):,}" in page.texts
    assert "0.5000" in page.texts


def test_smoothing_does_not_move_a_line() -> None:
    line = [(float(x), 3.0 * x) for x in range(30)]
    assert [x for x, _ in smooth(line, 7)] == [x for x, _ in line]
    assert [y for _, y in smooth(line, 7)] == pytest.approx([y for _, y in line])
