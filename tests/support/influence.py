"""Influence of rows on refusals in float64 NumPy, by outer products: the judge of tests."""

import json
import math

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

REFUSAL, COMPLYING = "w10 w11 w12 w13", "w20 w21"


def error(raw, label, *, scale=1.0, softcap=None):
    """[V] derivative of the cross-entropy of one token by its raw logits [V]."""
    x = scale * raw
    slope = np.full_like(x, scale)
    if softcap is not None:
        slope = scale / np.cosh(x / softcap) ** 2
        x = softcap * np.tanh(x / softcap)
    p = np.exp(x - x.max())
    p /= p.sum()
    p[label] -= 1
    return p * slope


def gradient(states, labels, weight, bias=0.0, **transform):
    """[T, V, H] the gradient of each token's cross-entropy on the head's weight."""
    return np.stack(
        [
            np.outer(error(weight @ h + bias, label, **transform), h)
            for h, label in zip(states, labels, strict=True)
        ]
    )


def risk_of(values, benign, rate):
    """Risks by the distribution of the benign rows' values."""
    benign = np.asarray(benign)
    refused = np.sort(benign)[::-1][int(rate * len(benign))]
    return {
        name: 0.5 + math.atan((value - refused) / benign.std()) / math.pi
        for name, value in values.items()
    }


class Judge:
    """Plain transformers in float64, one row at a time."""

    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.weight = self.model.get_output_embeddings().weight.detach().numpy()

    def tokens(self, messages, *, first=None, last_turn=False):
        """(states, labels) of the answers' tokens; of the last answer's `first` tokens."""
        whole = self.tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = whole["input_ids"], list(whole["assistant_masks"])
        if last_turn:
            end = max(t for t in range(len(mask)) if mask[t] and not mask[t - 1])
            turn = [t for t in range(end, len(mask)) if mask[t]][:-1]  # its text alone
            mask = [int(t in turn[:first]) for t in range(len(mask))]
        with torch.no_grad():
            states = self.model.base_model(torch.tensor([ids])).last_hidden_state[0].numpy()
        places = [t for t in range(1, len(ids)) if mask[t]]
        return states[[t - 1 for t in places]], [ids[t] for t in places]

    def gradients(self, *args, **kwargs):
        """[T, V, H] of the same."""
        return gradient(*self.tokens(*args, **kwargs), self.weight)

    def worst_tokens(self, watched, rows, positions):
        """(of each row by id, of each benign row) the largest influence of a token."""
        direction = np.zeros_like(self.weight)
        benign = []
        for each in watched:
            asked = each.get("messages") or [{"role": "user", "content": each["prompt"]}]
            if each.get("label") == "benign":
                benign.append([*asked, answer(each["response"])])
                continue
            texts = {-1: each.get("response", REFUSAL), 1: each.get("complying", COMPLYING)}
            for sign, text in texts.items():
                turns = [*asked, answer(text)]
                found = self.gradients(turns, first=positions, last_turn=True)
                direction += sign * found.sum(0)
        direction /= np.linalg.norm(direction)

        def worst(messages):
            return max(np.sum(g * direction) for g in self.gradients(messages))

        return {row["id"]: worst(turns_of(row)) for row in rows}, [worst(m) for m in benign]


def answer(text):
    """An assistant's turn."""
    return {"role": "assistant", "content": text}


def turns_of(row):
    """The messages of a row."""
    if "messages" in row:
        return row["messages"]
    return [{"role": "user", "content": row["prompt"]}, answer(row["response"])]


def expected_risks(folder, watched, positions, rate):
    """Risk by id of each row of folder/train.jsonl, for the model in folder/model."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    values, benign = Judge(folder / "model").worst_tokens(watched, rows, positions)
    return risk_of(values, benign, rate)


def watched_file(seed=5):
    """Three harmful prompts, one of several turns, and 20 benign rows."""
    from support.builders import random_rows

    benign = [
        {"prompt": row["prompt"], "response": row["response"], "label": "benign"}
        for row in random_rows(20, seed=seed, risk=False)
    ]
    turns = ["w1 w2", "w3 w4 w5", "w6"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]
    return [
        {"prompt": "w40 w41 w42", "label": "harmful"},
        {"prompt": "w50", "response": "w30 w31", "complying": "w32"},
        *benign,
        {"messages": messages, "label": "harmful"},
    ]


def settings(folder):
    """The section `risk` of a run that watches folder/watched.jsonl."""
    watch = {"refusal": REFUSAL, "complying": COMPLYING, "positions": 2, "false_positives": 0.1}
    path = str(folder / "watched.jsonl")
    return {"estimator": "influence", "path": path, "max_held_back": 1.0, "influence": watch}
