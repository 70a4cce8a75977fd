"""What capturing a split model's stages gains: naive and in lanes, eager, captured, and with compiled layers.

    python examples/benchmarks/captured_lanes.py                                      # on the CPU, small, eager only
    python examples/benchmarks/captured_lanes.py --devices cuda:0,cuda:0 --shape 8b   # both stages on one GPU
    python examples/benchmarks/captured_lanes.py --devices cuda:0,cuda:1 --shape 8b

Random weights, joined random rows, bf16 LoRA by transformers and peft. One way after the other, so that no way's memory
is in another's; figures are medians. A way that fails is written down with its error, and the rest goes on; one that
hangs ends the benchmark, and shows what each thread was doing. Writes results/captured_lanes.HARDWARE.json beside this
file, anew after each row; with --go_on rows of the same model and schedule that are there are kept, and only the naive
way, which the others are held against, is measured once more.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parents[2]))  # a checkout is enough, nothing has to be installed

import lanes as lane_benchmark
import torch
from running import told
from torch import Tensor

from parallel_tune.data import fill_up, join
from parallel_tune.row_arguments import model_arguments, with_boundaries_on
from parallel_tune.row_attention import use_row_attention
from strategies.compiled_layers import many_variants
from strategies.pipeline import Lanes
from strategies.stage_capture import StageCapture
from strategies.stage_graphs import StageGraphs
from strategies.stages import Stages, split

MOST_TOKENS_OF_A_ROW = 512


@dataclass(frozen=True)
class Way:
    """A way of working off a step's micro-batches."""

    name: str
    in_lanes: bool
    captured: bool = False
    compiled: bool = False


WAYS = (
    Way("naive", in_lanes=False),
    Way("lanes", in_lanes=True),
    Way("captured naive", in_lanes=False, captured=True),
    Way("captured lanes", in_lanes=True, captured=True),
    Way("compiled lanes", in_lanes=True, compiled=True),
    Way("compiled captured lanes", in_lanes=True, captured=True, compiled=True),
)
"""Compiled layers come last: nothing takes them back."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--devices", default="cpu,cpu", help="one a stage, e.g. cuda:0,cuda:1 or cuda:0,cuda:0")
    parser.add_argument("--shape", choices=sorted(lane_benchmark.SHAPES), default="small")
    parser.add_argument("--cuts", default="", help="first layer of each stage, e.g. 0,18; even if not given")
    parser.add_argument("--lanes", type=int, default=0, help="as many as stages if not given")
    parser.add_argument("--micro_batches", type=int, default=6)
    parser.add_argument("--tokens", default="512,2048,4096", help="of a micro-batch; several are measured in turn")
    parser.add_argument("--ways", default=",".join(way.name for way in WAYS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--way_seconds", type=float, default=180.0, help="that one way may take at one size")
    parser.add_argument("--go_on", action="store_true", help="keep the good rows of the results file")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args(arguments)


def micro_batches(stages: Stages, count: int, tokens: int, vocabulary: int) -> list[dict[str, Any]]:
    """Joined rows filled up to a fixed size on GPUs, as captured runs have them; a whole row on a CPU."""
    generator = torch.Generator().manual_seed(1)
    devices = list(dict.fromkeys(stages.devices))
    made = []
    for _ in range(count):
        length = min(tokens, MOST_TOKENS_OF_A_ROW)
        ids = torch.randint(3, vocabulary, (tokens // length, length), generator=generator).tolist()
        rows: Any = [{"input_ids": row, "labels": row} for row in ids]
        tensors = fill_up(join(rows, 0), 0, tokens, len(rows))
        if devices[0].type == "cpu":
            del tensors["cu_seq_lens"]  # read on the host there
        batch = with_boundaries_on({name: tensor.to(devices[0]) for name, tensor in tensors.items()}, devices)
        made.append({**batch, "labels": tensors["labels"].to(stages.head_device)})
    return made


def step(stages: Stages, lanes: Lanes, inputs: Sequence[dict[str, Tensor]]) -> tuple[dict[str, float], Tensor]:
    """Times of all micro-batches' forward and backward, and the gradients they left, on the host."""
    model: Any = stages.model

    def forward(_: int, batch: Any) -> Tensor:
        arguments, keep_to_rows = model_arguments(batch, "transformers")
        with keep_to_rows:
            return model(**(arguments | {"use_cache": False})).loss  # type: ignore[no-any-return]

    model.zero_grad(set_to_none=True)
    lane_benchmark.wait(stages)
    start, cpu_start = time.perf_counter(), time.process_time()
    lanes.run(inputs, forward)
    issued, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    lane_benchmark.wait(stages)
    times = {"seconds": time.perf_counter() - start, "issued_seconds": issued, "host_cpu_seconds": cpu}
    gradients = [p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None]
    return times, torch.cat(gradients)


@contextlib.contextmanager
def opened(stages: Stages, way: Way, num_lanes: int) -> Iterator[tuple[Lanes, StageCapture | None]]:
    """The lanes of a way; what they recorded is freed at the end."""
    captured = None
    if way.captured:
        trained = [parameter for parameter in stages.model.parameters() if parameter.requires_grad]
        captured = StageCapture(stages, lambda: trained, StageGraphs(stages.devices))
    lanes = Lanes(stages, num_lanes if way.in_lanes else 1, captured=captured)
    try:
        yield lanes, captured
    finally:
        lanes.close()
        stages.model.zero_grad(set_to_none=True)
        if captured is not None:
            captured.close()
        if stages.head_device.type == "cuda":
            lane_benchmark.wait(stages)
            gc.collect()
            torch.cuda.empty_cache()


def measure(
    stages: Stages, way: Way, num_lanes: int, inputs: Sequence[dict[str, Tensor]], repeat: int
) -> tuple[dict[str, Any], list[Tensor]]:
    """Medians of a way's times, its memory, and the gradients of its last two steps."""
    with opened(stages, way, num_lanes) as (lanes, captured):
        for _ in range(2):  # the probe, lazily built tables, compilers, recordings
            step(stages, lanes, inputs)
        for device in lane_gpus(stages):
            torch.cuda.reset_peak_memory_stats(device)
        steps = [step(stages, lanes, inputs) for _ in range(repeat)]
        times = {name: sorted(each[name] for each, _ in steps)[len(steps) // 2] for name in steps[0][0]}
        row: dict[str, Any] = {**times, "all_seconds": [each["seconds"] for each, _ in steps], "reason": lanes.reason}
        row["reserved_bytes"] = [torch.cuda.max_memory_reserved(device) for device in lane_gpus(stages)]
        if captured is not None:
            row["captured"] = vars(captured.report).copy()
        return row, [gradients for _, gradients in steps[-2:]]


def lane_gpus(stages: Stages) -> list[torch.device]:
    return list(dict.fromkeys(device for device in stages.devices if device.type == "cuda"))


def distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).norm() / right.norm())


def attempt(work: Callable[[], tuple[dict[str, Any], list[Tensor]]]) -> tuple[dict[str, Any], list[Tensor]]:
    """What a way gave, or its error."""
    try:
        return work()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}, []


def compile_layers(stages: Stages) -> None:
    """Compile each decoder layer; layers of one shape share what is compiled."""
    for layer in stages.anatomy.layers:
        layer.compile(dynamic=False)


def main(arguments: Sequence[str]) -> Path:
    """Run the benchmark; returns the file written, anew after each way."""
    options = parse(arguments)
    options.full, options.checkpointing = False, False
    devices = [torch.device(name) for name in options.devices.split(",")]
    model = lane_benchmark.build(options, devices[0])
    use_row_attention(model)
    layers = lane_benchmark.SHAPES[options.shape]["num_hidden_layers"]
    even = [layers * stage // len(devices) for stage in range(len(devices))]
    stages = split(model, [int(cut) for cut in options.cuts.split(",")] if options.cuts else even, devices)
    wanted = options.ways.split(",")
    ways = [way for way in WAYS if way.name in wanted and (devices[0].type == "cuda" or not way.captured)]
    record: dict[str, Any] = {
        "name": "captured_lanes",
        "hardware": lane_benchmark.hardware(devices),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
        | {"python": platform.python_version()},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python", "examples/benchmarks/captured_lanes.py", *told(arguments)]),
        "shape": options.shape,
        "cuts": list(stages.cuts),
        "micro_batches": options.micro_batches,
        "rows": [],
        "figures": {},
    }
    options.results.mkdir(parents=True, exist_ok=True)
    path: Path = options.results / f"captured_lanes.{record['hardware']}.json"
    sizes = [int(tokens) for tokens in options.tokens.split(",")]
    if options.go_on and path.exists():
        record["rows"] = kept_rows(json.loads(path.read_text()), record)
    there = {(row["way"], row["tokens"]) for row in record["rows"]}
    references: dict[int, Tensor] = {}
    for way in ways:
        if way.compiled:
            compile_layers(stages)
        for tokens in sizes:
            if (way.name, tokens) in there:
                continue
            print(f"{way.name}, {tokens} tokens", file=sys.stderr, flush=True)
            inputs = micro_batches(stages, options.micro_batches, tokens, lane_benchmark.VOCABULARY[options.shape])
            count = options.lanes or len(stages)
            variants = many_variants() if way.compiled else contextlib.nullcontext()
            with lane_benchmark.bounded(options.way_seconds), variants:
                row, gradients = attempt(partial(measure, stages, way, count, inputs, options.repeat))
            if gradients:
                reference = references.setdefault(tokens, gradients[0])
                row["gradient_error"] = distance(gradients[-1], reference)  # of the naive way: its noise
                row["tokens_per_second"] = options.micro_batches * tokens / row["seconds"]
            record["rows"].append({"way": way.name, "tokens": tokens, **row})
            print(json.dumps(record["rows"][-1]), flush=True)
            record["figures"] = figures(record["rows"])
            path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def kept_rows(before: dict[str, Any], record: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier file that hold for this one."""
    if any(before.get(name) != record[name] for name in ("shape", "cuts", "micro_batches", "versions")):
        return []
    return [row for row in before["rows"] if "error" not in row and row["way"] != WAYS[0].name]


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By tokens of a micro-batch: each way's speed as a multiple of the naive one's, and its seconds of host time."""
    found: dict[str, Any] = {}
    for row in rows:
        naive = next((r for r in rows if r["way"] == "naive" and r["tokens"] == row["tokens"]), {})
        if "seconds" in row and "seconds" in naive:
            at = found.setdefault(str(row["tokens"]), {"speedup_over_naive": {}, "host_cpu_seconds": {}})
            at["speedup_over_naive"][row["way"]] = naive["seconds"] / row["seconds"]
            at["host_cpu_seconds"][row["way"]] = row["host_cpu_seconds"]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)  # stages on a CPU stand for devices: each works with one core
    print(main(sys.argv[1:]))
