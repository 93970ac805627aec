"""How right an answer is: by the measure that its row names.

exact     the text itself, but for white space
squad     SQuAD 1.1: exact match and F1 over words, after its normalisation, the best of the answers
          that are accepted (Rajpurkar et al., 1606.05250); two texts of which nothing is left have
          an F1 of 1, as in SQuAD 2.0
rouge_l   F1 of the longest common subsequence of stemmed words (Lin, 2004), by `rouge-score`
gsm8k     the last number of the answer against the one after `####` (Cobbe et al., 2110.14168)
choice    whether the right choice has the highest mean log-likelihood per token
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from safereg_dist.models.extras import needed

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def is_exact_match(answer: str, expected: str) -> bool:
    """True where both texts are equal, but for the amount and the kind of white space."""
    return answer.split() == expected.split()


def squad_exact_match(answer: str, accepted: Sequence[str]) -> bool:
    """Whether the normalised answer is one of those accepted."""
    return any(_words(answer) == _words(text) for text in accepted)


def squad_f1(answer: str, accepted: Sequence[str]) -> float:
    """Best F1 over words of the normalised texts."""
    return max(_word_f1(_words(answer), _words(text)) for text in accepted)


def rouge_l(answer: str, accepted: Sequence[str]) -> float:
    """Best ROUGE-L F1, words stemmed.

    Raises:
        ConfigError: `rouge-score` is not installed.
    """
    return max(_rouge().score(text, answer)["rougeL"].fmeasure for text in accepted)


def gsm8k_match(answer: str, accepted: Sequence[str]) -> bool:
    """Whether the last number of the answer is the expected one."""
    found = _NUMBER.findall(answer)
    wanted = [_value(_NUMBER.findall(text.split("####")[-1])[-1]) for text in accepted]
    return bool(found) and _value(found[-1]) in wanted


FIGURES: dict[str, dict[str, Callable[[str, Sequence[str]], float]]] = {
    "exact": {"task_exact_match": lambda answer, texts: is_exact_match(answer, texts[0])},
    "squad": {"squad_f1": squad_f1, "squad_exact_match": squad_exact_match},
    "rouge_l": {"rouge_l": rouge_l},
    "gsm8k": {"gsm8k_accuracy": gsm8k_match},
    "choice": {},
}
"""Measure -> its figures, the one that `task_score` takes first."""
CHOICE = "choice_accuracy"


def _words(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return _ARTICLES.sub(" ", plain).split()


def _word_f1(own: list[str], wanted: list[str]) -> float:
    common = sum((Counter(own) & Counter(wanted)).values())
    if not own or not wanted:
        return float(own == wanted)
    return 2 * common / (len(own) + len(wanted))


def _value(number: str) -> float:
    return float(number.replace(",", ""))


@cache
def _rouge() -> Any:
    with needed():
        from rouge_score.rouge_scorer import RougeScorer
    return RougeScorer(["rougeL"], use_stemmer=True)
