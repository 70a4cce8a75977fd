"""Preference tuning with TRL's DPOTrainer and a LoRA adapter: a script as people write them.

python dpo.py MODEL OUTPUT
parallel-tune launch --strategy ddp dpo.py MODEL OUTPUT
"""

import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

model_name, output_dir = sys.argv[1:3]

model = AutoModelForCausalLM.from_pretrained(model_name)
tokenizer = AutoTokenizer.from_pretrained(model_name)

questions = ["How do I greet someone?", "What is two plus two?", "Name a colour.", "Is water wet?"]
dataset = Dataset.from_list(
    [{"prompt": q, "chosen": " Certainly: here is a short answer.", "rejected": " I would rather not say."}
     for q in questions * 4]
)  # fmt: skip

trainer = DPOTrainer(
    model=model,
    args=DPOConfig(
        output_dir=output_dir,
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=1e-4,
        max_length=64,
        logging_steps=1,
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    ),
    train_dataset=dataset,
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model(output_dir)
