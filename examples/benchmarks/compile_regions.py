"""torch.compile of each decoder layer against the eager and the captured pass: forward and backward at a fixed size.

    python examples/benchmarks/compile_regions.py                    # Qwen3-1.7B shape, transformers, one GPU
    python examples/benchmarks/compile_regions.py --shape qwen3-8b --tokens 2048 --variants compiled,captured
    python examples/benchmarks/compile_regions.py --small            # a tiny model on the CPU

Each variant runs in a process of its own with a time bound: compiling can take minutes, and one that takes too long or
fails is a result as well. "both" captures the compiled pass. Writes results/compile_regions.HARDWARE.json beside this
file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))
from bare_sft import load_with_transformers  # noqa: E402
from children import end_orderly  # noqa: E402
from running import Record, add_common, call, hardware_name, random_model, tried, work_folder  # noqa: E402

ROWS = 4


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen3-1b")
    parser.add_argument("--model", help="a folder that holds the shape already")
    parser.add_argument("--tokens", type=int, default=512, help=f"of a pass, {ROWS} rows")
    parser.add_argument("--variants", default="eager,compiled,captured,both")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    add_common(parser, run_seconds=150.0)
    return parser.parse_args(arguments)


def one(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one variant in this process."""
    import torch

    from parallel_tune.data import fill_up, join
    from parallel_tune.report import versions
    from parallel_tune.row_arguments import model_arguments
    from parallel_tune.row_attention import use_row_attention
    from strategies.replay import CudaGraphs, Replay

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    model, tokenizer = load_with_transformers(options, dtype, {"": 0 if cuda else "cpu"})
    use_row_attention(model)
    model.train()
    if options.variants in ("compiled", "both"):
        for layer in model.get_base_model().model.layers:
            layer.compile(dynamic=False, backend=options.backend)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(0)

    def batch() -> dict[str, Any]:
        # Rows of unequal lengths, others each time, at one size.
        cuts = torch.randperm(options.tokens - 8, generator=generator)[: ROWS - 1].sort().values + 4
        lengths = cuts.diff(prepend=torch.tensor([0]), append=torch.tensor([options.tokens - 2])).tolist()
        ids = [torch.randint(3, len(tokenizer), (length,), generator=generator).tolist() for length in lengths]
        tensors = fill_up(join([{"input_ids": row, "labels": row} for row in ids], 0), 0, options.tokens, ROWS)
        items = torch.tensor(options.tokens - ROWS)
        return {name: tensor.to(device) for name, tensor in {**tensors, "num_items_in_batch": items}.items()}

    def forward(_: int, inputs: Any) -> Any:
        arguments, keep_to_rows = model_arguments(inputs, "transformers")
        with torch.autocast(device.type, dtype, enabled=cuda, cache_enabled=False), keep_to_rows:
            return model(**arguments).loss

    step: Callable[[dict[str, Any]], Any]
    if options.variants in ("captured", "both"):
        replay = Replay(lambda: trained, device, CudaGraphs(device))

        def step(made: dict[str, Any]) -> Any:
            return replay.run([made], forward, backward=lambda loss: loss.backward())[0]
    else:

        def step(made: dict[str, Any]) -> Any:
            for parameter in trained:
                parameter.grad = None
            loss = forward(0, made)
            loss.backward()
            return loss.detach()

    seconds, losses = [], []
    for _ in range(4 + options.repeat):
        made = batch()
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        loss = step(made)
        issued = time.perf_counter() - start
        losses.append(float(loss))  # waits for the device
        seconds.append((time.perf_counter() - start, issued))
    found = {
        "milliseconds": 1e3 * statistics.median(whole for whole, _ in seconds[4:]),
        "milliseconds_p90": 1e3 * sorted(whole for whole, _ in seconds[4:])[int(0.9 * options.repeat)],
        "issued_milliseconds": 1e3 * statistics.median(issued for _, issued in seconds[4:]),
        "warm_up_seconds": sum(whole for whole, _ in seconds[:4]),
        "losses": losses,
        "versions": versions(),
    }
    if options.variants in ("captured", "both"):
        found["captured"] = vars(replay.report)
    return found


def measure(
    folder: Path, options: argparse.Namespace, has: Callable[[str], bool] = lambda _: False
) -> Iterator[dict[str, Any]]:
    """All variants but those that are there; one that fails or takes too long gives a row that says so."""
    model = options.model or str(random_model(options.shape, folder / options.shape))

    def run(variant: str) -> dict[str, Any]:
        result = folder / f"{variant}.json"
        call(
            [
                sys.executable, __file__, f"--model={model}", f"--variants={variant}", f"--tokens={options.tokens}",
                f"--backend={options.backend}", f"--repeat={options.repeat}", f"--one={result}",
            ],
            timeout=options.run_seconds,
        )  # fmt: skip
        return {"tokens": options.tokens, **json.loads(result.read_text())}

    for variant in options.variants.split(","):
        if not has(variant):
            yield tried(variant, partial(run, variant))


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds of each variant, what its first passes cost, and how many times as fast as eagerly it is."""
    ran = {row["what"]: row for row in rows if "milliseconds" in row}
    found: dict[str, Any] = {f"milliseconds_{name}": row["milliseconds"] for name, row in ran.items()}
    found |= {f"warm_up_seconds_{name}": row["warm_up_seconds"] for name, row in ran.items()}
    if "eager" in ran:
        eager = ran["eager"]
        found |= {f"speedup_{name}": eager["milliseconds"] / row["milliseconds"] for name, row in ran.items()}
        pairs = {name: zip(row["losses"], eager["losses"], strict=True) for name, row in ran.items()}
        found |= {f"losses_apart_{name}": max(abs(a - b) / b for a, b in pair) for name, pair in pairs.items()}
    return found


def main(arguments: list[str]) -> Path | None:
    """Run the benchmark; returns the file written."""
    options = parse(arguments)
    if options.one is not None:
        options.one.write_text(json.dumps(one(options)))
        return None
    if options.small:
        options.shape, options.variants, options.backend, options.tokens = "tiny", "eager,compiled", "aot_eager", 64
        options.repeat = 3
    record = Record("compile_regions", hardware_name(), options.results, arguments, options.go_on, shape=options.shape)
    with work_folder(options.work) as folder:
        for row in measure(folder, options, record.has):
            record.add(row, figures)
            print(json.dumps({name: row[name] for name in row if name not in ("losses", "versions")}), flush=True)
    print(json.dumps(record.content["figures"], indent=1))
    return record.path


if __name__ == "__main__":
    end_orderly()
    main(sys.argv[1:])
