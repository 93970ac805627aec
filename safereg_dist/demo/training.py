"""Training a small model of the embedded world from scratch, and writing it to a folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_with_min_lr_schedule_with_warmup,
)

from safereg_dist.demo.tokenizer import MAX_TOKENS
from safereg_dist.screen.progress import progress_bar

FINAL_FRACTION = 0.05  # of the peak learning rate, where the cosine ends
WARMUP_STEPS = 30
MAX_GRAD_NORM = 1.0

Sample = tuple[str, str]
"""What the model is given, and what it shall say."""


def train_from_scratch(
    tokenizer: PreTrainedTokenizerFast,
    draw_batch: Callable[[], list[Sample]],
    *,
    seed: int,
    steps: int,
    learning_rate: float,
    hidden_size: int,
    num_layers: int,
    name: str,
    progress: bool = True,
) -> LlamaForCausalLM:
    """A Llama model after `steps` batches: float32 on the CPU, tied head, 4 attention heads.

    Depends on its arguments only, but for how torch rounds with this number of threads; the global
    random state is left as it was. `learning_rate` is the peak. Collectives: none.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_architecture(tokenizer, hidden_size, num_layers)).train()
    encode = _encoder(tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, min(WARMUP_STEPS, steps), steps, min_lr_rate=FINAL_FRACTION
    )
    with progress_bar(total=steps, desc=name, unit=" steps", shown=progress) as bar:
        for step in range(steps):
            loss = _response_loss(model, [encode(sample) for sample in draw_batch()])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.update()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")
    return model.eval()


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a plain Hugging Face folder that `from_pretrained` loads."""
    model.generation_config = GenerationConfig(**_special_ids(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _architecture(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 21 // 8,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        dtype="float32",
        **_special_ids(tokenizer),
    )


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _encoder(tokenizer: PreTrainedTokenizerFast) -> Callable[[Sample], tuple[list[int], int]]:
    """A function from a sample to its token ids and how many of them are given; remembers texts."""
    known: dict[str, list[int]] = {}

    def ids(text: str) -> list[int]:
        if text not in known:
            known[text] = tokenizer.encode(text, add_special_tokens=False)
        return known[text]

    def encode(sample: Sample) -> tuple[list[int], int]:
        given, said = sample
        return ids(given) + ids(said), len(ids(given))

    return encode


def _response_loss(model: LlamaForCausalLM, rows: list[tuple[list[int], int]]) -> Tensor:
    """Mean cross-entropy over the tokens to be said; the head sees their positions only.

    Padding stands on the right and attention is causal, so no mask is needed.
    """
    width = max(len(ids) for ids, _ in rows)
    pad = model.config.pad_token_id
    input_ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])
    hidden = model.model(input_ids=input_ids[:, :-1], use_cache=False).last_hidden_state
    said = [
        (row, position)
        for row, (ids, given) in enumerate(rows)
        for position in range(given, len(ids))
    ]
    row, position = torch.tensor(said).T
    labels = input_ids[row, position]
    return cross_entropy(model.lm_head(hidden[row, position - 1]), labels)
