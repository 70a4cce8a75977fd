"""The heart of trust: every layout trains exactly as a plain PyTorch loop over the same samples does.

The reference shares nothing with the program but the encoded rows and the adapters' first weights: it goes through one
row at a time, so that it needs neither padding nor micro-batches.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compared_runs import EPOCHS, FUSED, LAYOUTS, TIED
from torch.nn.functional import cross_entropy

from parallel_tune.data import EncodedRow

GLOBAL_BATCH, SEED, RATE, WARMUP = 12, 3407, 2e-3, 5
STEPS, SHARED_STEPS = 20, 10
SHARED_EPOCHS = 2
"""Of the runs that most tests share."""

TOLERANCE = 1e-5

Rows = list[EncodedRow]


@pytest.fixture(scope="session")
def rows(tied_model: Path, rows_file: Path) -> tuple[Rows, Rows]:
    """Encoded rows: those trained on and those held out."""
    from transformers import AutoTokenizer

    from parallel_tune.config import make_config
    from parallel_tune.data.prepare import prepare_data

    options = {"dataset": str(rows_file), "answers_only": True, "val_size": 6, "max_seq_length": 256}
    train, held_out, _ = prepare_data(make_config(options), AutoTokenizer.from_pretrained(tied_model))
    assert held_out is not None
    return list(train), list(held_out)


def sample_ids(epochs: int) -> list[list[int]]:
    """Sample ids of each step, by the documented order."""
    steps = []
    for epoch in range(epochs):
        order = list(range(53))
        random.Random(f"{SEED}:{epoch}").shuffle(order)
        steps += [order[start : start + GLOBAL_BATCH] for start in range(0, 53, GLOBAL_BATCH)]
    return steps


def loss_sum(model: Any, row: EncodedRow) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    return cross_entropy(logits[:-1], torch.tensor(row["labels"][1:]), ignore_index=-100, reduction="sum")


def num_targets(rows: Rows) -> int:
    return sum(label != -100 for row in rows for label in row["labels"][1:])


def mean_loss(model: Any, rows: Rows) -> float:
    with torch.no_grad():
        return float(sum(loss_sum(model, row) for row in rows)) / num_targets(rows)


def reference(model: Any, rows: Rows, epochs: int) -> tuple[list[float], list[float]]:
    """Losses and gradient norms: AdamW, linear warm-up and decay, clipping at 1."""
    model.train()
    order = sample_ids(epochs)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    losses, norms = [], []
    for step, ids in enumerate(order):
        rate = step / WARMUP if step < WARMUP else (len(order) - step) / (len(order) - WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate
        batch = [rows[number] for number in ids]
        losses.append(0.0)
        for row in batch:
            loss = loss_sum(model, row) / num_targets(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            losses[-1] += float(loss.detach())
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


@pytest.fixture(scope="session")
def adapted(tied_model: Path, rows: tuple[Rows, Rows]) -> tuple[list[float], list[float], float]:
    """The reference with adapters: losses, gradient norms, and the held-out loss afterwards."""
    return reference_with_adapters(tied_model, rows, EPOCHS)


def reference_with_adapters(
    tied_model: Path, rows: tuple[Rows, Rows], epochs: int
) -> tuple[list[float], list[float], float]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, set_seed

    model = AutoModelForCausalLM.from_pretrained(tied_model, dtype=torch.float32)
    set_seed(3407)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    return *reference(model, rows[0], epochs), mean_loss(model, rows[1])


def test_the_rows_are_hard(rows: tuple[Rows, Rows]) -> None:
    lengths = [len(row["input_ids"]) for row in rows[0]]
    assert len(lengths) == 53
    assert max(lengths) > 10 * min(lengths) > 0
    assert [len(ids) for ids in sample_ids(EPOCHS)] == [12, 12, 12, 12, 5] * EPOCHS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_the_references(
    layout: str,
    compared: Callable[[str], Any],
    adapted: tuple[list[float], list[float], float],
    rows: tuple[Rows, Rows],
) -> None:
    _, options = LAYOUTS[layout]
    run = compared(layout)
    losses, norms, held_out = adapted
    assert [row["step"] for row in run.metrics] == list(range(1, STEPS + 1))
    assert run.losses == pytest.approx(losses, rel=TOLERANCE)
    assert losses[-1] < losses[0] - 0.1
    assert [row["grad_norm"] for row in run.metrics] == pytest.approx(norms, rel=1e-4)
    assert [row["samples"] for row in run.metrics] == [len(ids) for ids in sample_ids(EPOCHS)]
    tokens = [sum(len(rows[0][number]["input_ids"]) for number in ids) for ids in sample_ids(EPOCHS)]
    assert [row["tokens"] for row in run.metrics] == tokens
    assert run.report["held_out_loss_after"] == pytest.approx(held_out, rel=TOLERANCE)
    assert run.report["padding_free"] == ("--padding_free=off" not in options)
    log = (run.run / "logs" / "rank-0.log").read_text()
    assert ("the loss is computed chunk by chunk" in log) == (FUSED in options)
    assert (run.report["samples"], run.report["steps"]) == (53 * EPOCHS, STEPS)
    assert run.plan["processes"] * run.plan["micro_batch"] * run.plan["gradient_accumulation_steps"] == 12


@pytest.fixture(scope="module")
def shared(tied_model: Path, rows: tuple[Rows, Rows]) -> list[float]:
    """The reference's losses for the runs that other tests share."""
    return reference_with_adapters(tied_model, rows, SHARED_EPOCHS)[0]


@pytest.mark.parametrize("fixture", ["single_run", "ddp_run", "split_run"])
def test_the_commands_losses_are_the_references(
    fixture: str, request: pytest.FixtureRequest, shared: list[float]
) -> None:
    run = request.getfixturevalue(fixture)
    assert len(run.losses) == SHARED_STEPS
    assert run.losses == pytest.approx(shared, rel=TOLERANCE)


@pytest.mark.parametrize("fixture", ["ddp_run", "split_run"])
def test_the_adapter_gives_the_same_loss_in_plain_peft(
    fixture: str, request: pytest.FixtureRequest, tied_model: Path, rows: tuple[Rows, Rows]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = request.getfixturevalue(fixture)
    base = AutoModelForCausalLM.from_pretrained(tied_model, dtype=torch.float32)
    before = mean_loss(base, rows[1])
    model = PeftModel.from_pretrained(base, run.run / "adapter")
    assert mean_loss(model, rows[1]) == pytest.approx(run.report["held_out_loss_after"], rel=1e-6)
    assert before == pytest.approx(run.report["held_out_loss_before"], rel=1e-6)
    assert run.report["held_out_loss_after"] < before


@pytest.fixture(scope="module")
def tied_losses(tied_model: Path, rows: tuple[Rows, Rows]) -> list[float]:
    """The losses of the reference that trains all weights."""
    from transformers import AutoModelForCausalLM

    return reference(AutoModelForCausalLM.from_pretrained(tied_model, dtype=torch.float32), rows[0], SHARED_EPOCHS)[0]


@pytest.mark.parametrize("loss", TIED)
def test_all_weights_of_a_tied_model_train_alike_in_a_split(
    loss: str, compared: Callable[[str], Any], tied_losses: list[float], rows: tuple[Rows, Rows]
) -> None:
    from transformers import AutoModelForCausalLM

    run = compared(loss)
    assert run.losses[:5] == pytest.approx(tied_losses[:5], rel=1e-4)
    saved = AutoModelForCausalLM.from_pretrained(run.run / "model", dtype=torch.float32)
    assert mean_loss(saved, rows[1]) == pytest.approx(run.report["held_out_loss_after"], rel=1e-6)


def fed(notes: list[dict[str, Any]], micro_batches: int) -> list[list[list[int]]]:
    """The rows of each step, over all ranks, sorted; passes without weight left out."""
    steps = []
    for step in range(SHARED_STEPS):
        passes = [seen["passes"][step * micro_batches : (step + 1) * micro_batches] for seen in notes]
        steps.append(sorted(row for rank in passes for one in rank for row in one if set(row) != {2}))
    return steps


@pytest.mark.parametrize(
    ("strategy", "like", "micro_batches"), [("noted_ddp", "ddp_run", 3), ("noted_split", "split_run", 6)]
)
def test_what_a_third_party_saw(
    strategy: str,
    like: str,
    micro_batches: int,
    request: pytest.FixtureRequest,
    tune: Any,
    noting: dict[str, str],
    read_notes: Callable[[Path], list[dict[str, Any]]],
    rows: tuple[Rows, Rows],
) -> None:
    """A strategy from another package trains; every rank is fed its samples, and all end with equal weights."""
    run = tune(f"--strategy={strategy}", "--hardware=cpu:2", env=noting)
    assert run.losses == request.getfixturevalue(like).losses
    notes = read_notes(Path(noting["NOTES"]))
    assert len(notes) == run.plan["processes"]
    assert [len(seen["passes"]) for seen in notes] == [SHARED_STEPS * micro_batches] * len(notes)
    assert fed(notes, micro_batches) == [
        sorted(rows[0][number]["input_ids"] for number in ids) for ids in sample_ids(SHARED_EPOCHS)
    ]
    assert len({seen["weights"] for seen in notes}) == 1
    if strategy == "noted_split":
        # One cut: once forward and once backward for each micro-batch; the held-out rows cross it forward only.
        evaluation = 2 * 2
        # Three rows alone, then together: the check that the model keeps them apart.
        evaluation += 3 + 1
        passes = SHARED_STEPS * micro_batches
        assert notes[0]["crossings"] == [{"forward": passes + evaluation, "backward": passes}]
