"""The guard's choice of a map, and what a script learns of its placement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import parallel_tune
from parallel_tune.script_guard import Refused, choose_map
from parallel_tune.script_placement import Placement

REPLICA = Placement("ddp", rank=1, world_size=2, local_rank=1, device_map={"": 1})
SPLIT = Placement("model_parallel", device_map={"model.embed_tokens": 0, "lm_head": 1})
ON_CPU = Placement("ddp", rank=1, world_size=2, local_rank=1)


@pytest.mark.parametrize(
    ("placement", "asked", "model", "chosen"),
    [
        (REPLICA, None, "m", {"": 1}),
        (REPLICA, {"": 1}, "m", {"": 1}),
        (REPLICA, "cuda:1", "m", "cuda:1"),
        (REPLICA, {"": "cuda:1"}, "m", {"": "cuda:1"}),
        (REPLICA, {"": 0}, "m", {"": 1}),
        (REPLICA, {"": "cuda:0"}, "m", {"": 1}),
        (REPLICA, 0, "m", {"": 1}),
        (REPLICA, "cuda:0", "m", {"": 1}),
        (REPLICA, "cuda", "m", "cuda"),
        (REPLICA, "cpu", "m", "cpu"),
        (REPLICA, {"": "cpu"}, "m", {"": "cpu"}),
        (ON_CPU, {"": 0}, "m", {"": 0}),
        (ON_CPU, None, "m", None),
        (SPLIT, None, "m", SPLIT.device_map),
        (SPLIT, None, "another", None),
        (SPLIT, "auto", "m", SPLIT.device_map),
        (SPLIT, {"": 0}, "m", SPLIT.device_map),
        (SPLIT, {"a": 1, "b": 0}, "m", {"a": 1, "b": 0}),
        (Placement("none"), None, "m", None),
    ],
)
def test_the_map_that_a_model_is_loaded_with(placement: Placement, asked: object, model: str, chosen: object) -> None:
    assert choose_map(asked, model, "train.py:1", placement, "m") == chosen


@pytest.mark.parametrize("asked", ["auto", "balanced", {"a": 0, "b": 1}])
def test_a_split_under_ddp_is_refused_past_a_scripts_own_handlers(asked: object) -> None:
    with pytest.raises(Refused, match="4") as raised:
        choose_map(asked, "m", "train.py:7", REPLICA, None)
    assert raised.value.code == 4
    assert raised.value.message.startswith("train.py:7: device_map=")
    assert not isinstance(raised.value, Exception)


def test_without_a_launch_a_script_is_a_plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PARALLEL_TUNE_PLAN", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert parallel_tune.placement() == Placement("none")


def test_cards_are_counted_as_the_process_sees_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [{"index": 2, "kind": "cuda"}, {"index": 5, "kind": "cuda"}]
    plan = {"strategy": "model_parallel", "devices": devices, "device_map": {"a": 5, "b": 2}, "micro_batch": 3}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    monkeypatch.setenv("PARALLEL_TUNE_PLAN", str(path))
    here = parallel_tune.placement()
    assert (here.device_map, here.micro_batch, here.gradient_accumulation_steps) == ({"a": 1, "b": 0}, 3, None)


def test_a_plan_that_is_gone_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLEL_TUNE_PLAN", str(tmp_path / "none.json"))
    with pytest.raises(RuntimeError, match="PARALLEL_TUNE_PLAN="):
        parallel_tune.placement()
