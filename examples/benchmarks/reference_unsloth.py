"""The reference: a stock Unsloth script as its users write it, batch 1 x accumulation 4, on rows of a JSONL file.

    python examples/benchmarks/reference_unsloth.py MODEL ROWS STEPS RESULT
    torchrun --nproc_per_node=2 examples/benchmarks/reference_unsloth.py MODEL ROWS STEPS RESULT

Beside ours, on the same rows and samples a step:

    parallel-tune bench ... --reference "python examples/benchmarks/reference_unsloth.py {model} {rows} {steps} {result}
        --global_batch {global_batch} --max_seq_length {max_seq_length}"

Writes the seconds, tokens and loss of each optimizer step as JSON. Nothing of parallel-tune is in it. Without a GPU it
runs on Unsloth's CPU backend, to be tried out.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any


def main() -> None:
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
    options = parser.parse_args()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if options.global_batch is not None:
        options.accumulation, rest = divmod(options.global_batch, options.batch * processes)
        if rest or not options.accumulation:
            parser.error(f"{processes} processes with batch {options.batch} cannot make {options.global_batch} samples")

    import unsloth  # noqa: F401, I001  it has to come first
    import torch
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=options.model,
        max_seq_length=options.max_seq_length,
        dtype=torch.bfloat16 if cuda else torch.float32,
        load_in_4bit=options.load_in_4bit,
        device_map={"": local_rank if cuda else "cpu"},
        use_exact_model_name=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
    )
    dataset = load_dataset("json", data_files=str(options.rows), split="train")

    class Times(TrainerCallback):  # type: ignore[misc]
        """When each step ended, and its loss."""

        def __init__(self) -> None:
            self.ends: list[float] = []
            self.losses: list[float] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.ends.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(logs["loss"])

    times = Times()
    trainer = SFTTrainer(
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
            optim="adamw_8bit" if cuda else "adamw_torch",
            weight_decay=0.01,
            lr_scheduler_type="linear",
            seed=3407,
            logging_steps=1,
            bf16=cuda,
            use_cpu=not cuda,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
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
            "tokens": [sum(step) for step in zip(*(each for each, _ in told), strict=True)],
            "samples": options.batch * options.accumulation * processes,
            "losses": times.losses,
            "used_bytes": [used for _, used in told] if cuda else None,
            "processes": processes,
        }
        options.result.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
