"""What a captured step could do at most: the replays of a finished run's largest size, with nothing around them.

    python examples/benchmarks/captured_limit.py RUN RESULT [REPEAT]

Of a run that was not captured it takes the plan with which it would have been, and rows as long as its longest; of
several replicas it takes one. Writes the seconds of each replay and its tokens as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any


def captured_plan(run: Any, report: dict[str, Any]) -> tuple[Any, Any, int]:
    """Settings and plan of a run, captured, and the tokens of its largest micro-batch."""
    from parallel_tune.decision import decide, find_hardware

    config, plan = run.read()
    if plan.captured:
        return config, plan, report["captured"]["sizes"][-1]
    # What asks for capturing must not be held to the arrangement of an eager step.
    free = {"per_device_train_batch_size": None, "gradient_accumulation_steps": None}
    config = config.replace(
        capture="on", use_gradient_checkpointing="auto", global_batch_size=plan.global_batch, **free
    )
    plan, _ = decide(config, find_hardware(config))
    return config, plan, -(-plan.micro_batch * report["longest_row"] // 64) * 64


def main(run_path: Path, result: Path, repeat: int) -> None:
    """Load the run's model as its worker did, capture its largest size, and replay."""
    from parallel_tune.engines import open_engine
    from parallel_tune.launch import process_environment
    from parallel_tune.rundir import RunDir
    from strategies.registry import load_registry

    run = RunDir(run_path)
    config, plan, size = captured_plan(run, json.loads(run.report.read_text()))
    processes, plan = plan.processes, replace(plan, processes=1, devices=plan.devices[:1])
    # As its worker had it: one card, and the allocator's own set-up.
    os.environ.update(process_environment(plan.devices, 1, os.environ, os.cpu_count() or 1))
    session = load_registry().get(plan.strategy).open(plan, config.ddp_timeout)
    engine = open_engine(plan.engine)
    engine.prepare()

    import torch

    from parallel_tune.data import fill_up, join
    from parallel_tune.row_arguments import model_arguments
    from parallel_tune.row_attention import use_row_attention

    dtype = getattr(torch, plan.dtype)
    model, tokenizer = engine.load(config, plan, session, dtype)
    model = engine.add_adapters(model, config, plan)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    session.place(model)
    if plan.engine == "transformers":
        use_row_attention(model)
    replay = session.schedule
    assert replay is not None, "the run was not captured"
    generator = torch.Generator().manual_seed(0)

    def batch() -> dict[str, Any]:
        ids = torch.randint(3, len(tokenizer), (size // plan.micro_batch,), generator=generator).tolist()
        rows: Any = [{"input_ids": ids, "labels": ids}] * plan.micro_batch
        tensors = fill_up(join(rows, 0), 0, size, plan.micro_batch)
        on_device = {name: tensor.to(session.device) for name, tensor in tensors.items()}
        return {**on_device, "num_items_in_batch": torch.tensor(size - plan.micro_batch, device=session.device)}

    def forward(_: int, inputs: Any) -> Any:
        arguments, keep_to_rows = model_arguments(inputs, plan.engine)
        with torch.autocast("cuda", dtype=dtype, cache_enabled=False), keep_to_rows:
            return model(**arguments).loss

    model.train()
    seconds = []
    for number in range(repeat + 3):
        made = batch()
        torch.cuda.synchronize()
        start = time.perf_counter()
        replay.run([made], forward, backward=lambda loss: loss.backward())
        torch.cuda.synchronize()
        if number >= 3:  # eager, recorded and checked, replayed once
            seconds.append(time.perf_counter() - start)
    reason = session.report()["captured"]["reason"]
    found = {"seconds": seconds, "tokens": size, "micro_batch": plan.micro_batch, "processes": processes}
    result.write_text(json.dumps({**found, "reason": reason}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 20)
