"""A training loop around deepspeed.initialize, ZeRO-3.

deepspeed plain.py MODEL DATA.jsonl
"""

import os
import sys
from pathlib import Path

import deepspeed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import tokenized, windows

model_path, data_path = [path for path in sys.argv[1:] if not path.startswith("--")][:2]
deepspeed.init_distributed()
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
tokenizer = AutoTokenizer.from_pretrained(model_path)
model = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
    config={
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    },
)
data = tokenized(data_path, tokenizer)
for step, window in enumerate(windows(data, tokenizer, rank=rank, world=world, steps=5)):
    tokens = sum((b["labels"][:, 1:] != -100).sum() for b in window)
    torch.distributed.all_reduce(tokens)
    losses = []
    for inputs in window:
        inputs.pop("risk")
        loss = engine(**inputs, num_items_in_batch=tokens).loss * world
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()
        losses.append(loss.detach())
    total = sum(losses) / world
    torch.distributed.all_reduce(total)
    if rank == 0:
        print(f"step {step} loss {total:.6f}", flush=True)
