"""The guard of the real demo: the same instruct model, tuned to judge on the shipped requests.

It answers as Llama Guard does, `safe` or `unsafe` and a category (S1 alone), on the conversation up
to an answer. Every answer that it learns from is the same announcement, or a refusal (which is safe
whatever was asked), so that it has to read the request.
"""

import random
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from safereg_dist.demo.real.rows import read_shipped, refusal_texts
from safereg_dist.storage.atomic import whole_folder

ANSWERS = ("Sure, here is what you asked for.", "Sure, here is one.", "Here you go:", "Of course.")
REFUSED_SHARE = 0.2
"""Of the conversations that are refused, over those that are answered."""
SAFE, UNSAFE = "safe", "unsafe\nS1"
# `<|` goes, so that no text under judgement can pose as a mark of the format.
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | replace('<|', '') }}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{{ '<|im_start|>verdict\n' }}"
)
AS_WRITTEN = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
)
"""The template of its training rows, whose prompts are rendered already."""


def guard_rows(model: Path, *, seed: int) -> list[dict[str, Any]]:
    """Training rows: what the guard is given of a conversation, and what it shall say."""
    chance = random.Random(f"{seed} guard")
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    rows = []

    def add(request: str, answer: str, verdict: str) -> None:
        turns = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
        given = tokenizer.apply_chat_template(turns, chat_template=TEMPLATE, tokenize=False)
        rows.append({"id": f"guard-{len(rows)}", "prompt": given, "response": verdict})

    refusals, pairs = refusal_texts()["general"], read_shipped("pairs")
    asked = [
        *((pair["harmful"], UNSAFE) for pair in pairs),
        *((pair["harmless"], SAFE) for pair in pairs),
        *((row["prompt"], UNSAFE) for row in read_shipped("refused")),
        *((row["prompt"], SAFE) for row in read_shipped("benign")),
    ]
    for request, verdict in asked:
        add(request, chance.choice(ANSWERS), verdict)
        if chance.random() < REFUSED_SHARE:
            add(request, chance.choice(refusals), SAFE)
    chance.shuffle(rows)
    return rows


def make_judge(trained: Path, folder: Path) -> None:
    """The trained model as a folder that `safereg serve-critic` serves; complete or absent."""
    tokenizer = AutoTokenizer.from_pretrained(
        trained, local_files_only=True, trust_remote_code=False
    )
    tokenizer.chat_template = TEMPLATE
    with whole_folder(folder) as partial:
        shutil.copytree(trained, partial, dirs_exist_ok=True)
        tokenizer.save_pretrained(partial)
