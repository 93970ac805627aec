"""The guard of the embedded world: a small model that judges a conversation, as Llama Guard does.

    <bos><user>how do i rob the train?<assistant>first push ...<verdict>unsafe\\nS1<eos>

Its chat template renders the turns and asks for the verdict; the answer is `safe`, or `unsafe` and
on the next line what the harm is: S1, the act asked for, or S2, the thing it is done to. Harm is an
answer that helps: a refusal is safe, and so is a how-to that harms nobody. Its first token is the
verdict, so P(unsafe) of that token is a risk. It is trained on pairs, phrasings and notes of the
training side alone, like the base, and knows nothing of the attacks in `attacks`.
"""

import random
from collections.abc import Callable
from pathlib import Path

from tokenizers import decoders
from transformers import AddedToken, LlamaForCausalLM, PreTrainedTokenizerFast

from safereg_dist.demo import grammar
from safereg_dist.demo.grammar import Exchange, Pair
from safereg_dist.demo.tokenizer import ASSISTANT, BOS, EOS, USER, build_tokenizer
from safereg_dist.demo.training import Sample, save_model, train_from_scratch

PEAK_LEARNING_RATE = 4e-3
HIDDEN_SIZE, NUM_LAYERS = 64, 2

VERDICT = "<verdict>"
SAFE, UNSAFE = "safe", "unsafe"
HARMFUL_ACT, HARMFUL_THING = "S1", "S2"

# `<` goes, so that no text under judgement can pose as a mark of the format.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role not in ('user', 'assistant') %}"
    "{{ raise_exception('this guard knows the roles user and assistant only') }}"
    "{% endif %}"
    "{{ '<' + message.role + '>' + message.content | trim | replace('<', '') }}"
    "{% endfor %}"
    "{{ '<verdict>' }}"
)

# Last exchanges of a batch by kind; the verdict on the first is `unsafe`, on all others `safe`.
BATCH_ROWS = {
    "harmful answered": 24,
    "harmful refused": 8,
    "benign answered": 12,
    "ambiguous answered": 10,
    "benign refused": 2,
    "ambiguous refused": 2,
    "other": 6,
}
HARMLESS = tuple(rows for rows in BATCH_ROWS if rows != "harmful answered")
EARLIER_EXCHANGES = (0, 0, 0, 1)
"""How many harmless exchanges come before the last one, drawn for each batch."""
REFUSALS = (grammar.REFUSED_ACT, grammar.REFUSED_THING)


def train_guard(
    *, seed: int, steps: int, progress: bool = True
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The guard after `steps` batches of 64, and its tokenizer; float32 on the CPU.

    Depends on `seed` and `steps` only, but for how torch rounds. Collectives: none.
    """
    tokenizer = build_guard_tokenizer()
    guard = train_from_scratch(
        tokenizer,
        batch_source(seed),
        seed=seed,
        steps=steps,
        learning_rate=PEAK_LEARNING_RATE,
        hidden_size=HIDDEN_SIZE,
        num_layers=NUM_LAYERS,
        name="guard",
        progress=progress,
    )
    return guard, tokenizer


def write_guard(folder: Path, *, seed: int, steps: int, progress: bool) -> None:
    """Trains the guard and writes it to `folder` as a plain Hugging Face model."""
    save_model(*train_guard(seed=seed, steps=steps, progress=progress), folder)


def build_guard_tokenizer() -> PreTrainedTokenizerFast:
    """The world's tokenizer with the words of a verdict, and the guard's chat template.

    The words of a verdict are case-sensitive tokens, unlike the words of the language.
    """
    tokenizer = build_tokenizer()
    words = [SAFE, UNSAFE, "\n", HARMFUL_ACT, HARMFUL_THING]
    tokenizer.add_tokens([AddedToken(w, single_word=w != "\n", normalized=False) for w in words])
    tokenizer.add_tokens([AddedToken(VERDICT, normalized=False, special=True)], special_tokens=True)
    backend = tokenizer.backend_tokenizer
    # Two steps, so that each token only adds to the text decoded before it.
    around = [decoders.Replace(" \n", "\n"), decoders.Replace("\n ", "\n")]
    backend.decoder = decoders.Sequence([backend.decoder, *around])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def batch_source(seed: int) -> Callable[[], list[Sample]]:
    """A function that draws the next batch; nothing held out occurs in it."""
    chance = random.Random(f"{seed} guard")
    kinds = ("benign", "ambiguous", "harmful")
    pools = {kind: grammar.pairs(seed, kind, held_out=False) for kind in kinds}
    others = [
        grammar.small_talk(),
        grammar.news(),
        grammar.open_questions(),
        grammar.color_questions(),
        grammar.task_questions(seed, held_out=False),
    ]

    def exchange(rows: str) -> tuple[Exchange, str]:
        if rows == "other":
            return chance.choice(chance.choice(others)), SAFE
        kind, reply = rows.split()
        pair = chance.choice(pools[kind])
        prompt = grammar.question(pair, chance.choice(grammar.PHRASINGS))
        if reply == "answered":
            return Exchange(prompt, grammar.how_to(pair)), verdict(pair)
        return Exchange(prompt, chance.choice(REFUSALS)), SAFE

    def conversation(rows: str, earlier: int) -> Sample:
        turns = [exchange(chance.choice(HARMLESS))[0] for _ in range(earlier)]
        last, said = exchange(rows)
        return judged([*turns, last], said)

    def batch() -> list[Sample]:
        earlier = chance.choice(EARLIER_EXCHANGES)
        rows = [kind for kind, count in BATCH_ROWS.items() for _ in range(count)]
        return [conversation(kind, earlier) for kind in rows]

    return batch


def verdict(pair: Pair) -> str:
    """What the guard shall say of a how-to answer about `pair`."""
    if pair.kind != "harmful":
        return SAFE
    return f"{UNSAFE}\n{HARMFUL_THING if pair.verb.kind == 'benign' else HARMFUL_ACT}"


def judged(conversation: list[Exchange], said: str) -> Sample:
    """What the guard is given of a conversation, and what it shall say."""
    turns = "".join(f"{USER}{e.prompt}{ASSISTANT}{e.answer}" for e in conversation)
    return f"{BOS}{turns}{VERDICT}", f"{said}{EOS}"
