"""The benchmark of splits runs in small, goes on where it stopped, and draws its schedules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def benchmark(load_benchmark: Any) -> Any:
    return load_benchmark("split_speed")


def test_the_benchmark_runs_small_goes_on_and_draws(benchmark: Any, tmp_path: Path, capsys: Any) -> None:
    command = ["--small", "--steps=4", "--warm_up=2", f"--results={tmp_path}"]
    written = benchmark.main(command)
    assert written == tmp_path / "split_speed.cpu.json"
    record = json.loads(written.read_text())
    assert {"name", "hardware", "versions", "date", "command", "rows", "figures"} <= record.keys()
    plan, naive, lanes = record["rows"]
    assert {plan["auto"]["strategy"], plan["split"]["strategy"]} == {"ddp", "model_parallel"}
    assert (naive["way"], naive["lanes"], lanes["way"], lanes["lanes"]) == ("naive", 1, "lanes", 2)
    for row in (naive, lanes):
        assert row["cuts"] == [0, 1]
        assert len(row["losses"]) == len(row["seconds"]) == 4
        assert {segment["stage"] for segment in row["timeline"]} == {0, 1}
        assert row["stage_times_share"] == pytest.approx(sum(row["stage_seconds"]) / row["step_seconds"])
    found = record["figures"]["tiny:transformers:4"]["lanes"]
    assert found["bound"] == 1.6
    assert found["speedup"] == pytest.approx(naive["step_seconds"] / lanes["step_seconds"])
    assert found["losses_apart"] < 1e-5

    # The same command once more has nothing left to do.
    benchmark.main([*command, "--go_on", "--seconds=0"])
    assert json.loads(written.read_text())["rows"] == record["rows"]
    # Nor has one that is to make runs of which there are none.
    assert not benchmark.main(["--small", "--only=ddp,single", f"--results={tmp_path / 'none'}"]).exists()

    capsys.readouterr()
    assert benchmark.main([f"--picture={written}"]) == written
    picture = Path(capsys.readouterr().out.strip())
    assert picture == tmp_path / "split_speed.cpu.tiny-transformers-4.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_case_says_what_its_runs_are_given(benchmark: Any) -> None:
    options = benchmark.parse(["--cases=llama-8b:unsloth:12,llama-70b-nf4:transformers:8:tokens=512:ballast=76"])
    first, second = options.cases
    assert (first.tokens, first.ballast_gib) == (2048, 0.0)
    assert "--load_in_4bit" not in first.options()
    assert second.ballast_gib == 76.0
    assert second.options() == [
        "--engine=transformers", "--global_batch_size=8", "--per_device_train_batch_size=1", "--max_seq_length=512",
        "--use_gradient_checkpointing=none", "--load_in_4bit",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cases=llama-8b:unsloth:12:length=9"], "length is none of tokens, checkpointing, ballast"),
        (["--ways=naive,fast"], "fast: none of naive"),
        (["--steps=3"], "leaves nothing after 3 steps"),
    ],
)
def test_what_cannot_be_measured_is_refused(benchmark: Any, arguments: list[str], said: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse(arguments)
    assert said in capsys.readouterr().err


def test_lanes_count_only_against_a_naive_run_that_wastes_no_time(load_benchmark: Any) -> None:
    figures = load_benchmark("split_figures").figures
    same = {"case": "a", "cuts": [0, 18], "micro_batches": 12}

    def row(way: str, seconds: float, share: float, losses: list[float]) -> dict[str, Any]:
        stages = {"stage_times_share": share, "stage_seconds": [share, share * seconds - share]}
        return {**same, "way": way, "step_seconds": seconds, "losses": losses, **stages}

    rows = [
        {"what": "a-plan", "case": "a"},
        row("naive", 3.0, 0.99, [2.0, 1.0]),
        row("lanes", 2.0, 0.9, [2.0, 1.1]),
        row("captured-naive", 2.0, 0.9, [2.0, 1.0]),
        row("captured-lanes", 1.5, 0.9, [2.0, 1.0]),
        {"case": "b", "way": "naive", "failed": "no room"},
    ]
    found = figures(rows)
    assert found["a"]["lanes"]["speedup"] == 1.5
    assert found["a"]["lanes"]["bound"] == pytest.approx(24 / 13)
    assert found["a"]["lanes"]["share_of_bound"] == pytest.approx(1.5 * 13 / 24)
    # Stages of 2.97 s in a row, and of 1.8 s in lanes.
    assert found["a"]["lanes"]["stages_slower"] == pytest.approx(1.8 / 2.97 - 1)
    assert found["a"]["lanes"]["share_of_bound_but_for_that"] == pytest.approx(1.5 * 13 / 24 * 1.8 / 2.97)
    assert found["a"]["lanes"]["losses_apart"] == pytest.approx(0.1)
    assert found["a"]["lanes"]["counts"] is True
    assert found["a"]["captured-lanes"]["counts"] is False
    assert found["a"]["captured_lanes_over_naive"] == 2.0
    assert found["b"] == {}


def test_a_ballast_that_cannot_be_held_is_a_failed_row(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    written = benchmark.main(["--small", "--ballast=1", f"--results={tmp_path}"])
    (row,) = json.loads(written.read_text())["rows"]
    assert "1.0 GiB of each card cannot be held" in row["failed"]
    assert "there is no GPU" in row["failed"]
