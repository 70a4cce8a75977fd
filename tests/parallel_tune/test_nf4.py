"""4-bit weights on the CPU: both strategies hold them, and train alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parallel_tune.config import make_config
from parallel_tune.decision import decide, find_hardware
from strategies.errors import ConfigError

NF4 = ("--load_in_4bit", "--hardware=cpu:2", "--max_steps=8")


@pytest.fixture(scope="module")
def split_runs(tune: Any, quantised_model: Path) -> dict[str, Any]:
    """Runs of model_parallel: one to hold against ddp, and a short one of each engine and origin of the weights."""
    options = {"nf4": (*NF4, "--strategy=model_parallel")}
    for engine in ("transformers", "unsloth"):
        short = (f"--engine={engine}", "--hardware=cpu:2", "--strategy=model_parallel", "--max_steps=3")
        options |= {f"{engine} loads": (*short, "--load_in_4bit")}
        options |= {f"{engine} saved": (*short, f"--model={quantised_model}")}
    names = sorted(options, key=lambda name: name.startswith("unsloth"))
    runs = {}
    for alike in (names[:3], names[3:]):  # Unsloth changes what is imported after it
        runs |= zip(alike, tune.in_turn(*(options[name] for name in alike)), strict=True)
    return runs


def test_nf4_trains_alike_under_both_strategies(tune: Any, split_runs: dict[str, Any], single_run: Any) -> None:
    ddp, split = tune(*NF4, "--strategy=ddp"), split_runs["nf4"]
    assert len(ddp.losses) == len(split.losses) == 8
    assert split.losses == pytest.approx(ddp.losses, rel=1e-4)
    assert ddp.losses[-1] < ddp.losses[0] - 0.1
    before = [run.report["held_out_loss_before"] for run in (ddp, split)]
    assert before[0] == pytest.approx(before[1], rel=1e-5)
    # Quantised indeed: the untouched model's held-out loss is another one.
    assert abs(single_run.report["held_out_loss_before"] - before[0]) > 1e-4


@pytest.fixture(scope="module")
def quantised_model(tied_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tied model as transformers saves it once it is quantised."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from parallel_tune.engines.transformers import nf4

    folder = tmp_path_factory.mktemp("quantised") / "model"
    model: Any = AutoModelForCausalLM.from_pretrained(
        tied_model, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=nf4(torch.float32)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tied_model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
def test_a_model_saved_in_nf4_trains_as_one_that_is_quantised_while_it_loads(
    engine: str, split_runs: dict[str, Any]
) -> None:
    while_loading, saved = split_runs[f"{engine} loads"], split_runs[f"{engine} saved"]
    assert len(saved.losses) == 3
    assert saved.losses == pytest.approx(while_loading.losses, rel=1e-4)


@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
def test_a_model_saved_in_nf4_is_planned_in_4_bit(engine: str, tied_model: Path, quantised_model: Path) -> None:
    def peaks(model: Path, **options: Any) -> list[int]:
        config = make_config({"model": str(model), "engine": engine, "hardware": "1xH100-80GB", **options})
        return [device.predicted_peak_bytes for device in decide(config, find_hardware(config), "never")[0].devices]

    assert peaks(quantised_model) == peaks(tied_model, load_in_4bit=True) == peaks(quantised_model, load_in_4bit=True)
    assert peaks(quantised_model) != peaks(tied_model)


def test_weights_saved_in_nf4_cannot_be_trained_themselves(quantised_model: Path) -> None:
    config = make_config({"model": str(quantised_model), "full_finetuning": True, "hardware": "1xH100-80GB"})
    with pytest.raises(ConfigError, match="holds its weights in 4 bit"):
        decide(config, find_hardware(config), "never")
