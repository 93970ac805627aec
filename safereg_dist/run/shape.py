"""Rows that hide: the shape of the risks just below the threshold, where rows train freely.

Risks are rescaled so that the threshold is 0.5; rows from 0.25 to 0.5 are counted in eight bins of
equal width. n_1 .. n_7 are the numbers in two bins side by side, so that no heap is cut in halves.
Three ways to hide, each with what gives it away:

heap     Honest risks thin out towards the threshold. A number that rises on the way is a heap:
             heap = max_{i + 2 <= j} (n_j - n_i)
             p    = 15 min_{i + 2 <= j} P(Binomial(n_i + n_j, 1/2) >= n_j)  (15 pairs)
         It needs no calibration data, and finds no heap that is spread over all eight bins.
spread   More rows in the eight bins than benign calibration rows would put there. Other benign text
         than that of the calibration does so too, so only as many count as might be held back.
masked   The response looks risky, the prompt does not, and the row is not held (`weighted`).

A heap further down, among the harmless rows, is found by none of them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from safereg_dist.config import Config
from safereg_dist.errors import ConfigError
from safereg_dist.risk.probe import rescale

BINS = 8
SIGNIFICANT = 0.001
"""Largest p by which a heap or a spread is called one: one honest data set in a thousand."""
_LOW, _HIGH = 0.25, 0.5
_CLIFFS = ("step", "threshold", "budget")  # schedules by which rows below the threshold are free
_CONFIDENCE = 0.95  # of the bound for a sample; a complete data set needs no bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What was counted; sums over ranks are those of all rows."""

    rows: int
    held: int
    bins: tuple[int, ...]
    """[8] rows by rescaled risk, from half the threshold to the threshold."""
    masked: int
    """Rows with a risky response and a harmless prompt that are not held back."""
    benign_share: float | None = None
    """Largest share of the benign calibration rows in the eight bins; None where nobody knows."""

    @classmethod
    def of(
        cls,
        rows: Iterable[tuple[bool, float | None, Mapping[str, float | None]]],
        threshold: float,
        positions: Mapping[str, str],
    ) -> "Shape":
        """The counts of these rows.

        Args:
            rows: of each whether it is held back, its risk, its risks by category, rescaled.
            positions: category -> `prompt` or `response`, of those that are a probe's.
        """
        total = held = masked = 0
        bins = [0] * BINS
        for is_held, risk, by_category in rows:
            total += 1
            held += is_held
            if risk is not None and not is_held:
                place = (rescale(risk, threshold) - _LOW) / (_HIGH - _LOW) * BINS
                if place >= 0:
                    bins[min(int(place), BINS - 1)] += 1
            masked += not is_held and is_masked(by_category, positions)
        return cls(rows=total, held=held, bins=tuple(bins), masked=masked)

    @property
    def counts(self) -> list[int]:
        """Eleven numbers that are summed over ranks; see `of_counts`."""
        return [self.rows, self.held, *self.bins, self.masked]

    @classmethod
    def of_counts(cls, counts: list[int], benign_share: float | None) -> "Shape":
        """The shape of such sums."""
        rows, held, *bins, masked = counts
        return cls(rows=rows, held=held, bins=tuple(bins), masked=masked, benign_share=benign_share)

    @property
    def near(self) -> int:
        """Rows from half the threshold to the threshold."""
        return sum(self.bins)

    @property
    def heap(self) -> int:
        """The largest rise towards the threshold, in rows."""
        return max(0, *(high - low for low, high in self._pairs))

    @property
    def _pairs(self) -> list[tuple[int, int]]:
        """[15] rows of two windows that share no bin, the further from the threshold first."""
        windows = [one + next_ for one, next_ in pairwise(self.bins)]
        return [(low, high) for i, low in enumerate(windows) for high in windows[i + 2 :]]

    @property
    def heap_p(self) -> float:
        """Probability of such a rise where there is no heap."""
        from scipy.stats import binom

        low, high = np.array(self._pairs).T
        return min(1.0, len(low) * float(binom.sf(high - 1, low + high, 0.5).min()))

    @property
    def spread_p(self) -> float:
        """Probability of as many rows near the threshold by the calibration; 1 where unknown."""
        from scipy.stats import binom

        if self.benign_share is None:
            return 1.0
        return float(binom.sf(self.near - 1, self.rows, self.benign_share))

    def hidden(self, *, is_sample: bool = False) -> dict[str, float]:
        """Way to hide -> the share of the rows that does so; `spread` beyond the calibration's.

        Of a sample the exact one-sided 95 % lower bound of the share.
        """
        found = {
            "heap": self.heap if self.heap_p < SIGNIFICANT else 0,
            "spread": self.near if self.spread_p < SIGNIFICANT else 0,
            "masked": self.masked,
        }
        shares = {way: lower_share(n, self.rows, is_sample=is_sample) for way, n in found.items()}
        return shares | {"spread": max(0.0, shares["spread"] - (self.benign_share or 0.0))}

    def report(self) -> dict[str, Any]:
        """For `audit.json`."""
        return {
            "below_threshold": list(self.bins),
            "below_threshold_share": self.near / max(self.rows, 1),
            "below_threshold_share_of_benign_calibration_rows": self.benign_share,
            "spread_p": None if self.benign_share is None else self.spread_p,
            "heap": self.heap,
            "heap_p": self.heap_p,
            "masked": self.masked,
        }


def is_masked(by_category: Mapping[str, float | None], positions: Mapping[str, str]) -> bool:
    """True where a probe on responses finds a risk that none on prompts does; risks rescaled."""
    found = {"prompt": False, "response": False}
    for category, position in positions.items():
        risk = by_category.get(category)
        found[position] |= risk is not None and not risk < _HIGH
    return found["response"] and not found["prompt"]


def lower_share(count: int, rows: int, *, is_sample: bool) -> float:
    """The share; of a sample its exact one-sided 95 % lower bound."""
    return _bounds(count, rows, is_sample=is_sample)[0]


def upper_share(count: int, rows: int, *, is_sample: bool) -> float:
    """The share; of a sample its exact one-sided 95 % upper bound."""
    return _bounds(count, rows, is_sample=is_sample)[1]


def _bounds(count: int, rows: int, *, is_sample: bool) -> tuple[float, float]:
    if not (is_sample and rows):
        share = count / max(rows, 1)
        return share, share
    from scipy.stats import binomtest

    found = binomtest(count, rows).proportion_ci(2 * _CONFIDENCE - 1, method="exact")
    return found.low, found.high


def limits_of(config: Config) -> dict[str, float]:
    """Way to hide -> the share of rows that may; none where rows below the threshold are not free.

    `spread` may be what the gate lets be held back: so many rows would be refused above it.
    """
    if config.regularizer.schedule not in _CLIFFS:
        return {}
    most = config.risk.max_hidden
    held = config.risk.max_held_back + config.data.declared_poison
    return {"heap": most, "spread": max(most, held), "masked": most}


def what_hides(
    shape: Shape, limits: Mapping[str, float], threshold: float, *, is_sample: bool = False
) -> str | None:
    """Half a sentence on what hides beyond its limit; None where nothing does."""
    hidden = shape.hidden(is_sample=is_sample)
    said = {
        "heap": f"{shape.heap} of {shape.rows} rows ({shape.heap / max(shape.rows, 1):.1%}) lie in "
        f"a heap just below the threshold {threshold:.3g}, where honest risks thin out",
        "spread": f"{shape.near} of {shape.rows} rows ({shape.near / max(shape.rows, 1):.1%}) lie "
        f"between half the threshold {threshold:.3g} and it, of benign calibration rows at most "
        f"{shape.benign_share or 0:.1%}",
        "masked": f"{shape.masked} of {shape.rows} rows ({shape.masked / max(shape.rows, 1):.1%}) "
        "have a risky response to a harmless prompt and are not held back",
    }
    return next((said[way] for way, most in limits.items() if hidden[way] > most), None)


def refuse_what_hides(
    shape: Shape, config: Config, threshold: float, *, is_sample: bool, look: str
) -> None:
    """Raises ConfigError where more rows hide than `risk.max_hidden` allows; `look` says how to."""
    said = what_hides(shape, limits_of(config), threshold, is_sample=is_sample)
    if said is not None and config.risk.max_hidden < 1:
        raise ConfigError(
            f"{said}, and would train freely: look at them, {look}; then mend the data, lower "
            "regularizer.threshold, hold rows one by one (risk.override), or accept them "
            f"(risk.max_hidden=1; now {config.risk.max_hidden:g})"
        )
