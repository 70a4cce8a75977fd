"""The reference: a stock Unsloth script as its users write it, batch 1 x accumulation 4, on rows of a JSONL file.

    python examples/benchmarks/reference_unsloth.py MODEL ROWS STEPS RESULT [--packing-off ...]
    torchrun --nproc_per_node=2 examples/benchmarks/reference_unsloth.py MODEL ROWS STEPS RESULT

Writes the seconds, tokens and loss of each optimizer step as JSON. Nothing of parallel-tune is in it.
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
    parser.add_argument("--load_in_4bit", action="store_true")
    options = parser.parse_args()

    import unsloth  # noqa: F401, I001  it has to come first
    import torch
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(local_rank)
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=options.model,
        max_seq_length=options.max_seq_length,
        dtype=torch.bfloat16,
        load_in_4bit=options.load_in_4bit,
        device_map={"": local_rank},
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
            optim="adamw_8bit",
            weight_decay=0.01,
            lr_scheduler_type="linear",
            seed=3407,
            logging_steps=1,
            bf16=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
        ),
    )
    trainer.train()
    if local_rank == 0:
        result = {
            "seconds": [end - start for start, end in zip(times.ends, times.ends[1:], strict=False)],
            "losses": times.losses,
            "used_bytes": torch.cuda.mem_get_info(0)[1] - torch.cuda.mem_get_info(0)[0],
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
        }
        options.result.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
