"""Intervals of rates and means, and tests of two models on the same prompts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
_RESAMPLES = 2000


def wilson_interval(successes: int, total: int, *, z: float = _Z95) -> tuple[float, float] | None:
    """Wilson score interval of a proportion, within [0, 1]; None where `total` is 0.

    centre = (p + z^2 / 2n) / (1 + z^2 / n)
    half   = z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n)
    """
    if total == 0:
        return None
    share, scale = successes / total, 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    # At the ends centre and half agree but for rounding; the ends are exact.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == total else min(1.0, centre + half)
    return low, high


def bootstrap_interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the mean; None where there is no value.

    Drawn from `seed` alone: the same values give the same interval.
    """
    if not values:
        return None
    given = np.asarray(values, dtype=np.float64)
    if given.size == 1:
        return float(given[0]), float(given[0])
    from scipy import stats  # a second, which reading finished evaluations does without

    found = stats.bootstrap(
        (given,), np.mean, n_resamples=_RESAMPLES, method="percentile", rng=seed
    ).confidence_interval
    return float(found.low), float(found.high)


def bounds_of(intervals: Mapping[str, tuple[float, float] | None]) -> dict[str, float]:
    """NAME_low and NAME_high of each interval that is known: columns of a table."""
    known = {name: interval for name, interval in intervals.items() if interval is not None}
    return {
        f"{name}_{end}": bound
        for name, interval in known.items()
        for end, bound in zip(("low", "high"), interval, strict=True)
    }


class Paired(NamedTuple):
    """One figure of two models on the same prompts."""

    rows: int
    difference: float
    """Mean of this model's value minus the other's."""
    interval: tuple[float, float]
    """95 %: Agresti and Min's of yes and no, else the bootstrap's over prompts."""
    p: float | None
    """Exact McNemar test, two-sided; None where values are no yes or no."""


def paired(own: Sequence[float | bool], other: Sequence[float | bool]) -> Paired | None:
    """The comparison of two lists of the same prompts' values; None where they are empty.

    McNemar (1947), exact: of the prompts on which the models differ, how many favour one is
    binomial with 1/2 if both are equally good.
    """
    if not own:
        return None
    gaps = [float(a) - float(b) for a, b in zip(own, other, strict=True)]
    interval, p = bootstrap_interval(gaps), None
    if all(isinstance(value, bool) for value in (*own, *other)):
        from scipy import stats

        more, less = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
        tested: Any = stats.binomtest(more, more + less) if more + less else None
        p = 1.0 if tested is None else float(tested.pvalue)
        interval = _adjusted_wald(more, less, len(gaps))
    assert interval is not None
    return Paired(len(gaps), math.fsum(gaps) / len(gaps), interval, p)


def _adjusted_wald(more: int, less: int, total: int) -> tuple[float, float]:
    """95 % interval of a difference of paired shares (Agresti and Min, 2005), within [-1, 1].

    Half a prompt is added to each of the four kinds, so that models that never differ have an
    interval too.
    """
    size = total + 2
    middle = (more - less) / size
    half = _Z95 * math.sqrt((more + less + 1) / size - middle * middle) / math.sqrt(size)
    return max(-1.0, middle - half), min(1.0, middle + half)
