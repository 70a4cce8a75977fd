"""4-bit weights on the CPU: both strategies hold them, and train alike; LoftQ's adapters begin as a correction of the
rounding, and merging takes that into account."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

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


@pytest.fixture(scope="module")
def replicas(tune: Any, tiny_model: Path, rows_file: Path) -> dict[str, Any]:
    """Runs of ddp: one to hold against model_parallel; and one step at a rate of nearly nothing, on weights that are
    rounded, without LoftQ's correction and with it."""
    ddp = (*NF4, "--strategy=ddp")
    data = (f"--model={tiny_model}", f"--dataset={rows_file}", "--val_size=20", "--max_seq_length=64")
    still = (*ddp, *data, "--max_steps=1", "--learning_rate=1e-12", "--r=32", "--lora_alpha=8", "--use_rslora")
    nf4, rounded, corrected = tune.in_turn(ddp, still, (*still, "--loftq_config={}"))
    return {"nf4": nf4, "rounded": rounded, "corrected": corrected}


def test_nf4_trains_alike_under_both_strategies(
    replicas: dict[str, Any], split_runs: dict[str, Any], single_run: Any
) -> None:
    ddp, split = replicas["nf4"], split_runs["nf4"]
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


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"), ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes in 8 bit"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"trace": True}])
def test_weights_quantised_otherwise_are_refused(
    saved: dict[str, Any], said: str, options: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    """They were planned as if they lay there in 16 bit, and failed in a library once the processes had started."""
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": saved}))
    wanted = make_config({"model": str(tmp_path), "hardware": "1xH100-80GB", **options})
    with pytest.raises(ConfigError, match=f"quantised by {said}") as raised:
        decide(wanted, find_hardware(wanted), "never")
    assert "--load_in_4bit" in raised.value.hint


def test_the_correction_brings_back_most_of_what_rounding_took(replicas: dict[str, Any], tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    from parallel_tune.engines.transformers import nf4

    whole = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    rounded = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, quantization_config=nf4(torch.float32), device_map={"": "cpu"}
    )
    from peft import PeftModel

    corrected = PeftModel.from_pretrained(rounded, replicas["corrected"].run / "adapter").eval()
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        wanted, with_it = whole(ids).logits, corrected(ids).logits
        with corrected.disable_adapter():
            without = corrected(ids).logits
    assert (with_it - wanted).norm() < 0.6 * (without - wanted).norm()
    assert replicas["corrected"].report["held_out_loss_before"] != replicas["rounded"].report["held_out_loss_before"]


def test_a_merged_model_is_not_corrected_twice(replicas: dict[str, Any], tune: Any, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    run = replicas["corrected"].run
    tune("export", str(run), "--save_method=merged_16bit", f"--save_path={run / 'merged'}", base=False)
    name = "model.layers.2.mlp.down_proj.weight"
    merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32).state_dict()[name]
    whole = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).state_dict()[name]
    import bitsandbytes as bnb

    held, state = bnb.functional.quantize_4bit(whole, quant_type="nf4", compress_statistics=True)
    rounded = bnb.functional.dequantize_4bit(held, state)
    # With half of the rank, more than half of the rounding error is gone, and 16 bits add nearly nothing.
    assert (merged - whole).norm() < 0.6 * (rounded - whole).norm()


def test_without_the_unrounded_weights_it_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from parallel_tune.engines.loftq import UnroundedWeights

    (tmp_path / "config.json").write_text("{}")
    save_file({"a.weight": torch.zeros(4, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    weights = UnroundedWeights(str(tmp_path))
    for name in ("a.weight", "b.weight"):
        with pytest.raises(ConfigError, match=name):
            weights.get(name)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    save_file({"a.weight": torch.ones(4)}, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert UnroundedWeights(str(tmp_path)).get("a.weight").tolist() == [1.0] * 4
