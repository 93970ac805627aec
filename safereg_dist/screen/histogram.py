"""Risks counted for people."""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np


def by_tenth(risks: Iterable[float]) -> dict[str, int]:
    """How many risks in [0, 1] lie in each tenth: `0.0-0.1` -> rows, and so on."""
    counts, edges = np.histogram(np.fromiter(risks, float), bins=10, range=(0, 1))
    names = (f"{low:.1f}-{high:.1f}" for low, high in pairwise(edges))
    return dict(zip(names, counts.tolist(), strict=True))
