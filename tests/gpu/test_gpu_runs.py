"""Whole runs on one GPU, by either engine and every method: strategies agree, a resume goes on, exports load."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel_tune.engines import installed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("default"),
]
DATASET = Path(__file__).parents[2] / "examples" / "short_answers.jsonl"
METHODS = {"lora": (), "4bit": ("--load_in_4bit",), "full": ("--full_finetuning", "--learning_rate=1e-5")}
BASE = (
    f"--dataset={DATASET}", "--max_seq_length=256", "--global_batch_size=8", "--per_device_train_batch_size=2",
    "--max_steps=6", "--warmup_steps=0", "--val_size=8", "--max_devices=1", "--learning_rate=5e-3",
)  # fmt: skip


def cut_at_3(run: Path, to: Path) -> Path:
    """A run of six steps as it would be, had it been killed after its third."""
    shutil.copytree(run, to)
    for name in ("checkpoint-6", "adapter"):
        shutil.rmtree(to / name)
    return to


def needs(engine: str, method: str = "lora") -> None:
    packages = [*(["unsloth"] if engine == "unsloth" else []), *(["bitsandbytes"] if method == "4bit" else [])]
    if missing := [name for name in packages if not installed(name)]:
        pytest.skip(f"needs {' and '.join(missing)}")


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
def test_a_replica_and_a_split_train_alike(
    engine: str, method: str, tune: Any, shape: Callable[[str], Path], tmp_path: Path
) -> None:
    needs(engine, method)
    options = (f"--model={shape('llama-1b')}", f"--engine={engine}", *BASE, *METHODS[method])
    replica = tune(tmp_path / "replica", "--strategy=ddp", *options)
    split = tune(tmp_path / "split", "--strategy=model_parallel", "--stages=2", *options)
    print(engine, method, replica.losses, split.losses, replica.report["devices"], split.report["devices"])
    assert replica.report["engine"] == split.report["engine"] == engine
    assert [row["samples"] for row in replica.rows] == [row["samples"] for row in split.rows]
    # bfloat16 rounds in another order; steps at this rate carry the difference on.
    assert split.losses[0] == pytest.approx(replica.losses[0], rel=1e-3)
    assert split.losses == pytest.approx(replica.losses, rel=2e-2)
    for run in (replica, split):
        assert run.report["held_out_loss_after"] < run.report["held_out_loss_before"]


@pytest.mark.parametrize("capture", ["off", "on"])
@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
def test_a_split_over_two_gpus_holds_what_was_planned_and_trains_as_one(
    engine: str, capture: str, tune: Any, shape: Callable[[str], Path], tmp_path: Path
) -> None:
    """On two GPUs a model is dispatched while it loads: what the engine then sets on its layers must outlive that."""
    needs(engine)
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    options = (f"--model={shape('llama-1b')}", f"--engine={engine}", *BASE, "--use_gradient_checkpointing=none")
    replica = tune(tmp_path / "replica", "--strategy=ddp", "--capture=off", *options)
    split = tune(
        tmp_path / "split", *options, "--strategy=model_parallel", "--max_devices=2", "--pipeline=on",
        f"--capture={capture}",
    )  # fmt: skip
    print(engine, capture, replica.losses, split.losses, split.report)
    assert (split.report["lanes"], split.report["lanes_reason"]) == (2, None)
    if capture == "on":
        assert split.report["captured"]["reason"] is None
        assert split.report["captured"]["replayed_elements"] > 0
    assert split.losses[0] == pytest.approx(replica.losses[0], rel=1e-3)
    assert split.losses == pytest.approx(replica.losses, rel=2e-2)
    for device in split.report["devices"]:
        assert device["allocated_peak_bytes"] == pytest.approx(device["predicted_allocated_bytes"], rel=0.05)
        assert device["used_peak_bytes"] == pytest.approx(device["predicted_peak_bytes"], rel=0.1)


@pytest.mark.parametrize("family", ["qwen3-1b", "gemma3-1b"])
@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
def test_other_families_train_by_auto(
    engine: str, family: str, tune: Any, shape: Callable[[str], Path], tmp_path: Path
) -> None:
    needs(engine)
    run = tune(tmp_path / "run", "--strategy=auto", f"--model={shape(family)}", f"--engine={engine}", *BASE)
    print(engine, family, run.losses, run.report["devices"])
    assert run.report["strategy"] == "ddp"
    assert run.report["held_out_loss_after"] < run.report["held_out_loss_before"]


@pytest.mark.parametrize("strategy", ["ddp", "model_parallel"])
@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
def test_a_run_goes_on_and_its_exports_load_in_plain_peft(
    engine: str, strategy: str, tune: Any, shape: Callable[[str], Path], tmp_path: Path
) -> None:
    needs(engine)
    model = shape("llama-1b")
    split = ("--stages=2",) if strategy == "model_parallel" else ()
    options = (f"--model={model}", f"--engine={engine}", f"--strategy={strategy}", *split, *BASE)
    whole = tune(tmp_path / "whole", *options, "--save_steps=3")
    again = cut_at_3(whole.path, tmp_path / "again")
    resumed = tune(again, verb="resume")
    print(engine, strategy, whole.losses, resumed.losses)
    assert [row["step"] for row in resumed.rows][-3:] == [4, 5, 6]
    assert resumed.losses[-3:] == pytest.approx(whole.losses[-3:], rel=1e-2)

    tune(whole.path, "--save_method=merged_16bit", f"--save_path={tmp_path / 'merged'}", verb="export")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def logits(network: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = network.to("cuda").eval()(torch.arange(3, 99, device="cuda")[None]).logits.float()
        return found

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    base = logits(plain)
    adapted = logits(PeftModel.from_pretrained(plain, str(whole.path / "adapter")))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16))
    moved, off = (adapted - base).norm(), (merged - adapted).norm()
    print(f"adapter moves logits by {moved / base.norm():.2%}, merging by {off / base.norm():.2%}")
    assert off < moved / 4


@pytest.mark.parametrize("changes", ["--max_devices=1", "--strategy=model_parallel"], ids=["one-card", "split"])
@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
def test_a_run_on_two_cards_goes_on_otherwise(
    engine: str, changes: str, tune: Any, shape: Callable[[str], Path], tmp_path: Path
) -> None:
    needs(engine)
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    batching = [option for option in BASE if "max_devices" not in option]
    options = (f"--model={shape('llama-1b')}", f"--engine={engine}", *batching, "--strategy=ddp", "--capture=off")
    whole = tune(tmp_path / "whole", *options, "--save_steps=3")
    again = cut_at_3(whole.path, tmp_path / "again")
    resumed = tune(again, changes, verb="resume")
    print(engine, changes, whole.losses, resumed.losses)
    assert (whole.report["world_size"], resumed.report["world_size"]) == (2, 1)
    assert [row["step"] for row in resumed.rows][-3:] == [4, 5, 6]
    assert [row["samples"] for row in resumed.rows][-3:] == [row["samples"] for row in whole.rows][-3:]
    # bfloat16 rounds in another order.
    assert resumed.losses[-3:] == pytest.approx(whole.losses[-3:], rel=2e-2)
