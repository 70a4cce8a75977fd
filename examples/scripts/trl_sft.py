"""Fine-tune with TRL's SFTTrainer and a LoRA adapter: a script as people write them.

python trl_sft.py MODEL DATA OUTPUT
parallel-tune launch --strategy ddp trl_sft.py MODEL DATA OUTPUT
parallel-tune launch --strategy model_parallel --model MODEL trl_sft.py MODEL DATA OUTPUT
"""

import argparse
import os
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data", help="a JSONL file, or a dataset on the Hub, with instruction and output")
    parser.add_argument("output")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=2)
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    args = parser.parse_args()

    if Path(args.data).exists():
        dataset = load_dataset("json", data_files=args.data, split="train")
    else:
        dataset = load_dataset(args.data, split="train")
    dataset = dataset.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["instruction"]}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        },
        remove_columns=dataset.column_names,
    )
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    trainer = SFTTrainer(
        model=args.model,
        train_dataset=dataset,
        args=SFTConfig(
            output_dir=args.output,
            model_init_kwargs={"dtype": torch.bfloat16 if bf16 else torch.float32},
            max_length=args.max_length,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            max_steps=args.max_steps,
            warmup_steps=2,
            learning_rate=args.learning_rate,
            bf16=bf16,
            fp16=torch.cuda.is_available() and not bf16,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    print("process", os.environ.get("RANK", "0"), "of", os.environ.get("WORLD_SIZE", "1"))
    print("layers on", [str(next(layer.parameters()).device) for layer in trainer.model.get_decoder().layers])
    trainer.train()
    trainer.save_model(args.output)
    if trainer.is_world_process_zero():
        print(f"saved to {args.output}")


if __name__ == "__main__":
    main()
