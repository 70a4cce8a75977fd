"""Each option does what its name says: seen in what real, tiny runs leave behind, several options a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

STEPS = 12
RATE = 5e-3


ADAPTER = ("--lora_rank=4", "--lora_alpha=6", "--lora_dropout=0.25", "--use_rslora", "--bias=lora_only", "--use_dora")
SCHEDULE = (
    "--lr_scheduler_type=cosine_with_min_lr",
    '--lr_scheduler_kwargs={"min_lr_rate": 0.1}',
    "--warmup_ratio=0.25",
)
ADAMW = ("--weight_decay=0.3", "--adam_beta1=0.8", "--adam_beta2=0.95", "--adam_epsilon=1e-6")
WHEN = ("--logging_steps=3", "--eval_strategy=epoch", "--save_strategy=epoch", "--save_total_limit=2")


@pytest.fixture(scope="module")
def run_it(tune: Any, tied_model: Path) -> Any:
    """The command on the tied model, without the settings that other tests share."""
    return type(tune)(tune.folder, (f"--model={tied_model}",))


@pytest.fixture(scope="module")
def biased(rows_file: Path, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options of a run with DoRA that trains all biases, on a Qwen2, whose attention has some."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = tmp_path_factory.mktemp("models") / "qwen"
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    shape = {"vocab_size": len(tiny_tokenizer), "hidden_size": 64, "intermediate_size": 96, **heads}
    Qwen2ForCausalLM(Qwen2Config(**shape)).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    return (
        f"--model={model}", f"--dataset={rows_file}", "--max_seq_length=64", "--global_batch_size=8", "--max_steps=4",
        "--hardware=cpu:2", "--use_dora", "--bias=all", "--target_modules=all", "--learning_rate=1e-2",
        "--warmup_steps=0",
    )  # fmt: skip


@pytest.fixture(scope="module")
def replicated(run_it: Any, text_file: Path, biased: tuple[str, ...]) -> tuple[Any, Any]:
    """A run on raw text whose options are nearly all not the defaults, and the one that trains biases."""
    many = (
        *ADAPTER, *SCHEDULE, *ADAMW, *WHEN, "--target_modules", "q_proj", "v_proj", f"--learning_rate={RATE}",
        f"--raw_text_file={text_file}", "--answers_only", "false", "--chunk_size=32",
        "--stride=8", "--max_rows=20", "--val_size=0.2", "--per_device_eval_batch_size=3", "--global_batch_size=4",
        "--num_train_epochs=3", "--run_name=my-own-name", "--report_to=all", "--hardware=cpu:2", "--strategy=ddp",
    )  # fmt: skip
    first, second = run_it.in_turn(many, (*biased, "--strategy=ddp"))
    return first, second


@pytest.fixture(scope="module")
def many(replicated: tuple[Any, Any]) -> Any:
    """The run on raw text."""
    return replicated[0]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("alpha beta gamma delta tree house light green river stone. " * 60)
    return path


@pytest.fixture(scope="module")
def adapter_config(many: Any) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((many.run / "adapter" / "adapter_config.json").read_text())
    return loaded


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", 4),
        ("lora_alpha", 6),
        ("lora_dropout", 0.25),
        ("use_rslora", True),
        ("bias", "lora_only"),
        ("use_dora", True),
    ],
)
def test_adapter_options_are_in_the_adapter(adapter_config: dict[str, Any], name: str, value: Any) -> None:
    assert adapter_config[name] == value


def test_the_named_modules_are_adapted(many: Any, adapter_config: dict[str, Any]) -> None:
    from safetensors.numpy import load_file

    assert sorted(adapter_config["target_modules"]) == ["q_proj", "v_proj"]
    tensors = load_file(many.run / "adapter" / "adapter_model.safetensors")
    kinds = {name.rpartition("self_attn.")[2] for name in tensors}
    parts = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    assert kinds == {f"{module}.{part}" for module in ("q_proj", "v_proj") for part in parts}


def test_raw_text_becomes_overlapping_rows(many: Any) -> None:
    data = many.report["data"]
    assert data["format"] == "raw text"
    assert data["rows"] == 20  # of max_rows
    assert many.report["longest_row"] == 32  # chunk_size
    assert data["answer_tokens"] == 31 + 19 * (32 - 8)  # what the stride repeats is context
    assert many.report["samples"] == 16 * 3  # the rest is held out


def test_the_learning_rate_follows_its_schedule(many: Any) -> None:
    """Three of twelve steps of warm-up, then half a cosine down to a tenth. Logged is the rate of the step itself."""

    def rate(step: int) -> float:
        if step < 3:
            return step / 3
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 3) / (STEPS - 3)))

    steps = [row["step"] for row in many.metrics]
    assert steps == [1, 3, 4, 6, 8, 9, 12]  # logging_steps, the first, and evaluations
    assert [row["learning_rate"] for row in many.metrics] == pytest.approx([RATE * rate(step - 1) for step in steps])


def test_adamw_has_its_settings(many: Any) -> None:
    import torch

    group = torch.load(many.run / "checkpoint-12" / "optimizer.pt", weights_only=False)["param_groups"][0]
    assert group["betas"] == (0.8, 0.95)
    assert (group["eps"], group["weight_decay"]) == (1e-6, 0.3)


def test_checkpoints_and_evaluations_come_with_the_epochs(many: Any) -> None:
    assert sorted(path.name for path in many.run.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]
    rows = [json.loads(line) for line in (many.run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 4, 8, 12]


def test_steps_between_rows_are_counted_too(moved: Any) -> None:
    """Rows that come seldom: one at the last step, at a checkpoint, and the sums are those of all steps."""
    assert [row["step"] for row in moved.metrics] == [1, 3, 5]
    assert moved.report["samples"] == sum(row["samples"] for row in moved.metrics) == 5 * 4
    assert moved.report["tokens"] == sum(row["tokens"] for row in moved.metrics)
    assert moved.report["final_loss"] == moved.losses[-1]


def test_trackers_know_the_run_by_its_name(many: Any) -> None:
    events = b"".join(path.read_bytes() for path in many.run.glob("tensorboard/**/events*"))
    assert b"my-own-name" in events


@pytest.fixture(scope="module")
def sgd(rows_file: Path) -> tuple[str, ...]:
    """Options of five steps of plain gradient descent at a high rate."""
    data = (f"--dataset={rows_file}", "--val_size=6", "--max_seq_length=256", "--global_batch_size=4")
    return (*data, "--hardware=cpu:1", "--max_steps=5", "--optim=sgd", "--learning_rate=1.0", "--warmup_steps=0")


@pytest.fixture(scope="module")
def alone(run_it: Any, sgd: tuple[str, ...], biased: tuple[str, ...]) -> tuple[Any, Any, Any]:
    """Runs of one process: clipped to nearly nothing; not clipped, by another seed, logging seldom; and in lanes."""
    moved = ("--max_grad_norm=0", "--seed=1", "--random_state=2", "--logging_steps=100", "--save_steps=3")
    lanes = (*biased, "--strategy=model_parallel", "--pipeline=on")
    first, second, third = run_it.in_turn((*sgd, "--max_grad_norm=1e-7", "--save_steps=0.6"), (*sgd, *moved), lanes)
    return first, second, third


@pytest.fixture(scope="module")
def moved(alone: tuple[Any, Any, Any]) -> Any:
    """The run without clipping."""
    return alone[1]


def test_without_clipping_nothing_stops_sgd_and_with_it_nothing_moves(
    alone: tuple[Any, Any, Any],
) -> None:
    still, moved, _ = alone
    change = [run.report["held_out_loss_after"] - run.report["held_out_loss_before"] for run in (still, moved)]
    assert abs(change[0]) < 1e-6 < 1e-4 < abs(change[1])
    # A share of the steps, and an optimizer without moments.
    import torch

    assert sorted(path.name for path in still.run.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-5"]
    assert not any(torch.load(still.run / "checkpoint-3" / "optimizer.pt", weights_only=True)["state"].values())
    # Another seed draws other samples, another random_state other adapters.
    assert still.metrics[0]["tokens"] != moved.metrics[0]["tokens"]
    assert first_weights(still) != first_weights(moved)


def first_weights(run: Any) -> list[float]:
    """Some of an adapter's first half, which a rate of a ten-millionth leaves nearly as it began."""
    from safetensors.numpy import load_file

    tensors = load_file(run.run / "adapter" / "adapter_model.safetensors")
    return [round(float(value), 3) for value in next(iter(sorted(tensors.items())))[1].ravel()[:20]]


def test_dora_and_biases_train_alike_in_replicas_and_in_lanes(
    replicated: tuple[Any, Any], alone: tuple[Any, Any, Any]
) -> None:
    import torch
    from safetensors.torch import load_file

    replicas, lanes = replicated[1], alone[2]
    assert lanes.losses == pytest.approx(replicas.losses, rel=1e-5)
    adapters = [load_file(run.run / "adapter" / "adapter_model.safetensors") for run in (replicas, lanes)]
    biases = [name for name in adapters[0] if name.endswith("q_proj.base_layer.bias")]
    assert len(biases) == 3
    for name, tensor in adapters[0].items():
        assert torch.allclose(tensor, adapters[1][name], atol=1e-4), name
    assert all(adapters[0][name].abs().max() > 1e-3 for name in biases)  # they began at 0


def test_held_out_rows_are_evaluated_in_the_precision_of_training(run_it: Any, biased: tuple[str, ...]) -> None:
    """Biases that train are in float32, the weights beside them in bfloat16: only autocast brings them together."""
    half = ("--strategy=model_parallel", "--pipeline=on", "--dtype=bfloat16", "--val_size=6")
    (run,) = run_it.in_turn((*biased, *half))
    assert run.report["held_out_loss_after"] < run.report["held_out_loss_before"]


def test_a_text_that_is_not_there_is_refused_before_anything_starts(run_it: Any, text_file: Path) -> None:
    ended = run_it.ended(f"--raw_text_file={text_file.with_name('boook.txt')}", "--hardware=cpu:1")
    assert ended.code == 2
    assert "boook.txt' is not there" in ended.err
    assert "did you mean" in ended.err
    assert not ended.run.exists()
