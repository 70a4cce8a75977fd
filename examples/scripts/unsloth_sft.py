"""Fine-tune with Unsloth and TRL's SFTTrainer: a script as people write them.

python unsloth_sft.py MODEL DATA OUTPUT
parallel-tune launch --strategy ddp unsloth_sft.py MODEL DATA OUTPUT
parallel-tune launch --strategy model_parallel --model MODEL unsloth_sft.py MODEL DATA OUTPUT
"""

from unsloth import FastLanguageModel  # isort: skip

import argparse
import os
from pathlib import Path

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

PROMPT = "### Instruction:\n{}\n\n### Response:\n{}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data", help="a JSONL file, or a dataset on the Hub, with instruction and output")
    parser.add_argument("output")
    parser.add_argument("--max_seq_length", type=int, default=1024)
    parser.add_argument("--load_in_4bit", action="store_true")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=2)
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    args = parser.parse_args()

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=args.model,
        max_seq_length=args.max_seq_length,
        load_in_4bit=args.load_in_4bit,
        dtype=None,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth",
        random_state=3407,
    )
    print("process", os.environ.get("RANK", "0"), "of", os.environ.get("WORLD_SIZE", "1"))
    print("layers on", [str(next(layer.parameters()).device) for layer in model.get_decoder().layers])

    if Path(args.data).exists():
        dataset = load_dataset("json", data_files=args.data, split="train")
    else:
        dataset = load_dataset(args.data, split="train")
    dataset = dataset.map(
        lambda row: {"text": PROMPT.format(row["instruction"], row["output"]) + tokenizer.eos_token},
        remove_columns=dataset.column_names,
    )
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=dataset,
        args=SFTConfig(
            output_dir=args.output,
            dataset_text_field="text",
            max_length=args.max_seq_length,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            max_steps=args.max_steps,
            warmup_steps=2,
            learning_rate=args.learning_rate,
            optim="adamw_torch",
            lr_scheduler_type="linear",
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            fp16=torch.cuda.is_available() and not torch.cuda.is_bf16_supported(),
            logging_steps=1,
            save_strategy="no",
            seed=3407,
            report_to="none",
        ),
    )
    trainer.train()
    if trainer.is_world_process_zero():
        model.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
        print(f"saved to {args.output}")


if __name__ == "__main__":
    main()
