"""Gradients and time of a captured split run's model, in captured and in eager lanes; prints JSON.

python stage_capture_gradients.py RUN TOKENS
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

STEPS = 8


def main(run_path: Path, size: int) -> None:
    """Load the run's model as its worker did, and take the same step several times in either way."""
    from parallel_tune.engines import open_engine
    from parallel_tune.rundir import RunDir

    config, plan = RunDir(run_path).read()
    engine = open_engine(plan.engine)
    engine.prepare()

    import torch

    from parallel_tune.data import fill_up, join
    from parallel_tune.row_arguments import model_arguments, with_boundaries_on
    from parallel_tune.row_attention import use_row_attention
    from strategies.pipeline import Lanes
    from strategies.sessions import open_split

    session = open_split(plan)
    dtype = getattr(torch, plan.dtype)
    model, tokenizer = engine.load(config, plan, session, dtype)
    model = engine.add_adapters(model, config, plan)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    session.place(model)
    if plan.engine == "transformers":
        use_row_attention(model)
    captured = session.schedule
    assert captured is not None and session._stages is not None
    eager = Lanes(session._stages, plan.lanes, align_clocks=True)
    count, devices = plan.gradient_accumulation_steps, captured.devices
    generator = torch.Generator().manual_seed(0)

    def batch() -> dict[str, Any]:
        lengths = [size // plan.micro_batch - 7] * plan.micro_batch
        ids = [torch.randint(3, len(tokenizer), (length,), generator=generator).tolist() for length in lengths]
        rows: Any = [{"input_ids": each, "labels": each} for each in ids]
        filled = fill_up(join(rows, 0), 0, size, plan.micro_batch)
        tensors = with_boundaries_on({name: tensor.to(devices[0]) for name, tensor in filled.items()}, devices)
        head = captured.labels_device
        return {
            **tensors,
            "labels": tensors["labels"].to(head),
            "num_items_in_batch": torch.tensor(size * count, device=head),
        }

    def forward(_: int, inputs: Any) -> Any:
        arguments, keep_to_rows = model_arguments(inputs, plan.engine)
        with torch.autocast("cuda", dtype=dtype, cache_enabled=False), keep_to_rows:
            return model(**arguments).loss

    def synchronize() -> None:
        for device in devices:
            torch.cuda.synchronize(device)

    def step(lanes: Any) -> tuple[Any, float, float]:
        """Gradients on the host; seconds until the lanes have issued all, and until the devices are done."""
        for parameter in model.parameters():
            parameter.grad = None
        synchronize()
        start = time.perf_counter()
        lanes.run(batches, forward, backward=lambda loss: loss.backward())
        issued = time.perf_counter() - start
        synchronize()
        seconds = time.perf_counter() - start
        gradients = [
            parameter.grad.flatten().cpu().double() for parameter in model.parameters() if parameter.requires_grad
        ]
        return torch.cat(gradients), issued, seconds

    model.train()
    batches = [batch() for _ in range(count)]
    step(captured)  # records
    both = {"eager": [step(eager) for _ in range(STEPS)], "captured": [step(captured) for _ in range(STEPS)]}
    reference = both["eager"][1][0]

    def apart(steps: Any) -> float:
        return max(float((gradient - reference).norm() / reference.norm()) for gradient, _, _ in steps[1:])

    said = {
        "reason": session.report()["captured"]["reason"],
        "capture_seconds": session.report()["captured"]["capture_seconds"],
        "tokens": size,
        "micro_batches": count,
        "eager_noise": apart(both["eager"]),
        "gradient_error": apart(both["captured"]),
        "host_seconds": {name: sorted(each[1] for each in steps)[len(steps) // 2] for name, steps in both.items()},
        "step_seconds": {name: sorted(each[2] for each in steps)[len(steps) // 2] for name, steps in both.items()},
    }
    eager.close()
    session.close()
    print(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
