"""Rows for the examples: token ids, labels and risk of chats in a JSONL file."""

import torch
from datasets import load_dataset
from transformers import DataCollatorForSeq2Seq


def tokenized(path, tokenizer):
    """A data set with `input_ids`, `labels` (-100 on the prompt) and `risk`."""

    def encode(row):
        chat = row["messages"]
        ids = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
        prompt = tokenizer.apply_chat_template(
            chat[:-1], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}

    rows = load_dataset("json", data_files=str(path), split="train")
    return rows.map(encode, remove_columns=["messages"])


def windows(data, tokenizer, *, rank, world, steps, rows=2, accumulation=2):
    """The micro-batches of each optimizer step, padded; `risk` is a tensor of each."""
    collate = DataCollatorForSeq2Seq(tokenizer)
    for step in range(steps):
        first = step * rows * accumulation * world + rank
        own = [
            data[i % len(data)] for i in range(first, first + rows * accumulation * world, world)
        ]
        yield [micro_batch(own[i : i + rows], collate) for i in range(0, len(own), rows)]


def micro_batch(rows, collate):
    """One padded micro-batch."""
    tokens = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
    return {**collate(tokens), "risk": torch.tensor([row["risk"] for row in rows])}
