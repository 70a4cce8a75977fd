"""Fine-tune a causal language model with the transformers Trainer: a script as people write them.

python train_lm.py MODEL DATA.jsonl OUTPUT
parallel-tune launch --strategy ddp train_lm.py MODEL DATA.jsonl OUTPUT
"""

import argparse

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("output")
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model)

    dataset = load_dataset("json", data_files=args.data, split="train")
    dataset = dataset.map(
        lambda row: tokenizer(row["instruction"] + "\n" + row["output"], truncation=True, max_length=128),
        remove_columns=dataset.column_names,
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output,
            per_device_train_batch_size=2,
            max_steps=args.max_steps,
            learning_rate=args.learning_rate,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=dataset,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    trainer.save_model(args.output)
    if trainer.is_world_process_zero():
        print(f"saved to {args.output}")


if __name__ == "__main__":
    main()
