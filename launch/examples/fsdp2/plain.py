"""A training loop around torch's FSDP2.

torchrun --nproc-per-node 2 plain.py MODEL DATA.jsonl
"""

import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import tokenized, windows

model_path, data_path = sys.argv[1:3]
torch.distributed.init_process_group()
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
tokenizer = AutoTokenizer.from_pretrained(model_path)
model = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
data = tokenized(data_path, tokenizer)
for step, window in enumerate(windows(data, tokenizer, rank=rank, world=world, steps=5)):
    tokens = sum((b["labels"][:, 1:] != -100).sum() for b in window)
    torch.distributed.all_reduce(tokens)
    losses = []
    for inputs in window:
        inputs.pop("risk")
        loss = model(**inputs, num_items_in_batch=tokens).loss * world
        loss.backward()
        losses.append(loss.detach())
    optimizer.step()
    optimizer.zero_grad()
    total = sum(losses) / world
    torch.distributed.all_reduce(total)
    if rank == 0:
        print(f"step {step} loss {total:.6f}", flush=True)
