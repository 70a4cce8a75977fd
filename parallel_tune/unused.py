"""Options of the strategy that were given and that a plan has no use for: it says so, instead of passing over them."""

from __future__ import annotations

from parallel_tune.config import TrainConfig
from strategies.contracts import Plan


def unused(config: TrainConfig, plan: Plan) -> tuple[str, ...]:
    """A sentence for each kind of them. What a third party's strategy makes of an option is its own to say."""
    said = []
    if plan.strategy == "ddp":
        given = [f"--pipeline {config.pipeline}"] if config.pipeline != "auto" else []
        given += [f"--lanes {config.lanes}"] if config.lanes is not None else []
        if given:
            said.append(
                f"{' and '.join(given)}: of no use here, since no model is split; --strategy model_parallel splits it"
            )
    if config.ddp_reduce_dtype != "float32" and plan.processes == 1:
        said.append(
            f"--ddp_reduce_dtype {config.ddp_reduce_dtype}: of no use here, since one process has all gradients"
        )
    return tuple(said)
