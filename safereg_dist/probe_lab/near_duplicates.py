"""Which prompts say nearly the same, so that no split puts one of them on each side.

Near-duplicates share at least 0.8 of their word 3-shingles (Jaccard). MinHash with locality-
sensitive hashing finds candidates, the exact coefficient decides, and groups are the connected
parts. Scripts that put no space between words are compared as whole texts.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np
from datasketch import MinHash, MinHashLSH

from safereg_dist.screen.progress import progress_bar

SIMILARITY = 0.8
_SHINGLE = 3
# A pair at 0.8 shares one of 25 bands of 5 with probability 1 - (1 - 0.8^5)^25 > 0.9999.
_BANDS, _ROWS = 25, 5

Shingles = frozenset[tuple[str, ...]]


def near_duplicate_groups(texts: Sequence[str], *, progress: bool = False) -> np.ndarray:
    """[n] int: the group of each text, named by the index of its first text.

    Args:
        progress: show a bar; a hundred thousand prompts take about a minute.
    """
    groups = _Groups(len(texts))
    first_with: dict[Shingles, int] = {}
    for index, text in enumerate(texts):
        groups.join(first_with.setdefault(shingles(text), index), index)
    for one, other in _similar_pairs(first_with, groups, progress=progress):
        groups.join(one, other)
    return np.array([groups.find(index) for index in range(len(texts))], dtype=int)


def shingles(text: str) -> Shingles:
    """The word triples of a text in lower case, without punctuation; all words of a shorter one."""
    words = re.findall(r"\w+", text.lower())
    starts = range(max(1, len(words) - _SHINGLE + 1))
    return frozenset(tuple(words[i : i + _SHINGLE]) for i in starts)


def _similar_pairs(
    index_of: dict[Shingles, int], groups: "_Groups", *, progress: bool
) -> Iterable[tuple[int, int]]:
    """Pairs at or above the similarity that are not in one group yet."""
    index = MinHashLSH(num_perm=_BANDS * _ROWS, params=(_BANDS, _ROWS))
    known = list(index_of)
    encoded = ([" ".join(part).encode() for part in text] for text in known)
    sketches = MinHash.generator(encoded, num_perm=_BANDS * _ROWS, seed=1)
    bar = progress_bar(sketches, total=len(known), desc="near-duplicates", shown=progress)
    for place, sketch in enumerate(bar):
        here = index_of[known[place]]
        for candidate in sorted(int(str(found)) for found in index.query(sketch)):
            there = index_of[known[candidate]]
            if groups.find(there) != groups.find(here) and _is_similar(
                known[candidate], known[place]
            ):
                yield there, here
        index.insert(place, sketch)


def _is_similar(one: Shingles, other: Shingles) -> bool:
    return len(one & other) >= SIMILARITY * len(one | other)


class _Groups:
    """Union-find; the name of a group is its smallest member."""

    def __init__(self, size: int) -> None:
        self._above = list(range(size))

    def find(self, member: int) -> int:
        while self._above[member] != member:
            self._above[member] = self._above[self._above[member]]
            member = self._above[member]
        return member

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.find(one), self.find(other)))
        self._above[high] = low
