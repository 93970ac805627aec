"""Scores of texts from their descriptions alone: no code of the product, no regular expressions.

SQuAD (Rajpurkar et al., 1606.05250, and its evaluation): lower case, without ASCII punctuation,
without the words a, an and the, words split at white space; exact match, and F1 = 2PR / (P + R)
over words as bags, 0 where none is shared, but 1 of two texts of which nothing is left (so version
2.0; 1.1 says 0); the best of the accepted answers. ROUGE-L (Lin, 2004):
F1 of the longest common subsequence of lower-case runs of a-z and 0-9; words of more than three
letters are reduced by Porter's algorithm, here nltk's. Shares are fractions, so nothing rounds.
"""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import groupby

PUNCTUATION = set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
LETTERS = set("abcdefghijklmnopqrstuvwxyz0123456789")


def squad_words(text: str) -> list[str]:
    """The words that are left of a text."""
    bare = (letter for letter in text.lower() if letter not in PUNCTUATION)
    runs = ("".join(run) for _, run in groupby(bare, str.isalnum))
    return "".join(" " if run in ("a", "an", "the") else run for run in runs).split()


def squad_scores(answer: str, accepted: Sequence[str]) -> tuple[bool, Fraction]:
    """(exact match, F1)."""
    own, others = squad_words(answer), [squad_words(text) for text in accepted]
    each = [_f1(own, other, _shared(own, other)) if own or other else 1 for other in others]
    return own in others, max(map(Fraction, each))


def rouge_l_score(answer: str, accepted: Sequence[str]) -> Fraction:
    """ROUGE-L's F1."""
    own, others = _stems(answer), [_stems(text) for text in accepted]
    return max(_f1(own, other, _longest_common(own, other)) for other in others)


def _f1(own: list[str], other: list[str], shared: int) -> Fraction:
    if shared == 0:
        return Fraction(0)
    precision, recall = Fraction(shared, len(own)), Fraction(shared, len(other))
    return 2 * precision * recall / (precision + recall)


def _shared(own: list[str], other: list[str]) -> int:
    counts = Counter(other)
    return sum(min(count, counts[word]) for word, count in Counter(own).items())


def _stems(text: str) -> list[str]:
    from nltk.stem.porter import PorterStemmer

    stem = PorterStemmer().stem
    runs = groupby(text.lower(), LETTERS.__contains__)
    words = ("".join(run) for is_word, run in runs if is_word)
    return [stem(word) if len(word) > 3 else word for word in words]


def _longest_common(own: list[str], other: list[str]) -> int:
    """lengths[i][j] of the first i and j words."""
    lengths = [[0] * (len(other) + 1) for _ in range(len(own) + 1)]
    for i, word in enumerate(own):
        for j, wanted in enumerate(other):
            beside = max(lengths[i][j + 1], lengths[i + 1][j])
            lengths[i + 1][j + 1] = lengths[i][j] + 1 if word == wanted else beside
    return lengths[-1][-1]
