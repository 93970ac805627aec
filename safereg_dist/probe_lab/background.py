"""Background negatives: harmless text far from the labelled prompts.

A probe that has seen nothing but harmful and benign requests fires on tasks it does not know, and
every firing takes a row away from the task. Word salad of everyday words, and of the tokenizer's
own vocabulary, teaches it what harmless strangeness looks like.
"""

import re
from collections import Counter

import numpy as np
from transformers import PreTrainedTokenizerBase

from safereg_dist.data.files import LabelledPrompt
from safereg_dist.errors import ConfigError

_EVERYDAY = (
    "the a my your this that every another small large old new red blue green quiet early late "
    "house garden table window street river bridge market school letter paper song picture story "
    "morning evening summer winter rain snow sun moon star tree flower leaf bird cat horse bread "
    "milk soup apple salt tea coffee plate cup spoon chair lamp clock door key shoe coat hat "
    "brother sister friend teacher doctor farmer child neighbour guest reader writer "
    "walk read write sing listen look wait begin finish open close carry bring keep find count "
    "measure draw paint wash clean cook eat drink sleep visit answer ask call tell show learn "
    "and or but because when where how why with without under over near after before between "
    "is was has had can will may one two three four five ten often always never again today"
).split()


def background_prompts(
    tokenizer: PreTrainedTokenizerBase,
    labelled: list[LabelledPrompt],
    *,
    count: int,
    seed: int,
    answered: bool = False,
) -> list[LabelledPrompt]:
    """`count` random strings of 3 to 20 words, labelled benign; each answered by another if asked.

    Half are everyday English, half words of the tokenizer's own vocabulary, so that a small made-up
    language has background too. Words that harmful prompts use more often than benign ones are left
    out: salad of them would teach the probe to overlook harm; so are everyday words that the
    tokenizer does not know, since they would all read alike.

    Raises:
        ConfigError: too few words are left.
    """
    draw = np.random.default_rng(seed)
    banned = _harmful_words(labelled, answered)
    sources = [
        [w for w in _EVERYDAY if w not in banned and _is_known(tokenizer, w)],
        [w for w in _vocabulary_words(tokenizer) if w.lower() not in banned],
    ]
    sources = [words for words in sources if len(words) >= 10]
    if count > 0 and not sources:
        raise ConfigError(
            "expected at least 10 words in the tokenizer that harmful prompts do not favour, for "
            "background negatives, found fewer: give more benign prompts, or set --background 0"
        )

    def salad(index: int) -> str:
        words = sources[index % len(sources)]
        return " ".join(draw.choice(words, size=draw.integers(3, 21)))

    return [
        LabelledPrompt(
            id=f"background-{index}",
            messages=[{"role": "user", "content": salad(index)}],
            label="benign",
            response=salad(index) if answered else None,
        )
        for index in range(count)
    ]


def _vocabulary_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    special = set(tokenizer.all_special_ids)
    ids = sorted(i for i in tokenizer.get_vocab().values() if i not in special)
    words = (str(tokenizer.decode([i])).strip() for i in ids)
    return [word for word in words if re.fullmatch(r"[^\W_]{2,}", word)]


def _is_known(tokenizer: PreTrainedTokenizerBase, word: str) -> bool:
    unknown = tokenizer.unk_token_id
    return unknown is None or unknown not in tokenizer.encode(word, add_special_tokens=False)


def _harmful_words(labelled: list[LabelledPrompt], answered: bool) -> set[str]:
    share: dict[str, Counter[str]] = {"harmful": Counter(), "benign": Counter()}
    total = Counter(prompt.label for prompt in labelled)
    for prompt in labelled:
        if prompt.label in share:
            said = [message["content"] for message in prompt.messages]
            text = " ".join([*said, prompt.response or ""] if answered else said)
            share[prompt.label].update(set(re.findall(r"[^\W_]+", text.lower())))
    return {
        word
        for word, count in share["harmful"].items()
        if count / max(total["harmful"], 1) > share["benign"][word] / max(total["benign"], 1)
    }
