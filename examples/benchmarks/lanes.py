"""What lanes gain over the naive split of one model, and that both give the same gradients.

    python examples/benchmarks/lanes.py                                     # two stages on the CPU, small
    python examples/benchmarks/lanes.py --devices cuda:0,cuda:1 --shape 8b  # bf16 LoRA on two GPUs, 8 x 2 x 2048 tokens

Random weights, random tokens; naive and lanes alternate, figures are medians.
Writes results/lanes.HARDWARE.json beside this file, anew after each step. A step that hangs ends the benchmark, and
shows what each thread was doing.
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parents[2]))  # a checkout is enough, nothing has to be installed

from running import told

from strategies.pipeline import Lanes
from strategies.stages import Stages, split
from strategies.visit import Segment

SHAPES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6, "num_attention_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
VOCABULARY = {"small": 1024, "1b": 128256, "8b": 128256}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--devices", default="cpu,cpu", help="one a stage, e.g. cuda:0,cuda:1 or cuda:0,cuda:0")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument(
        "--cuts", default="", help="first layer of each stage, e.g. 0,18; balanced by measured times if not given"
    )
    parser.add_argument("--lanes", type=int, default=0, help="as many as stages if not given")
    parser.add_argument("--micro_batches", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=0, help="2048 on GPUs, 128 on a CPU if not given")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--full", action="store_true", help="train all weights, not LoRA adapters of rank 16")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--step_seconds", type=float, default=120.0, help="that a step may take")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args(arguments)


def build(options: argparse.Namespace, device: torch.device) -> Any:
    """A Llama of the shape asked for, in training mode; float32 on a CPU, bfloat16 on GPUs."""
    import transformers
    from peft import LoraConfig, get_peft_model

    shape = {"vocab_size": VOCABULARY[options.shape], "max_position_embeddings": 8192, **SHAPES[options.shape]}
    config = transformers.LlamaConfig(**shape, num_key_value_heads=max(2, shape["num_attention_heads"] // 4))
    torch.manual_seed(0)
    with device:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if not options.full:
        adapters = LoraConfig(r=16, target_modules="all-linear")
        model = get_peft_model(model, adapters, autocast_adapter_dtype=False)
    if options.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def wait(stages: Stages) -> None:
    """Wait until the GPUs, if any, are done."""
    for device in {device for device in stages.devices if device.type == "cuda"}:
        torch.cuda.synchronize(device)


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Within it, a hang ends this process and shows where each thread is."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def balanced(stages: Stages, inputs: Sequence[dict[str, Tensor]]) -> list[int]:
    """Cuts that give each stage the same time, by the times of these stages.

    The stages before the last tell the seconds of a layer; what the last one takes beyond its layers is the head's.
    """
    with Lanes(stages, 1, align_clocks=True) as lanes:
        for _ in range(2):  # the first builds tables and pools
            step(stages, lanes, inputs)
        busy = stage_seconds(lanes.timeline(), len(stages))
    layers, last = len(stages.anatomy.layers), stages.cuts[-1]
    a_layer = sum(busy[:-1]) / last
    head = max(0.0, busy[-1] / a_layer - (layers - last))  # in layers
    each = (layers + head) / len(stages)
    return [min(round(each * stage), layers - len(stages) + stage) for stage in range(len(stages))]


def stage_seconds(timeline: Sequence[Segment], count: int) -> list[float]:
    """Seconds that each stage worked."""
    return [sum(each.end - each.start for each in timeline if each.stage == stage) for stage in range(count)]


def peaks(stages: Stages) -> list[int]:
    """The most bytes allocated on each GPU since this was last called."""
    found = []
    for device in dict.fromkeys(device for device in stages.devices if device.type == "cuda"):
        found.append(torch.cuda.max_memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)
    return found


def step(stages: Stages, lanes: Lanes, inputs: Sequence[dict[str, Tensor]]) -> tuple[float, dict[str, Tensor]]:
    """Seconds of all micro-batches' forward and backward, and the gradients they left."""
    model: Callable[..., Any] = stages.model
    stages.model.zero_grad(set_to_none=True)
    wait(stages)
    start = time.perf_counter()
    lanes.run(inputs, lambda _, batch: model(**batch, use_cache=False).loss)
    wait(stages)
    seconds = time.perf_counter() - start
    parameters = stages.model.named_parameters()
    return seconds, {name: p.grad.cpu().clone() for name, p in parameters if p.grad is not None}


def difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Relative distance of two sets of gradients, in the Euclidean norm over all of them."""
    apart = sum(float((left[name].double() - right[name].double()).square().sum()) for name in left)
    size = sum(float(gradient.double().square().sum()) for gradient in left.values())
    return (apart / size) ** 0.5


def measure(
    stages: Stages,
    options: argparse.Namespace,
    inputs: Sequence[dict[str, Tensor]],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Time the naive schedule and the lanes alternately; rows, the last of each with its schedule.

    Args:
        keep: called with all rows and figures so far, whenever there is a new one.
    """
    rows: list[dict[str, Any]] = []
    gradients: dict[str, list[dict[str, Tensor]]] = {"naive": [], "lanes": []}
    num_lanes = options.lanes or len(stages)
    both = {
        "naive": Lanes(stages, 1, align_clocks=True),
        "lanes": Lanes(stages, num_lanes, align_clocks=True),
    }
    for lanes in both.values():
        with bounded(options.step_seconds):
            step(stages, lanes, inputs)  # the probe, lazily built tables, the allocator's pools
    peaks(stages)
    for _ in range(options.repeat):
        for name, lanes in both.items():
            with bounded(options.step_seconds):
                seconds, found = step(stages, lanes, inputs)
                timeline = lanes.timeline()
            gradients[name] = [*gradients[name][-1:], found]
            row = {"schedule": name, "seconds": seconds, "stage_busy_seconds": stage_seconds(timeline, len(stages))}
            for earlier in rows:  # one picture of each is enough
                if earlier["schedule"] == name:
                    earlier.pop("timeline", None)
            pictured = [vars(segment) for segment in timeline]
            rows.append({**row, "reason": lanes.reason, "peak_bytes": peaks(stages), "timeline": pictured})
            print(
                json.dumps({key: rows[-1][key] for key in ("schedule", "seconds", "reason", "peak_bytes")}), flush=True
            )
            if all(gradients.values()):
                keep({"rows": rows, "figures": figures(rows, gradients, stages, options, len(inputs))})
    for lanes in both.values():
        lanes.close()


def figures(
    rows: Sequence[dict[str, Any]],
    gradients: dict[str, list[dict[str, Tensor]]],
    stages: Stages,
    options: argparse.Namespace,
    batches: int,
) -> dict[str, Any]:
    """What follows from steps of both kinds."""
    middle = {name: median([row for row in rows if row["schedule"] == name]) for name in gradients}
    count = len(stages)
    bound = count * batches / (batches + count - 1)
    speedup = middle["naive"]["seconds"] / middle["lanes"]["seconds"]
    tokens = batches * options.rows * options.length
    return {
        "speedup_over_naive": speedup,
        "bound": bound,
        "share_of_bound": speedup / bound,
        "gradient_error": difference(gradients["naive"][-1], gradients["lanes"][-1]),
        "naive_noise": difference(gradients["naive"][-1], gradients["naive"][0]),
        # Below 0.97 the naive run itself wastes time, and the comparison does not count.
        "naive_share_of_stage_times": sum(middle["naive"]["stage_busy_seconds"]) / middle["naive"]["seconds"],
        "busy_share": [seconds / middle["lanes"]["seconds"] for seconds in middle["lanes"]["stage_busy_seconds"]],
        "tokens_per_second": {name: tokens / row["seconds"] for name, row in middle.items()},
        "peak_bytes": {name: row["peak_bytes"] for name, row in middle.items()},
        "cuts": list(stages.cuts),
    }


def median(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of the median time."""
    return sorted(rows, key=lambda row: float(row["seconds"]))[len(rows) // 2]


def hardware(devices: Sequence[torch.device]) -> str:
    """What the stages lie on, as a file name takes it, e.g. "2xNVIDIA-H200" or "cpu"."""
    gpus = sorted({device.index or 0 for device in devices if device.type == "cuda"})
    return f"{len(gpus)}x{torch.cuda.get_device_name(gpus[0]).replace(' ', '-')}" if gpus else "cpu"


def main(arguments: Sequence[str]) -> Path:
    """Run the benchmark; returns the file written."""
    options = parse(arguments)
    devices = [torch.device(name) for name in options.devices.split(",")]
    model = build(options, devices[0])
    layers = SHAPES[options.shape]["num_hidden_layers"]
    even = [layers * stage // len(devices) for stage in range(len(devices))]
    stages = split(model, [int(cut) for cut in options.cuts.split(",")] if options.cuts else even, devices)
    options.length = options.length or (128 if devices[0].type == "cpu" else 2048)
    generator = torch.Generator().manual_seed(1)
    shape = (options.micro_batches, options.rows, options.length)
    ids = torch.randint(0, VOCABULARY[options.shape], shape, generator=generator)
    inputs = [{"input_ids": each.to(devices[0]), "labels": each.to(stages.head_device)} for each in ids]
    if not options.cuts and len(devices) > 1:
        with bounded(options.step_seconds):
            cuts = balanced(stages, inputs)
        stages.undo()
        stages = split(model, cuts, devices)
    record: dict[str, Any] = {
        "name": "lanes",
        "hardware": hardware(devices),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
        | {"python": platform.python_version()},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python", "examples/benchmarks/lanes.py", *told(arguments)]),
    }
    options.results.mkdir(parents=True, exist_ok=True)
    path: Path = options.results / f"lanes.{record['hardware']}.json"

    def keep(measured: dict[str, Any]) -> None:
        record.update(measured)
        path.write_text(json.dumps(record, indent=1) + "\n")

    measure(stages, options, inputs, keep)
    print(json.dumps(record["figures"], indent=1))
    return path


if __name__ == "__main__":
    torch.set_num_threads(1)  # stages on a CPU stand for devices: each works with one core
    print(main(sys.argv[1:]))
