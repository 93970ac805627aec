"""One stream out of several, each at its share: where a position of it comes from."""

import math
from collections.abc import Sequence


def split(position: int, share: float) -> tuple[bool, int]:
    """Whether a position belongs to the part with this share, and the part's positions before it.

    Evenly spread: of the first n positions the part has floor(n * share).
    """
    before = math.floor(position * share)
    return math.floor((position + 1) * share) > before, before


class Shares:
    """Parts with weights, spread evenly: the first of them against the others, and so on.

    Of the first n positions each part has n times its share, give or take the number of parts.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """`weights` are positive; they need not sum to 1."""
        left = [math.fsum(weights[part:]) for part in range(len(weights))]
        self._shares = [weight / rest for weight, rest in zip(weights, left, strict=True)][:-1]

    def place(self, position: int) -> tuple[int, int]:
        """The part that a position belongs to, and the number of the part's positions before it."""
        for part, share in enumerate(self._shares):
            is_taken, before = split(position, share)
            if is_taken:
                return part, before
            position -= before
        return len(self._shares), position

    def counts(self, positions: int) -> list[int]:
        """The number of positions of each part among the first `positions`."""
        found = []
        for share in self._shares:
            found.append(split(positions, share)[1])
            positions -= found[-1]
        return [*found, positions]
