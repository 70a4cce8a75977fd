"""Train a reward model with TRL's RewardTrainer and a LoRA adapter: a script as people write them.

python reward.py MODEL OUTPUT
parallel-tune launch --strategy ddp reward.py MODEL OUTPUT
"""

import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

model_name, output_dir = sys.argv[1:3]

model = AutoModelForSequenceClassification.from_pretrained(model_name, num_labels=1)
tokenizer = AutoTokenizer.from_pretrained(model_name)

questions = ["How do I greet someone?", "What is two plus two?", "Name a colour.", "Is water wet?"]
dataset = Dataset.from_list(
    [{"chosen": f"{q} Certainly: here is an answer.", "rejected": f"{q} I would rather not say."}
     for q in questions * 4]
)  # fmt: skip

trainer = RewardTrainer(
    model=model,
    args=RewardConfig(
        output_dir=output_dir,
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=1e-4,
        max_length=64,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=dataset,
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS", modules_to_save=["score"]),
)
trainer.train()
trainer.save_model(output_dir)
