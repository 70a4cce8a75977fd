"""The real Unsloth package on its CPU backend, under every strategy, against the transformers engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from compared_runs import PACKED

from parallel_tune.config import make_config
from parallel_tune.engines.unsloth import UnslothEngine

LAYOUTS = {
    "single": ("--strategy=ddp", "--hardware=cpu:1"),
    "ddp": ("--strategy=ddp", "--hardware=cpu:2"),
    "split": ("--strategy=model_parallel", "--hardware=cpu:2"),
}


@pytest.fixture(scope="module")
def runs(tune: Any) -> dict[str, Any]:
    """A run of each layout, and one on packed rows; those of one process in turn."""
    unsloth = {name: ("--engine=unsloth", *options) for name, options in LAYOUTS.items()}
    single, split, packed = tune.in_turn(unsloth["single"], unsloth["split"], (*unsloth["single"], *PACKED))
    return {"single": single, "ddp": tune(*unsloth["ddp"]), "split": split, "packed": packed}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unsloth_trains_as_transformers_does(layout: str, runs: dict[str, Any], single_run: Any) -> None:
    run = runs[layout]
    assert run.report["engine"] == "unsloth"
    assert "unsloth" in run.report["versions"]
    assert run.losses == pytest.approx(single_run.losses, rel=1e-4)
    assert run.report["held_out_loss_after"] == pytest.approx(single_run.report["held_out_loss_after"], rel=1e-4)
    assert (run.run / "adapter" / "adapter_model.safetensors").exists()


def test_unsloth_trains_on_packed_rows_as_transformers_does(runs: dict[str, Any], packed_run: Any) -> None:
    assert runs["packed"].report["engine"] == "unsloth"
    assert runs["packed"].losses == pytest.approx(packed_run.losses, rel=1e-4)


@pytest.mark.parametrize(("path", "set_to"), [("plain", "1"), ("fused", None), ("auto", None)])
def test_a_plain_loss_is_asked_of_unsloth(path: str, set_to: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward reads this variable; the losses of a run are the same either way."""
    monkeypatch.delenv("UNSLOTH_RETURN_LOGITS", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    seen: list[str | None] = []

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(**_: Any) -> tuple[Any, Any]:
            seen.append(os.environ.get("UNSLOTH_RETURN_LOGITS"))
            return None, SimpleNamespace(pad_token_id=0)

    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=FastLanguageModel))
    plan: Any = SimpleNamespace(captured=False, padding_free=False, gradient_checkpointing="none")
    session: Any = SimpleNamespace(device_map=dict)
    UnslothEngine().load(make_config({"cross_entropy": path}), plan, session, None)
    assert seen == [set_to]


SPLIT = """
import unsloth
from types import SimpleNamespace
import torch
from unsloth.kernels import qk_norm_rope, rope_embedding
from parallel_tune.config import make_config
from parallel_tune.engines.unsloth import UnslothEngine

waits = []
# As on a machine with two GPUs that has seen a split model.
rope_embedding.DEVICE_COUNT, rope_embedding._UNREGISTERED_SPLIT_SEEN = 2, True
rope_embedding.torch_device_stream = lambda device: SimpleNamespace(synchronize=lambda: waits.append(device))
unsloth.FastLanguageModel.from_pretrained = lambda **_: (None, SimpleNamespace(pad_token_id=0))
plan = SimpleNamespace(captured=False, padding_free=False, gradient_checkpointing="none")
for devices in ((0, 0), (0, 1)):
    session = SimpleNamespace(device_map=lambda: dict(zip(("model.layers.0", "lm_head"), devices)))
    UnslothEngine().load(make_config({}), plan, session, None)
    waits.clear()
    rope_embedding.inplace_rope_embedding(*torch.ones(4, 1, 1, 1, 4), None)
    qk_norm_rope._sync_if_split(torch.ones(1))
    print(devices, len(waits))
"""


def test_a_split_model_waits_for_no_device() -> None:
    """Unsloth waits in each layer's rotary embedding: lanes would stand still together, no stage could be captured."""
    done = subprocess.run([sys.executable, "-c", SPLIT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["(0, 0) 2", "(0, 1) 0"]


EARLY = """
import sys
from strategies.ddp import DDP

class Early(DDP):
    name = "early"
    auto_order = 130

    def open(self, plan, timeout_seconds):
        print("already imported:", sorted({"unsloth", "trl", "transformers", "peft"} & set(sys.modules)))
        return super().open(plan, timeout_seconds)
"""


def test_the_strategy_takes_its_device_before_unsloth_is_imported(tune: Any, package: Any, tmp_path: Path) -> None:
    """Unsloth's import uses the current GPU: a rank whose own is not yet chosen would leave a context on the first."""
    env = package(tmp_path, "early = other:Early", EARLY)
    run = tune("--engine=unsloth", "--strategy=early", "--hardware=cpu:1", "--max_steps=1", env=env)
    assert "already imported: []" in (run.run / "logs" / "rank-0.log").read_text()
