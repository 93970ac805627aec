"""Hashes that identify a model's weights, a tokenizer, a row.

Sharded and whole copies of the same weights have the same fingerprint.

Each parameter gets two 64-bit sums over its values rounded to bfloat16, bits b_i at flat index i:

    s_1 = sum_i b_i  mod 2^64          s_2 = sum_i b_i (i + 1)  mod 2^64

Integer sums do not depend on their order, so shards on any number of ranks add up to the same pair;
rounding to bfloat16 first makes copies loaded in bfloat16 and in float32 agree. It detects lost,
swapped or altered weights; it is no defence against someone who forges weights on purpose.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from safereg_dist.models.adapters import weights_with

_CHUNK = 1 << 22  # elements per step: bounds the int64 temporaries to 32 MiB each


def checksum(flat: Tensor, start: int = 0) -> Tensor:
    """(s_1, s_2) of a 1-D piece that begins at flat index `start`; int64 [2]."""
    total = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for begin in range(0, flat.numel(), _CHUNK):
        piece = flat[begin : begin + _CHUNK].detach()
        bits = piece.to(torch.bfloat16).view(torch.int16).to(torch.int64)
        first = start + begin + 1
        index = torch.arange(first, first + bits.numel(), device=flat.device)
        total += torch.stack([bits.sum(), (bits * index).sum()])
    return total


def digest(entries: Iterable[tuple[str, tuple[int, ...], Tensor]]) -> str:
    """SHA-256 (hex) over sorted (name, shape, checksum) triples."""
    hasher = hashlib.sha256()
    for name, shape, sums in sorted(entries, key=lambda entry: entry[0]):
        hasher.update(f"{name} {tuple(shape)} {sums.tolist()}\n".encode())
    return hasher.hexdigest()


def model_fingerprint(model: nn.Module, adapters: Sequence[str] = ()) -> str:
    """Fingerprint of a model that this process holds whole; hex text. Collectives: none.

    Of a model with adapters (PEFT) it is that of the base model, and of it with those named.
    """
    return digest(
        (name, tuple(p.shape), checksum(p.detach().reshape(-1)).cpu())
        for name, p in weights_with(model, adapters)
    )


def prompt_key(input_ids: list[int], prompt_ends: list[int]) -> str:
    """SHA-256 (hex) of a row's tokens up to its last prompt end, and of where prompts end."""
    prompt = np.asarray(input_ids[: prompt_ends[-1] if prompt_ends else 0], dtype=np.int64)
    ends = np.asarray(prompt_ends, dtype=np.int64)
    return hashlib.sha256(prompt.tobytes() + ends.tobytes()).hexdigest()


def row_key(input_ids: list[int], loss_mask: list[int]) -> str:
    """SHA-256 (hex) of a row's tokens, and of which of them are the response's."""
    tokens = np.asarray([input_ids, loss_mask], dtype=np.int64)
    return hashlib.sha256(tokens.tobytes()).hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of the tokenizer: vocabulary and rules, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    if backend is not None:
        rules |= {"padding": None, "truncation": None}  # settings of its last call
    parts = [rules, tokenizer.all_special_ids, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
