"""A training loop around torch's FSDP2.

torchrun --nproc-per-node 2 safe.py MODEL DATA.jsonl
"""

import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import tokenized, windows

from safereg_dist import RowColumns, batch_of, prepare

model_path, data_path = sys.argv[1:3]
torch.distributed.init_process_group()
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
tokenizer = AutoTokenizer.from_pretrained(model_path)
model = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
regularizer = prepare(model, Path(__file__).with_name("safety.yaml"), tokenizer=tokenizer)
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
data = tokenized(data_path, tokenizer)
for step, window in enumerate(windows(data, tokenizer, rank=rank, world=world, steps=5)):
    batches = [batch_of(b, RowColumns(risk=b.pop("risk"))) for b in window]
    plan = regularizer.open(batches, step=step)
    for planned, batch, inputs in zip(plan.micro_batches, batches, window, strict=True):
        loss = regularizer.loss(model, inputs, planned, batch, plan) * world
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    total = regularizer.close(plan).sums["loss"]
    if rank == 0:
        print(f"step {step} loss {total:.6f}", flush=True)
