"""Fine-tunes a chat model by LoRA with trl.SFTTrainer.

python safe.py MODEL DATA.jsonl OUTPUT
"""

import sys
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig

from safereg_dist.integrations.trl import SafeRegSFTTrainer

model, data, output = sys.argv[1:4]
trainer = SafeRegSFTTrainer(
    model=model,
    args=SFTConfig(
        output,
        max_steps=5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
    ),
    peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    train_dataset=load_dataset("json", data_files=data, split="train"),
    safereg=Path(__file__).with_name("safety.yaml"),
)
trainer.train()
trainer.save_model()
