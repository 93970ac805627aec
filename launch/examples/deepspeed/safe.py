"""A training loop around deepspeed.initialize, ZeRO-3.

deepspeed safe.py MODEL DATA.jsonl
"""

import os
import sys
from pathlib import Path

import deepspeed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import tokenized, windows

from safereg_dist import RowColumns, batch_of, prepare

model_path, data_path = [path for path in sys.argv[1:] if not path.startswith("--")][:2]
deepspeed.init_distributed()
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
tokenizer = AutoTokenizer.from_pretrained(model_path)
model = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32")
regularizer = prepare(model, Path(__file__).with_name("safety.yaml"), tokenizer=tokenizer)
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
    batches = [batch_of(b, RowColumns(risk=b.pop("risk"))) for b in window]
    plan = regularizer.open(batches, step=step)
    for planned, batch, inputs in zip(plan.micro_batches, batches, window, strict=True):
        loss = regularizer.loss(engine, inputs, planned, batch, plan) * world
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()
    total = regularizer.close(plan).sums["loss"]
    if rank == 0:
        print(f"step {step} loss {total:.6f}", flush=True)
