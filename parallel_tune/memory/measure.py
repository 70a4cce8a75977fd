"""The short-lived process that measures a machine's constants on its GPUs.

python -m parallel_tune.memory.measure UUID [UUID] [--in_4bit]     (CUDA_VISIBLE_DEVICES holds the same)

Prints one JSON object. The first GPU's figures count; the second one is there for NCCL. What lies outside torch's
allocator is what NVML says of this process; where it does not say that, a difference of the card's use, so that other
processes there do no harm as long as they keep still.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parallel_tune.memory.constants import IN_4BIT
from parallel_tune.nvml import own_bytes
from parallel_tune.process import die_with_parent, leave

MIB = 1 << 20
SETTLE_SECONDS = 0.2
SETTLE_ATTEMPTS = 50
NCCL_SECONDS = 60


class Gpu:
    """One GPU: what this process has in use there, and what of that torch's allocator holds.

    Args:
        nvml: pynvml, but for tests.
    """

    def __init__(self, uuid: str, ordinal: int, nvml: Any = None) -> None:
        if nvml is None:
            import pynvml

            nvml = pynvml
            nvml.nvmlInit()
        self.ordinal = ordinal
        self._nvml, self._handle = nvml, nvml.nvmlDeviceGetHandleByUUID(uuid)
        # This process has nothing there yet. The import takes a second or two: who keeps still meanwhile has settled.
        before = self._card_bytes()
        import torch  # noqa: F401

        self._idle_bytes = before if self._card_bytes() == before else _settled(self._card_bytes)

    def outside_bytes(self) -> int:
        """What this process has in use beside torch's allocator.

        Raises:
            RuntimeError: NVML does not tell processes apart, and another one keeps changing what is in use.
        """
        import torch

        torch.cuda.synchronize(self.ordinal)
        reserved = int(torch.cuda.memory_reserved(self.ordinal))
        own = own_bytes(self._nvml, self._handle, reserved)
        return (self._taken_bytes() if own is None else own) - reserved

    def _taken_bytes(self) -> int:
        """What the card has in use beyond what it had when this process came."""
        used = _settled(self._card_bytes)
        if used is None or self._idle_bytes is None:
            raise RuntimeError("another process is changing its use of the GPU's memory")
        return used - self._idle_bytes

    def _card_bytes(self) -> int:
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)


def _settled(read: Callable[[], int]) -> int | None:
    """What two readings agree on; None if none do."""
    before = read()
    for _ in range(SETTLE_ATTEMPTS):
        time.sleep(SETTLE_SECONDS)
        now = read()
        if now == before:
            return now
        before = now
    return None


def train_a_little(device: Any, dtype: Any) -> None:
    """Two optimizer steps with the operations of a decoder, so that the libraries load what a run makes them load."""
    import torch
    from torch.nn import functional
    from torch.optim.adamw import adamw

    tokens, hidden, vocabulary = 256, 512, 4096
    table = torch.nn.Embedding(vocabulary, hidden, device=device, dtype=dtype)
    layer = torch.nn.Linear(hidden, 3 * hidden, bias=False, device=device, dtype=dtype)
    adapter = torch.nn.Linear(hidden, hidden, bias=False, device=device, dtype=torch.float32)
    head = torch.nn.Linear(hidden, vocabulary, bias=False, device=device, dtype=dtype)
    parameters: list[torch.Tensor] = [
        *table.parameters(),
        *layer.parameters(),
        *adapter.parameters(),
        *head.parameters(),
    ]
    ids = torch.arange(2 * tokens, device=device).remainder(vocabulary).view(2, tokens)
    for fused in (False, True):
        for mask in (None, torch.ones(2, 1, tokens, tokens, dtype=torch.bool, device=device)):
            with torch.autocast(device.type, dtype):
                states = table(ids)
                states = states * torch.rsqrt(states.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(dtype)
                query, key, value = (part.view(2, tokens, 8, 64).transpose(1, 2) for part in layer(states).chunk(3, -1))
                states = functional.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None)
                states = functional.silu(states.transpose(1, 2).reshape(2, tokens, hidden))
                logits = head(states + adapter(states))
            loss = functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        moments, squares = ([torch.zeros_like(gradient) for gradient in gradients] for _ in range(2))
        steps = [torch.zeros((), device=device if fused else "cpu") for _ in gradients]
        # An optimizer object would import all of torch's compiler first, which takes a second.
        with torch.no_grad():
            adamw(
                parameters, gradients, moments, squares, [], steps, foreach=not fused, fused=fused, amsgrad=False,
                beta1=0.9, beta2=0.999, lr=1e-3, weight_decay=0.01, eps=1e-8, maximize=False,
            )  # fmt: skip
        for parameter in parameters:
            parameter.grad = None


def nf4_scratch_bytes(gpu: Gpu, dtype: Any) -> int | None:
    """What bitsandbytes holds beyond the 16-bit weight of one product, inside and outside the allocator; None without
    bitsandbytes."""
    import torch

    try:
        import bitsandbytes
    except ImportError:
        return None
    device = torch.device("cuda", gpu.ordinal)
    outside = gpu.outside_bytes()
    size, rows = 4096, 128
    weight = torch.empty(size, size, dtype=dtype, device=device).normal_()
    wide_bytes = weight.numel() * weight.element_size()
    packed, state = bitsandbytes.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    del weight
    source = torch.ones(rows, size, dtype=dtype, device=device, requires_grad=True)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = bitsandbytes.matmul_4bit(source, packed.t(), quant_state=state)
    result.backward(torch.ones_like(result))
    torch.cuda.synchronize(device)
    # The product, its gradient, and the gradient of its source.
    counted = wide_bytes + 3 * rows * size * result.element_size()
    inside = max(0, int(torch.cuda.max_memory_allocated(device)) - before - counted)
    del result, source, packed, state
    _give_back()
    return int(inside + max(0, gpu.outside_bytes() - outside))


def nccl_bytes(gpu: Gpu, rank: int, store: Path) -> int:
    """What a group of two processes adds once it has reduced and broadcast, small and large."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", gpu.ordinal)
    torch.cuda.set_device(device)  # else what names no device makes a context on the other card
    torch.zeros(1, device=device)
    _give_back()
    before = gpu.outside_bytes()
    dist.init_process_group(
        "nccl",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=NCCL_SECONDS),
        device_id=device,
    )
    for size in (1, 64 * MIB):
        tensor = torch.zeros(size, device=device)
        dist.broadcast(tensor, 0)
        dist.all_reduce(tensor)
    dist.barrier()
    del tensor
    _give_back()
    return max(0, gpu.outside_bytes() - before)


def _give_back() -> None:
    import torch

    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def measure(uuids: list[str], store: Path, in_4bit: bool) -> dict[str, Any]:
    """The constants of the first GPU; `nccl_bytes` is None without a second one, with the reason if it failed, and
    `nf4_scratch_bytes` unless 4-bit weights are asked for.

    Raises:
        RuntimeError: the card is in use by others, or CUDA does not work.
    """
    gpu = Gpu(uuids[0], 0)
    import torch

    device = torch.device("cuda", 0)
    smallest = [
        torch.empty(512, dtype=torch.uint8, device=device),
        torch.empty(MIB + 1, dtype=torch.uint8, device=device),
    ]
    segment_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    smallest.clear()
    dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    train_a_little(device, dtype)
    _give_back()
    found: dict[str, Any] = {
        "context_bytes": gpu.outside_bytes(),
        "workspace_bytes": int(torch.cuda.memory_allocated(device)),
        "segment_bytes": int(segment_bytes),
        "nf4_scratch_bytes": nf4_scratch_bytes(gpu, dtype) if in_4bit else None,
        "nccl_bytes": None,
        "gpus": len(uuids[:2]),
        "notes": [],
    }
    if len(uuids) > 1:
        command = [sys.executable, "-m", "parallel_tune.memory.measure", *uuids, "--peer", str(store)]
        with subprocess.Popen(command, preexec_fn=die_with_parent, stdout=subprocess.DEVNULL) as peer:
            try:
                found["nccl_bytes"] = nccl_bytes(gpu, 0, store)
            except Exception as error:  # the other figures stand; the plan says that this one is built in
                found["notes"].append(f"NCCL: {type(error).__name__}: {str(error).splitlines()[0]}")
            finally:
                peer.kill()
    return found


def main(arguments: list[str]) -> None:
    """Measure, print, and leave without waiting for NCCL's threads."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("uuids", nargs="+")
    parser.add_argument(IN_4BIT, action="store_true", help="what 4-bit weights take too")
    parser.add_argument("--peer", type=Path, default=None, help="take part in NCCL's measurement through this file")
    options = parser.parse_args(arguments)
    if options.peer is not None:
        nccl_bytes(Gpu(options.uuids[1], 1), 1, options.peer)
        time.sleep(NCCL_SECONDS)  # the first one reads its card while the group still stands, then ends this
        leave(0)
    # Libraries print what they like: the result goes where they do not.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(options.uuids, Path(folder) / "store", options.in_4bit)), file=out, flush=True)
    leave(0)


if __name__ == "__main__":
    main(sys.argv[1:])
