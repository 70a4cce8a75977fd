"""Run directories written by hand, with the figures of a real kind of run: an 8B LoRA on one and on two H100s."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parallel_tune.config import TrainConfig
from parallel_tune.rundir import Outcome, RunDir, create, write_outcome
from strategies.contracts import DevicePlan, MemoryEstimate, Plan, Rejection

GIB = 2**30
MEMORY = MemoryEstimate(
    weights_bytes=int(15.26 * GIB),
    adapters_bytes=int(0.16 * GIB),
    gradients_bytes=int(0.16 * GIB),
    optimizer_bytes=int(0.31 * GIB),
    activations_bytes=int(12.4 * GIB),
    cross_entropy_bytes=int(5.87 * GIB),
    buffers_bytes=int(0.02 * GIB),
    context_bytes=int(0.62 * GIB),
    reserve_bytes=int(0.9 * GIB),
    phase="cross_entropy",
)
RunMaker = Callable[..., RunDir]


def plan_of(devices: int, strategy: str = "ddp", global_batch: int = 8) -> Plan:
    processes = devices if strategy == "ddp" else 1
    return Plan(
        strategy=strategy,
        fits=True,
        engine="unsloth",
        processes=processes,
        devices=tuple(
            DevicePlan(
                index=index,
                name="NVIDIA H100 80GB HBM3",
                kind="cuda",
                capacity_bytes=81_559 * 2**20,
                free_bytes=81_000 * 2**20,
                predicted_allocated_bytes=MEMORY.allocated_bytes,
                predicted_peak_bytes=MEMORY.peak_bytes,
                layers=(0, 31) if strategy == "ddp" else (16 * index, 16 * index + 15),
                memory=MEMORY,
            )
            for index in range(devices)
        ),
        device_map={},
        micro_batch=2,
        gradient_accumulation_steps=global_batch // (2 * processes),
        global_batch=global_batch,
        gradient_checkpointing="none",
        predicted_tokens_per_second=7_900.0 * processes,
        reasons=("a replica needs 35.7 GiB a card at micro-batch 2 without checkpointing",),
        rejected=(Rejection("model_parallel", "would fit, 12,240 tokens/s predicted against 15,800"),),
        launch=("python", "-m", "parallel_tune.worker", "RUN_DIRECTORY"),
    )


def metric_rows(plan: Plan, steps: int, dataset_rows: int = 1_000, worse: float = 0.0) -> list[dict[str, Any]]:
    """A loss that falls as real ones do, the slower the run's global batch is small."""
    rows: list[dict[str, Any]] = [{"step": 0, "epoch": 0.0, "eval_loss": 1.9421}]
    for step in range(1, steps + 1):
        samples = step * plan.global_batch
        tokens = plan.global_batch * (110 + step % 7)
        rate = plan.predicted_tokens_per_second * (0.9 + 0.02 * math.sin(step))
        rows.append(
            {
                "step": step,
                "max_steps": steps,
                "epoch": samples / dataset_rows,
                "loss": 1.1 + worse + 0.9 * math.exp(-samples / 150) + 0.03 * math.sin(2.3 * step),
                "grad_norm": 0.8,
                "learning_rate": 2e-4 * min(step / 5, (steps - step) / max(1, steps - 5)),
                "tokens": tokens,
                "samples": plan.global_batch,
                "seconds": tokens / rate,
                "tokens_per_second": rate,
                "devices": [{"index": 0, "allocated_bytes": int(33.9 * GIB) + step}],
            }
        )
        if step % 20 == 0:
            rows.append({"step": step, "epoch": samples / dataset_rows, "eval_loss": 1.2 + 0.7 / (1 + samples / 100)})
    return rows


def report_for(plan: Plan, config: TrainConfig, rows: list[dict[str, Any]]) -> dict[str, Any]:
    training = [row for row in rows if "loss" in row]
    tokens, seconds = sum(row["tokens"] for row in training), sum(row["seconds"] for row in training)
    return {
        "strategy": plan.strategy,
        "engine": plan.engine,
        "model": config.model,
        "world_size": plan.processes,
        "global_batch": plan.global_batch,
        "steps": training[-1]["step"],
        "samples": sum(row["samples"] for row in training),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "final_loss": training[-1]["loss"],
        "longest_row": 431,
        "result": "adapter",
        "devices": [
            {
                "index": device.index,
                "name": device.name,
                "planned_peak_bytes": device.predicted_peak_bytes,
                "predicted_allocated_bytes": int(20.1 * GIB),
                "predicted_peak_bytes": int(21.5 * GIB),
                "allocated_peak_bytes": int(19.9 * GIB),
                "reserved_peak_bytes": int(20.8 * GIB),
                "used_peak_bytes": int((21.4 + 0.3 * device.index) * GIB),
            }
            for device in plan.devices
        ],
        "versions": {"python": "3.12.3", "torch": "2.11.0+cu130", "parallel-tune": "0.1.0"},
    }


@pytest.fixture
def make_plan() -> Callable[..., Plan]:
    """Makes a plan: `make_plan(devices, strategy, global_batch)`."""
    return plan_of


@pytest.fixture
def run_maker(tmp_path: Path) -> RunMaker:
    """Makes a run directory: `run_maker(name, plan, steps, ...)`."""

    def make(name: str, plan: Plan, steps: int = 100, outcome: Outcome | None = None, **settings: Any) -> RunDir:
        config = replace(TrainConfig(model="unsloth/Llama-3.1-8B", output_dir=str(tmp_path / name)), **settings)
        run = create(config, plan)
        rows = metric_rows(plan, steps, worse=0.05 if config.load_in_4bit else 0.0)
        run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        if outcome is None:
            run.report.write_text(json.dumps(report_for(plan, config, rows)), encoding="utf-8")
        for rank in range(plan.processes):
            write_outcome(run, rank, outcome or Outcome(0))
        return run

    return make
