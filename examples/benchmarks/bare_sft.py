"""A bare SFTTrainer script as people write it, on rows of a JSONL file; nothing of parallel-tune is in it.

    python examples/benchmarks/bare_sft.py MODEL ROWS STEPS RESULT --engine transformers --batch 2
    torchrun --nproc_per_node=2 examples/benchmarks/bare_sft.py MODEL ROWS STEPS RESULT

Writes the seconds, tokens and loss of each optimizer step as JSON, and when the first one was done. Without a GPU
Unsloth takes its CPU backend, and transformers the loss of its own Trainer, since TRL's needs a Triton kernel.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def main(arguments: list[str]) -> None:
    """Train, and write what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("result", type=Path)
    parser.add_argument("--max_seq_length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument(
        "--global_batch", type=int, help="samples a step over all processes, in place of --accumulation"
    )
    parser.add_argument("--load_in_4bit", action="store_true")
    parser.add_argument("--engine", choices=("unsloth", "transformers"), default="unsloth")
    parser.add_argument("--checkpointing", choices=("none", "full", "unsloth"), default="unsloth")
    parser.add_argument("--optim", help="adamw_8bit on a GPU if left out")
    parser.add_argument("--lr_scheduler_type", default="linear")
    parser.add_argument("--padded", action="store_true", help="Unsloth joins rows by itself if it is not said")
    parser.add_argument("--in_order", action="store_true", help="take the rows as they come in the file")
    options = parser.parse_args(arguments)
    if sys.platform == "linux":
        # torchrun that is killed leaves its ranks running; this one ends with it.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if options.global_batch is not None:
        options.accumulation, rest = divmod(options.global_batch, options.batch * processes)
        if rest or not options.accumulation:
            parser.error(f"{processes} processes with batch {options.batch} cannot make {options.global_batch} samples")

    if options.engine == "unsloth":
        import unsloth  # noqa: F401  it has to come first

    import torch
    from datasets import load_dataset
    from transformers import Trainer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    device_map = {"": local_rank if cuda else "cpu"}
    dtype = torch.bfloat16 if cuda else torch.float32
    load = load_with_unsloth if options.engine == "unsloth" else load_with_transformers
    model, tokenizer = load(options, dtype, device_map)
    dataset = load_dataset("json", data_files=str(options.rows), split="train")

    class Times(TrainerCallback):  # type: ignore[misc]
        """When each step ended, and its loss."""

        def __init__(self) -> None:
            self.ends: list[float] = []
            self.issued: list[float] = []
            self.first_step_at = 0.0
            self.losses: list[float] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.ends.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.issued.append(time.perf_counter())
            if cuda:
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())
            self.first_step_at = self.first_step_at or time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(logs["loss"])

    times = Times()
    kind: Any = SFTTrainer
    if options.engine == "transformers" and not cuda:
        kind = type("OnCPU", (SFTTrainer,), {"compute_loss": Trainer.compute_loss})
    trainer = kind(
        model=model,
        processing_class=tokenizer,
        train_dataset=dataset,
        callbacks=[times],
        args=SFTConfig(
            output_dir=str(options.result.parent / "reference"),
            dataset_text_field="text",
            max_length=options.max_seq_length,
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=options.accumulation,
            max_steps=options.steps,
            warmup_steps=5,
            learning_rate=2e-4,
            optim=options.optim or ("adamw_8bit" if cuda else "adamw_torch"),
            weight_decay=0.01,
            lr_scheduler_type=options.lr_scheduler_type,
            train_sampling_strategy="sequential" if options.in_order else "random",
            seed=3407,
            logging_steps=1,
            bf16=cuda,
            use_cpu=not cuda,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
            gradient_checkpointing=options.checkpointing != "none",
            gradient_checkpointing_kwargs={"use_reentrant": False} if options.engine == "transformers" else None,
            **({"padding_free": False} if options.padded else {}),
        ),
    )
    # Tokens of each micro-batch, in the order in which they are trained.
    tokens: list[int] = []
    collate = trainer.data_collator

    def counting(rows: Any) -> Any:
        batch = collate(rows)
        mask = batch.get("attention_mask")
        tokens.append(int(batch["input_ids"].numel() if mask is None else mask.sum()))
        return batch

    trainer.data_collator = counting
    trainer.train()
    seconds = [end - start for start, end in zip(times.ends, times.ends[1:], strict=False)]
    starts = range(0, len(seconds) * options.accumulation, options.accumulation)
    step_tokens = [sum(tokens[start : start + options.accumulation]) for start in starts]
    used = torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0] if cuda else None
    told: list[Any] = [(step_tokens, used)]
    if processes > 1:
        told = [None] * processes
        torch.distributed.all_gather_object(told, (step_tokens, used))
    if local_rank == 0:
        result = {
            "seconds": seconds,
            "host_seconds": [end - start for start, end in zip(times.ends, times.issued, strict=False)],
            "tokens": [sum(step) for step in zip(*(each for each, _ in told), strict=True)],
            "samples": options.batch * options.accumulation * processes,
            "losses": times.losses,
            "used_bytes": [used for _, used in told] if cuda else None,
            "processes": processes,
            "first_step_at": times.first_step_at,
        }
        options.result.write_text(json.dumps(result))


def load_with_unsloth(options: Any, dtype: Any, device_map: dict[str, Any]) -> tuple[Any, Any]:
    """Unsloth's model and its adapters."""
    from unsloth import FastLanguageModel

    checkpointing = {"none": False, "full": True, "unsloth": "unsloth"}[options.checkpointing]
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=options.model,
        max_seq_length=options.max_seq_length,
        dtype=dtype,
        load_in_4bit=options.load_in_4bit,
        device_map=device_map,
        use_exact_model_name=True,
    )
    adapted = FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=checkpointing,
        random_state=3407,
    )
    return adapted, tokenizer


def load_with_transformers(options: Any, dtype: Any, device_map: dict[str, Any]) -> tuple[Any, Any]:
    """transformers' model with peft's adapters, trained in float32."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, device_map=device_map)
    model.requires_grad_(False)
    set_seed(3407)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return adapted, AutoTokenizer.from_pretrained(options.model)


if __name__ == "__main__":
    main(sys.argv[1:])
