"""Lanes on GPUs: gradients of the naive run, up to the noise that the naive run has against itself.

Both stages on one GPU wherever there is one; on two as well where there are two. `pytest -m gpu tests/gpu` runs it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor

from strategies.pipeline import Lanes
from strategies.stages import Stages, split
from strategies.turns import Turns
from strategies.visit import Visit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    # Warnings of the libraries at work on GPUs are not what is tested here.
    pytest.mark.filterwarnings("default"),
]
SIZES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1000},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
Gradients = dict[str, Tensor]


def places(name: str) -> list[torch.device]:
    """Two stages on one GPU, on two, or three on two."""
    ordinals = {"one": (0, 0), "two": (0, 1), "three on two": (0, 1, 0)}[name]
    if torch.cuda.device_count() <= max(ordinals):
        pytest.skip("needs two GPUs")
    return [torch.device("cuda", ordinal) for ordinal in ordinals]


def build(
    size: str, device: torch.device, four_bit: bool = False, dropout: float = 0.0, path: Path | None = None
) -> Any:
    """A random Llama in bf16, or in 4-bit by way of a folder, with float32 adapters."""
    config = transformers.LlamaConfig(**SIZES[size], max_position_embeddings=4096)
    torch.manual_seed(0)
    with device:
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if four_bit:
        pytest.importorskip("bitsandbytes")
        assert path is not None
        model.save_pretrained(path)
        quantized = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, quantization_config=quantized, device_map={"": device}, dtype=torch.bfloat16
        )
    model.requires_grad_(False)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", lora_dropout=dropout))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def batches(size: str, devices: Sequence[torch.device], count: int, length: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for index in range(count):
        shape = (2, length - 16 * (index % 3))
        ids = torch.randint(0, SIZES[size]["vocab_size"], shape, generator=generator)
        mask = torch.ones_like(ids)
        mask[1, -(1 + index) :] = 0
        labels = ids.masked_fill(mask == 0, -100)
        made.append(
            {
                "input_ids": ids.to(devices[0]),
                "attention_mask": mask.to(devices[0]),
                "labels": labels.to(devices[-1]),
            }
        )
    return made


def forward_of(model: Any) -> Callable[[int, Any], Tensor]:
    def forward(_: int, batch: Any) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
            return model(**batch, use_cache=False).loss  # type: ignore[no-any-return]

    return forward


def gradients(model: Any) -> Gradients:
    found = {name: p.grad.cpu().double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def naive(model: Any, inputs: Sequence[Any]) -> Gradients:
    forward = forward_of(model)
    for index, batch in enumerate(inputs):
        forward(index, batch).backward()
    return gradients(model)


def in_lanes(lanes: Lanes, model: Any, inputs: Sequence[Any], key: int | None = None) -> Gradients:
    losses = lanes.run(inputs, forward_of(model), key=key)
    assert lanes.reason is None
    assert len(losses) == len(inputs)
    return gradients(model)


def apart(left: Gradients, right: Gradients) -> float:
    assert left.keys() == right.keys()
    difference = sum(float((left[name] - right[name]).square().sum()) for name in left)
    return float((difference / sum(float(each.square().sum()) for each in left.values())) ** 0.5)


def within_noise(reference: list[Gradients], found: list[Gradients]) -> None:
    noise = max(apart(reference[0], other) for other in reference[1:])
    error = max(apart(reference[0], other) for other in found)
    print(f"gradient error {error:.2e}, naive against itself {noise:.2e}")
    assert error <= 3 * noise + 1e-6, (error, noise)


def even(stages: int, layers: int) -> list[int]:
    return [layers * stage // stages for stage in range(stages)]


def made_stages(size: str, devices: Sequence[torch.device], **options: Any) -> Stages:
    model = build(size, devices[0], **options)
    return split(model, even(len(devices), SIZES[size]["num_hidden_layers"]), devices)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("four_bit", [False, True], ids=["bf16", "4bit"])
@pytest.mark.parametrize("where", ["one", "two", "three on two"])
def test_tiny_gradients_are_the_naive_ones(
    where: str, four_bit: bool, checkpointing: bool | None, tmp_path: Path
) -> None:
    devices = places(where)
    stages = made_stages("tiny", devices, four_bit=four_bit, path=tmp_path)
    model: Any = stages.model
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    inputs = batches("tiny", devices, 5, 128)
    reference = [naive(model, inputs) for _ in range(4)]
    with Lanes(stages, len(devices)) as lanes:
        within_noise(reference, [in_lanes(lanes, model, inputs) for _ in range(4)])


@pytest.mark.parametrize("four_bit", [False, True], ids=["bf16", "4bit"])
@pytest.mark.parametrize("where", ["one", "two"])
def test_1b_gradients_are_the_naive_ones(where: str, four_bit: bool, tmp_path: Path) -> None:
    devices = places(where)
    stages = made_stages("1b", devices, four_bit=four_bit, path=tmp_path)
    inputs = batches("1b", devices, 6, 512)
    reference = [naive(stages.model, inputs) for _ in range(3)]
    with Lanes(stages, 2) as lanes:
        within_noise(reference, [in_lanes(lanes, stages.model, inputs) for _ in range(3)])


@pytest.mark.parametrize("where", ["one", "two"])
def test_random_delays_change_nothing(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = places(where)
    stages = made_stages("tiny", devices)
    inputs = batches("tiny", devices, 6, 64)
    reference = [naive(stages.model, inputs) for _ in range(4)]
    go, draws = Visit.go, random.Random(0)

    def delayed(self: Visit, stage: int, backward: bool) -> None:
        time.sleep(draws.random() * 0.003)
        go(self, stage, backward)

    monkeypatch.setattr(Visit, "go", delayed)
    with Lanes(stages, 3) as lanes:
        within_noise(reference, [in_lanes(lanes, stages.model, inputs) for _ in range(20)])


@pytest.mark.parametrize("where", ["one", "two"])
def test_dropout_does_not_depend_on_the_number_of_lanes(where: str) -> None:
    devices = places(where)
    stages = made_stages("tiny", devices, dropout=0.3)
    inputs = batches("tiny", devices, 5, 64)
    with Lanes(stages, 1) as one:
        reference = [in_lanes(one, stages.model, inputs, key=7) for _ in range(4)]
        assert apart(reference[0], in_lanes(one, stages.model, inputs, key=8)) > 0.05
    with Lanes(stages, 3) as three:
        within_noise(reference, [in_lanes(three, stages.model, inputs, key=7) for _ in range(4)])


@pytest.mark.parametrize("where", ["one", "two"])
def test_after_an_error_the_next_step_is_right(where: str) -> None:
    devices = places(where)
    stages = made_stages("tiny", devices)
    inputs = batches("tiny", devices, 5, 64)
    reference = [naive(stages.model, inputs) for _ in range(4)]

    def failing(index: int, batch: Any) -> Tensor:
        if index == 3:
            raise RuntimeError("injected")
        return forward_of(stages.model)(index, batch)

    with Lanes(stages, 2) as lanes:
        for _ in range(5):
            with pytest.raises(RuntimeError, match="injected"):
                lanes.run(inputs, failing)
            stages.model.zero_grad(set_to_none=True)
            within_noise(reference, [in_lanes(lanes, stages.model, inputs)])


def test_two_gpus_work_at_once() -> None:
    """The timeline by events: some forward of one GPU overlaps the other's work, and shares are true shares."""
    devices = places("two")
    stages = made_stages("1b", devices)
    inputs = batches("1b", devices, 6, 1024)
    with Lanes(stages, 2, align_clocks=True) as lanes:
        for _ in range(2):
            in_lanes(lanes, stages.model, inputs)
        timeline = lanes.timeline()
    left, right = ([s for s in timeline if s.stage == stage] for stage in range(2))
    assert any(a.start < b.end and b.start < a.end for a in left for b in right)
    for segments in (left, right):
        assert all(a.end <= b.start + 1e-4 for a, b in pairwise(segments))


@pytest.mark.parametrize("where", ["one", "two", "three on two"])
def test_the_naive_schedule_is_timed_by_events(where: str) -> None:
    """Each stage is seen, one at a time, and the gradients are those of the model without a clock."""
    devices = places(where)
    stages = made_stages("1b", devices)
    inputs = batches("1b", devices, 4, 1024)
    reference = [naive(stages.model, inputs) for _ in range(3)]
    turns = Turns(stages, align_clocks=True)
    for _ in range(2):
        stages.model.zero_grad(set_to_none=True)
        turns.run(inputs, forward_of(stages.model))
    within_noise(reference, [gradients(stages.model)])
    timeline = turns.timeline()
    last = len(devices) - 1
    way = [*((stage, "forward") for stage in range(last)), (last, "forward+backward")]
    way += [(stage, "backward") for stage in reversed(range(last))]
    assert [(s.micro_batch, s.stage, s.direction) for s in timeline] == [(m, *part) for m in range(4) for part in way]
    # Times of distinct GPUs compare up to the clocks' alignment.
    assert all(one.end <= other.start + 1e-3 for one, other in pairwise(timeline))
    print(where, [(s.stage, s.direction, round(1e3 * s.start, 2), round(1e3 * s.end, 2)) for s in timeline])


def test_a_run_teaches_later_plans_its_stage_times(shape: Callable[[str], Path], tmp_path: Path) -> None:
    """One run of two stages, in lanes; the plan after it says what was measured, and predicts from it."""
    options = ("--engine", "transformers", "--strategy", "model_parallel", "--pipeline", "on")
    run_training(shape("llama-1b"), tmp_path / "run", *options, "--max_steps", "10")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    before = json.loads((tmp_path / "run" / "plan.json").read_text())
    data = Path(__file__).parents[2] / "examples" / "short_answers.jsonl"
    done = subprocess.run(
        [
            sys.executable, "-m", "parallel_tune", "plan", "--json", "--model", str(shape("llama-1b")), "--stages", "2",
            "--dataset", str(data), "--global_batch_size", "12", "--per_device_train_batch_size", "2",
            "--max_seq_length", "512", *options,
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    after = json.loads(done.stdout)
    print(*after["basis"], sep="\n")
    rates = (before["predicted_tokens_per_second"], after["predicted_tokens_per_second"], report["tokens_per_second"])
    print("formula, by stage times (rows full), measured (short rows):", rates, report["stage_seconds"])
    assert any("stage times of NVIDIA" in said for said in after["basis"])
    assert any("by the formula alone" in said for said in after["basis"])


def run_training(folder: Path, run: Path, *options: str) -> list[tuple[float, float]]:
    """Losses and gradient norms of a whole run through the command line."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    done = subprocess.run(
        [
            sys.executable, "-m", "parallel_tune", "--model", str(folder), "--output_dir", str(run), "--stages", "2",
            "--dataset", str(Path(__file__).parents[2] / "examples" / "short_answers.jsonl"), "--max_steps", "3",
            "--global_batch_size", "12", "--per_device_train_batch_size", "2", "--max_seq_length", "512",
            "--warmup_steps", "0", *options,
        ],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    log = run / "logs" / "rank-0.log"
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:] + (log.read_text() if log.exists() else "")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


@pytest.mark.parametrize("four_bit", [False, True], ids=["bf16", "4bit"])
@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
def test_whole_runs_agree(engine: str, four_bit: bool, shape: Callable[[str], Path], tmp_path: Path) -> None:
    """On as many GPUs as the machine has, up to two."""
    needed = [*(["unsloth"] if engine == "unsloth" else []), *(["bitsandbytes"] if four_bit else [])]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {' and '.join(missing)}")
    options = ["--engine", engine, *(["--load_in_4bit"] if four_bit else [])]
    off = run_training(shape("llama-1b"), tmp_path / "off", *options, "--pipeline", "off")
    on = run_training(shape("llama-1b"), tmp_path / "on", *options, "--pipeline", "on")
    report = json.loads((tmp_path / "on" / "report.json").read_text())
    assert (report["lanes"], report["lanes_reason"]) == (2, None)
    print(engine, four_bit, off, on, report["devices"])
    for (loss, norm), (lane_loss, lane_norm) in zip(off, on, strict=True):
        assert lane_loss == pytest.approx(loss, rel=2e-3)
        assert lane_norm == pytest.approx(norm, rel=2e-2)
