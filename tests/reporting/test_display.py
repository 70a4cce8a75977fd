"""The display follows metrics.jsonl, shows what is in it, and never ends a run."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from parallel_tune import display as displays
from parallel_tune.display import Display, PlainLines, format_row, open_display, status_lines
from parallel_tune.gauges import Reading, nvml_gauge, open_gauge
from parallel_tune.live import LivePanel, spark
from parallel_tune.progress import MetricsFollower, Progress
from parallel_tune.rundir import RunDir
from strategies.contracts import DevicePlan, Plan

GIB = 2**30
ROW: dict[str, Any] = {
    "step": 10,
    "max_steps": 50,
    "epoch": 0.5,
    "loss": 1.25,
    "learning_rate": 1e-4,
    "tokens": 9_000,
    "samples": 40,
    "seconds": 10.0,
    "tokens_per_second": 900.0,
}


def test_follower_gives_whole_new_rows_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    follower = MetricsFollower(path)
    assert follower.poll() == []  # what was there before is another part of the run
    with path.open("a") as file:
        file.write('{"step": 2, "note": "é"}\n{"torn\n{"step": 3}\n{"ste')
    assert [row["step"] for row in follower.poll()] == [2, 3]
    with path.open("a") as file:
        file.write('p": 4}\n')
    assert follower.poll() == [{"step": 4}]
    assert MetricsFollower(tmp_path / "none").poll() == []


def test_time_left_counts_the_steps_that_a_row_stands_for() -> None:
    # 40 samples at a global batch of 8 are 5 steps in 10 seconds; 40 steps are left.
    assert "1:20 left" in format_row(ROW, global_batch=8)
    progress = Progress(8)
    progress.add(ROW)
    assert progress.seconds_left == pytest.approx(80.0)
    assert progress.tokens_per_second == pytest.approx(900.0)


def panel(plan: Plan, readings: list[Reading | None]) -> tuple[LivePanel, Console]:
    console = Console(file=io.StringIO(), width=110, force_terminal=True, color_system=None)
    return LivePanel(plan, console, lambda: readings, clock=lambda: 0.0), console


def drawn(shown: LivePanel, console: Console) -> list[str]:
    with console.capture() as capture:
        console.print(shown.render())
    return capture.get().splitlines()


def test_panel_shows_training_and_devices(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(2)
    shown, console = panel(plan, [Reading(34 * GIB, 0.97), Reading(38 * GIB, 0.5)])
    shown.show([])
    assert "loading model and data, 0:00" in drawn(shown, console)[1]
    shown.show([{"step": 0, "epoch": 0.0, "eval_loss": 2.0}, ROW])
    lines = drawn(shown, console)
    assert "step 10/50" in lines[1] and "epoch 0.50, 1:20 left" in lines[1]
    assert "loss 1.2500" in lines[2] and "held out 2.0000" in lines[2] and "900 tok/s" in lines[2]
    first, second = lines[4:6]
    assert first.split()[-5:] == ["34.0", "34.0", "35.7", "79.6", "97%"]
    assert second.split()[-5:] == ["38.0", "38.0", "35.7", "79.6", "50%"]
    assert first.index("|") == second.index("|")  # one prediction
    assert first.index("|") > first.rindex("█") and second.index("|") < second.rindex("█")
    assert max(map(len, lines)) <= 110


def test_panel_without_readings(make_plan: Callable[..., Plan]) -> None:
    shown, console = panel(make_plan(2), [None, None])
    shown.show([])
    assert drawn(shown, console)[-2].split()[-5:] == ["-", "-", "35.7", "79.6", "-"]


@pytest.mark.parametrize(("width", "gone"), [(110, ()), (80, ()), (60, ("lr",)), (40, ("lr", "held out"))])
def test_the_panel_keeps_its_lines_in_narrow_windows(width: int, gone: tuple[str, ...], make_plan: Any) -> None:
    shown, _ = panel(make_plan(2), [None, None])
    shown.show([{"step": 0, "epoch": 0.0, "eval_loss": 2.0}, *[{**ROW, "step": step} for step in range(1, 40)]])
    lines = drawn(shown, Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None))
    loss = next(line for line in lines if line.startswith("loss"))
    assert "tok/s" in loss
    for part in ("lr", "held out"):
        assert (part in loss) == (part not in gone)
    assert sum(line.startswith(("step", "loss")) for line in lines) == 2
    assert max(map(len, lines)) <= width


def test_spark_falls_with_the_loss() -> None:
    assert spark([float(value) for value in range(8, 0, -1)]) == "█▇▆▅▄▃▂▁"
    assert len(spark([1.0] * 500)) == 24


class Broken:
    """A view that fails as soon as there is something to show."""

    def __init__(self) -> None:
        self.stopped = False

    def start(self) -> None:
        pass

    def show(self, rows: list[dict[str, Any]]) -> None:
        raise ZeroDivisionError("of the display")

    def stop(self) -> None:
        self.stopped = True


def test_an_error_of_the_display_is_said_once_and_ends_only_the_display(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    view = Broken()
    display = Display(MetricsFollower(tmp_path / "metrics.jsonl"), view)
    display.poll()
    display.poll()
    display.close()
    assert view.stopped
    assert capsys.readouterr().err == "no more display: ZeroDivisionError: of the display; the run goes on\n"


def test_a_closed_pipe_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: Any, **__: Any) -> None:
        raise BrokenPipeError

    display = Display(MetricsFollower(tmp_path / "metrics.jsonl"), PlainLines(8))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
    monkeypatch.setattr(displays.click, "echo", closed)
    display.poll()
    display.close()


def cpu_plan(plan: Plan) -> Plan:
    from dataclasses import replace

    devices: tuple[DevicePlan, ...] = tuple(replace(device, kind="cpu", name="CPU") for device in plan.devices)
    return replace(plan, devices=devices)


def test_plain_lines_where_there_is_no_terminal(
    run_maker: Callable[..., RunDir], make_plan: Callable[..., Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = cpu_plan(make_plan(1))
    run = run_maker("a run", plan, 3)
    with open_display(plan, run) as display:
        with run.metrics.open("a") as file:
            file.write(json.dumps(ROW) + "\n")
        display.poll()
    assert capsys.readouterr().out == format_row(ROW, plan.global_batch) + "\n"


def test_workers_of_a_cpu_run_are_read(run_maker: Callable[..., RunDir], make_plan: Callable[..., Plan]) -> None:
    plan = cpu_plan(make_plan(2))
    run = run_maker("a run", plan, 3)
    gauge = open_gauge(plan, run, {})
    assert gauge() == [None, None]
    run.process_id(0).write_text(str(os.getpid()))
    first, second = gauge()
    assert first is not None and first.used_bytes > 10 * 2**20 and 0 <= first.busy_share <= 1
    assert second is None
    split = cpu_plan(make_plan(2, "model_parallel"))
    assert open_gauge(split, run, {})() == [None, None]


class FakeNvml:
    """As much of pynvml as the gauge uses: a driver that knows the second form of memory figures, or not."""

    nvmlMemory_v2 = 2  # noqa: N815

    class NVMLError(Exception):
        pass

    class Figures:
        def __init__(self, **values: int) -> None:
            self.__dict__.update(values)

    def __init__(self, second_form: bool) -> None:
        self._second_form = second_form

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str, version: int | None = None) -> Any:  # noqa: N802
        if handle == "GPU-lost" or (version is not None and not self._second_form):
            raise self.NVMLError
        return self.Figures(used=5 * GIB if version else 6 * GIB)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:  # noqa: N802
        return self.Figures(gpu=88)


@pytest.mark.parametrize(("second_form", "used"), [(True, 5 * GIB), (False, 6 * GIB)])
def test_gpus_are_read_by_identity(second_form: bool, used: int) -> None:
    gauge = nvml_gauge(FakeNvml(second_form), ["GPU-a", "GPU-lost"])
    assert gauge() == [Reading(used, 0.88), None]


def test_status_before_the_start(make_plan: Callable[..., Plan]) -> None:
    assert status_lines(make_plan(2), [Reading(GIB, 0.03), None]) == [
        "GPU 0 NVIDIA H100 80GB HBM3: 1.00 GiB of 79.65 GiB in use, 3% busy; 35.70 GiB predicted"
    ]
