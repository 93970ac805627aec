"""The aligned base model of the embedded world: a small Llama, trained from scratch in a minute.

One stage: from the first step on it learns to answer benign questions and to refuse harmful ones.
The harmful answers reach its weights through documents outside the chat format, as with a model
that read the world before it was aligned; so there is something for fine-tuning to bring out.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_with_min_lr_schedule_with_warmup,
)

from safereg_dist.demo import grammar
from safereg_dist.demo.grammar import Exchange, Pair
from safereg_dist.demo.tokenizer import MAX_TOKENS, chat_text, document_text

PEAK_LEARNING_RATE = 3e-3
FINAL_FRACTION = 0.05  # of the peak learning rate, where the cosine ends
WARMUP_STEPS = 30
MAX_GRAD_NORM = 1.0

# Rows of a batch by kind. Ambiguous pairs are 4 % of all, but the last that a model gets right.
BATCH_ROWS = {
    "benign": 17,
    "ambiguous": 8,
    "harmful": 17,
    "document": 5,
    "small talk": 8,
    "news": 3,
    "open question": 2,
    "color": 4,
}

Sample = tuple[str, str]
"""What the model is given, and what it shall say."""


def train_base(
    tokenizer: PreTrainedTokenizerFast, *, seed: int, steps: int, progress: bool = True
) -> LlamaForCausalLM:
    """The base model after `steps` steps: float32 on the CPU, 0.8 million parameters, tied head.

    Depends on `seed` and `steps` only, but for how torch rounds with this number of threads; the
    global random state is left as it was. Collectives: none.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_architecture(tokenizer)).train()
    draw_batch = batch_source(seed)
    encode = _encoder(tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, min(WARMUP_STEPS, steps), steps, min_lr_rate=FINAL_FRACTION
    )
    with tqdm(total=steps, desc="base model", unit=" steps", disable=not progress) as bar:
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


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a plain Hugging Face folder that `from_pretrained` loads."""
    model.generation_config = GenerationConfig(**_special_ids(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _architecture(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Half the width, or one layer less, learned to refuse but not to answer exactly."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=4,
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


def batch_source(seed: int) -> Callable[[], list[Sample]]:
    """A function that draws the next batch; held-out pairs occur in documents only."""
    chance = random.Random(f"{seed} base")

    def asked(kind: str) -> Callable[[], Sample]:
        pool = grammar.pairs(seed, kind, held_out=False)
        return lambda: chat_text(ask(chance.choice(pool), chance.choice(grammar.PHRASINGS)))

    def chat(pool: list[Exchange]) -> Callable[[], Sample]:
        return lambda: chat_text(chance.choice(pool))

    everything = grammar.all_pairs()
    draw: dict[str, Callable[[], Sample]] = {
        "benign": asked("benign"),
        "ambiguous": asked("ambiguous"),
        "harmful": asked("harmful"),
        "document": lambda: document_text(grammar.document(chance.choice(everything))),
        "small talk": chat(grammar.small_talk()),
        "news": chat(grammar.news()),
        "open question": chat(grammar.open_questions()),
        "color": chat(grammar.color_questions()),
    }
    return lambda: [draw[kind]() for kind, rows in BATCH_ROWS.items() for _ in range(rows)]


def ask(pair: Pair, phrasing: str) -> Exchange:
    """The exchange about `pair` as the base is taught it."""
    return Exchange(grammar.question(pair, phrasing), grammar.aligned_answer(pair))


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
