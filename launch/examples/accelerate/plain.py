"""A training loop with accelerate.

accelerate launch plain.py MODEL DATA.jsonl
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import tokenized, windows

model_path, data_path = sys.argv[1:3]
accelerator = Accelerator()
rank, world = accelerator.process_index, accelerator.num_processes
tokenizer = AutoTokenizer.from_pretrained(model_path)
model = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
model, optimizer = accelerator.prepare(model, optimizer)
data = tokenized(data_path, tokenizer)
for step, window in enumerate(windows(data, tokenizer, rank=rank, world=world, steps=5)):
    tokens = sum((b["labels"][:, 1:] != -100).sum() for b in window)
    tokens = accelerator.reduce(tokens)
    losses = []
    for inputs in window:
        inputs.pop("risk")
        loss = model(**inputs, num_items_in_batch=tokens).loss * world
        accelerator.backward(loss)
        losses.append(loss.detach())
    optimizer.step()
    optimizer.zero_grad()
    total = sum(losses) / world
    total = accelerator.reduce(total)
    if rank == 0:
        print(f"step {step} loss {total:.6f}", flush=True)
