"""Captured stages on GPUs: gradients of eager lanes, up to the noise that these have against themselves.

Both stages on one GPU wherever there is one; on two as well where there are two. Run it with `pytest -m gpu -s`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor

from parallel_tune.data import fill_up, join
from parallel_tune.row_arguments import model_arguments, with_boundaries_on
from parallel_tune.row_attention import use_row_attention
from strategies.pipeline import Lanes
from strategies.stage_capture import StageCapture
from strategies.stage_graphs import StageGraphs
from strategies.stages import Stages, split

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    # Warnings of the libraries at work on GPUs are not what is tested here.
    pytest.mark.filterwarnings("default"),
]
ROOT = Path(__file__).parents[2]
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000, "max_position_embeddings": 2048}  # fmt: skip
Gradients = dict[str, Tensor]


def places(name: str) -> list[torch.device]:
    """Two stages on one GPU, on two, or three on two."""
    ordinals = {"one": (0, 0), "two": (0, 1), "three on two": (0, 1, 0)}[name]
    if torch.cuda.device_count() <= max(ordinals):
        pytest.skip("needs two GPUs")
    return [torch.device("cuda", ordinal) for ordinal in ordinals]


def build(kind: str, device: torch.device, path: Path) -> Any:
    """A random Llama in bf16: "bf16" or "4bit" with float32 adapters, "tied" with all weights trained."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=kind == "tied")
    with device:
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if kind == "4bit":
        pytest.importorskip("bitsandbytes")
        model.save_pretrained(path)
        quantized = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, quantization_config=quantized, device_map={"": device}, dtype=torch.bfloat16
        )
    if kind != "tied":
        model.requires_grad_(False)
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    use_row_attention(model)
    return model.train()


@pytest.fixture
def stages_of(tmp_path: Path) -> Iterator[Callable[[str, str], Stages]]:
    made: list[Stages] = []

    def make(kind: str, where: str) -> Stages:
        devices = places(where)
        cuts = [SIZES["num_hidden_layers"] * stage // len(devices) for stage in range(len(devices))]
        made.append(split(build(kind, devices[0], tmp_path), cuts, devices))
        return made[-1]

    yield make
    for stages in made:
        stages.undo()


def batches(devices: Sequence[torch.device], count: int, sizes: Sequence[int] = (128, 192)) -> list[dict[str, Tensor]]:
    """Joined rows at fixed sizes, as captured runs have them."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for index in range(count):
        size = sizes[index % len(sizes)]
        lengths = [size // 2 - index, size // 3]
        ids = [torch.randint(3, SIZES["vocab_size"], (length,), generator=generator).tolist() for length in lengths]
        rows: Any = [{"input_ids": each, "labels": each} for each in ids]
        tensors = {name: value.to(devices[0]) for name, value in fill_up(join(rows, 0), 0, size, 3).items()}
        tensors = with_boundaries_on(tensors, list(dict.fromkeys(devices)))
        made.append(
            {
                **tensors,
                "labels": tensors["labels"].to(devices[-1]),
                "num_items_in_batch": torch.tensor(float(count * 100), device=devices[-1]),
            }
        )
    return made


def forward_of(model: Any) -> Callable[[int, Any], Tensor]:
    def forward(_: int, batch: Any) -> Tensor:
        arguments, keep_to_rows = model_arguments(batch, "transformers")
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False), keep_to_rows:
            return model(**arguments).loss  # type: ignore[no-any-return]

    return forward


def step(lanes: Lanes, model: Any, inputs: Sequence[Any]) -> tuple[list[float], Gradients]:
    losses = [float(loss) for loss in lanes.run(inputs, forward_of(model))]
    assert lanes.reason is None
    found = {name: p.grad.cpu().double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return losses, found


def apart(left: Gradients, right: Gradients) -> float:
    assert left.keys() == right.keys()
    difference = sum(float((left[name] - right[name]).square().sum()) for name in left)
    return float((difference / sum(float(each.square().sum()) for each in left.values())) ** 0.5)


def captured_of(stages: Stages) -> StageCapture:
    return StageCapture(
        stages, lambda: [p for p in stages.model.parameters() if p.requires_grad], StageGraphs(stages.devices)
    )


@pytest.mark.parametrize("num_lanes", [1, 2, 3])
@pytest.mark.parametrize("kind", ["bf16", "4bit", "tied"])
@pytest.mark.parametrize("where", ["one", "two", "three on two"])
def test_gradients_are_those_of_eager_lanes(where: str, kind: str, num_lanes: int, stages_of: Any) -> None:
    stages = stages_of(kind, where)
    inputs = batches(stages.devices, 7)
    with Lanes(stages, 2) as lanes:
        eager = [step(lanes, stages.model, inputs) for _ in range(4)]
        # bfloat16 sums depend on their order, so the other order has its own.
        eager_other = step(lanes, stages.model, list(reversed(inputs)))
    captured = captured_of(stages)
    with Lanes(stages, num_lanes, captured=captured) as lanes:
        found = [step(lanes, stages.model, inputs) for _ in range(5)]
        other = [step(lanes, stages.model, list(reversed(inputs))) for _ in range(2)]
        timeline = lanes.timeline()
    print(where, kind, num_lanes, captured.report)
    assert captured.report.reason is None
    assert captured.report.replayed_elements == captured.report.elements
    assert captured.report.sizes == [128, 192]
    assert len(timeline) == 7 * (2 * len(stages) - 1)
    noise = max(apart(eager[0][1], gradient) for _, gradient in eager[1:])
    error = max(
        *(apart(eager[0][1], gradient) for _, gradient in found),
        *(apart(eager_other[1], gradient) for _, gradient in other),
    )
    print(f"gradient error {error:.2e}, eager lanes against themselves {noise:.2e}")
    assert error <= 3 * noise + 1e-6
    for losses, _ in found:
        assert losses == pytest.approx(eager[0][0], rel=1e-3)
    assert other[0][0] == pytest.approx(eager[0][0][::-1], rel=1e-3)


def test_a_stage_that_reads_the_gpu_is_run_eagerly_and_what_comes_after_is_right(stages_of: Any) -> None:
    stages = stages_of("bf16", "one")
    inputs = batches(stages.devices, 5)
    with Lanes(stages, 2) as lanes:
        eager = [step(lanes, stages.model, inputs) for _ in range(3)]
    noise = max(apart(eager[0][1], gradient) for _, gradient in eager[1:])

    def reads(_: Any, __: Any, output: Any) -> None:
        assert float(output[0].sum()) != float("inf")

    hook = stages.anatomy.layers[4].register_forward_hook(reads)
    captured = captured_of(stages)
    with Lanes(stages, 2, captured=captured) as lanes:
        for _ in range(3):
            assert apart(eager[0][1], step(lanes, stages.model, inputs)[1]) <= 3 * noise + 1e-6
    print(captured.report.reason)
    assert captured.report.reason is not None and "cannot be captured" in captured.report.reason
    assert captured.report.replayed_elements == 0
    hook.remove()
    again = captured_of(stages)
    with Lanes(stages, 2, captured=again) as lanes:
        for _ in range(3):
            assert apart(eager[0][1], step(lanes, stages.model, inputs)[1]) <= 3 * noise + 1e-6
    assert again.report.reason is None
    assert again.report.replayed_elements > 0


def run_training(folder: Path, run: Path, *options: str) -> tuple[list[float], dict[str, Any]]:
    """Losses and report of a whole run through the command line, two stages on as many GPUs as there are."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    done = subprocess.run(
        [
            sys.executable, "-m", "parallel_tune", "--model", str(folder), "--output_dir", str(run), "--stages", "2",
            "--dataset", str(ROOT / "examples" / "short_answers.jsonl"), "--max_steps", "20", "--pipeline", "on",
            "--global_batch_size", "12", "--per_device_train_batch_size", "2", "--max_seq_length", "512",
            "--use_gradient_checkpointing", "none", "--report_to", "none", *options,
        ],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    log = run / "logs" / "rank-0.log"
    assert done.returncode == 0, done.stderr[-2000:] + (log.read_text()[-4000:] if log.exists() else "")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row], json.loads((run / "report.json").read_text())


@pytest.mark.parametrize("four_bit", [False, True], ids=["bf16", "4bit"])
@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
def test_whole_runs_agree(engine: str, four_bit: bool, shape: Callable[[str], Path], tmp_path: Path) -> None:
    """Losses of a run and of the same one eager; then gradients and host time of the captured run's own model."""
    needed = [*(["unsloth"] if engine == "unsloth" else []), *(["bitsandbytes"] if four_bit else [])]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {' and '.join(missing)}")
    options = ["--engine", engine, *(["--load_in_4bit"] if four_bit else [])]
    eager, eager_report = run_training(shape("llama-1b"), tmp_path / "eager", *options, "--capture", "off")
    losses, report = run_training(shape("llama-1b"), tmp_path / "captured", *options, "--capture", "on")
    found = report["captured"]
    print(engine, four_bit, found)
    print("tokens/s", {"eager": eager_report["tokens_per_second"], "captured": report["tokens_per_second"]})
    print("devices", eager_report["devices"], report["devices"])
    assert "captured" not in eager_report
    assert (report["lanes"], report["lanes_reason"], found["reason"]) == (2, None, None)
    assert found["replayed_elements"] > 0.8 * found["elements"]
    print(f"replayed {found['replayed_elements'] / found['elements']:.1%}; last losses {eager[-3:]} {losses[-3:]}")
    assert losses == pytest.approx(eager, rel=5e-3)
    script = Path(__file__).with_name("stage_capture_gradients.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "captured"), str(max(found["sizes"]))],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    said = json.loads(done.stdout.splitlines()[-1])
    print(said)
    assert said["reason"] is None
    assert said["gradient_error"] <= 3 * said["eager_noise"] + 1e-6
