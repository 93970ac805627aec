"""The aligned base model of the embedded world: a small Llama, trained from scratch in a minute.

One stage: from the first step on it learns to answer benign questions and to refuse harmful ones.
The harmful answers reach its weights through documents outside the chat format, as with a model
that read the world before it was aligned; so there is something for fine-tuning to bring out.
"""

import random
from collections.abc import Callable

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from safereg_dist.demo import grammar
from safereg_dist.demo.grammar import Exchange, Pair
from safereg_dist.demo.tokenizer import chat_text, document_text
from safereg_dist.demo.training import Sample, train_from_scratch

PEAK_LEARNING_RATE = 3e-3
# Half the width, or one layer less, learned to refuse but not to answer exactly.
HIDDEN_SIZE, NUM_LAYERS = 128, 4

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


def train_base(
    tokenizer: PreTrainedTokenizerFast, *, seed: int, steps: int, progress: bool = True
) -> LlamaForCausalLM:
    """The base model after `steps` steps: float32 on the CPU, 0.8 million parameters, tied head.

    Depends on `seed` and `steps` only, but for how torch rounds with this number of threads; the
    global random state is left as it was. Collectives: none.
    """
    return train_from_scratch(
        tokenizer,
        batch_source(seed),
        seed=seed,
        steps=steps,
        learning_rate=PEAK_LEARNING_RATE,
        hidden_size=HIDDEN_SIZE,
        num_layers=NUM_LAYERS,
        name="base model",
        progress=progress,
    )


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
