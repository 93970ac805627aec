"""Fine-tunes a chat model by LoRA with transformers.Trainer.

python safe.py MODEL DATA.jsonl OUTPUT
"""

import sys
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    TrainingArguments,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import tokenized

from safereg_dist.integrations.trainer import SafeRegTrainer

model_path, data_path, output = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(model_path)
model = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
trainer = SafeRegTrainer(
    model=model,
    args=TrainingArguments(
        output,
        max_steps=5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
    ),
    train_dataset=tokenized(data_path, tokenizer),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
    safereg=Path(__file__).with_name("safety.yaml"),
)
trainer.train()
trainer.save_model()
