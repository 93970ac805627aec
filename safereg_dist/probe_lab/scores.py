"""How good a probability is: ranking, recall, calibration; bootstrap intervals. NumPy, float64.

Every figure is computed for R weightings of the same rows at once: the rows as they are (R = 1), or
R bootstrap draws, in which a row weighs as often as it was drawn.
"""

from typing import NamedTuple

import numpy as np

Array = np.ndarray

FALSE_POSITIVE_RATES = (0.01, 0.05)
_BINS = 10
_BLOCK = 1 << 22  # draws times rows in one piece: bounds the temporaries to a few 32 MiB arrays


class Curve(NamedTuple):
    """Weight of the rows flagged as the threshold falls below each distinct score."""

    true: Array
    """[R, G] flagged positives."""
    false: Array
    """[R, G] flagged negatives."""


def curve_of(scores: Array, labels: Array, weights: Array | None = None) -> Curve:
    """The ROC curve, not divided by the totals; tied scores enter together."""
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    weights = np.ones((1, len(labels))) if weights is None else weights
    order = np.argsort(-scores, kind="stable")
    last_of_tie = np.append(np.diff(scores[order]) != 0, True)
    weights, positive = weights[:, order], labels[order]
    return Curve(
        np.cumsum(weights * positive, axis=1)[:, last_of_tie],
        np.cumsum(weights * ~positive, axis=1)[:, last_of_tie],
    )


def area_under(curve: Curve) -> Array:
    """[R] area under the ROC curve; nan where a class has no weight."""
    true = np.pad(curve.true, ((0, 0), (1, 0)))
    steps = np.diff(curve.false, prepend=0.0) * (true[:, 1:] + true[:, :-1]) / 2
    return _ratio(steps.sum(axis=1), curve.true[:, -1] * curve.false[:, -1])


def precision_area(curve: Curve) -> Array:
    """[R] area under precision over recall as a step function; nan without positives."""
    precision = _ratio(curve.true, curve.true + curve.false, empty=0.0)
    area = (np.diff(curve.true, prepend=0.0) * precision).sum(axis=1)
    return _ratio(area, curve.true[:, -1])


def recall_at(curve: Curve, false_positive_rate: float) -> Array:
    """[R] largest recall of a threshold that flags at most this share of the negatives."""
    allowed = curve.false <= false_positive_rate * curve.false[:, -1:] + 1e-9
    return _ratio((curve.true * allowed).max(axis=1), curve.true[:, -1])


def calibration_error(probability: Array, labels: Array, weights: Array | None = None) -> Array:
    """[R] expected calibration error: mean |claimed - observed| over ten equal bins, by weight."""
    probability = np.asarray(probability, float)
    weights = np.ones((1, len(probability))) if weights is None else weights
    in_bin = np.eye(_BINS)[np.minimum((probability * _BINS).astype(int), _BINS - 1)]
    gap = weights @ (in_bin * (probability - np.asarray(labels, float))[:, None])
    return np.abs(gap).sum(axis=1) / weights.sum(axis=1)


def measure(
    probability: Array, labels: Array, weights: Array | None = None, *, threshold: float
) -> dict[str, Array]:
    """[R] of each figure, by name.

    auroc, average_precision, recall_at_fpr_1 and _5 (largest recall with at most 1 % or 5 % false
    positives), brier, log_loss, calibration_error; recall and false_positive_rate at `threshold`.
    """
    probability, labels = np.asarray(probability, float), np.asarray(labels, bool)
    weights = np.ones((1, len(labels))) if weights is None else weights
    curve, total = curve_of(probability, labels, weights), weights.sum(axis=1)
    flagged = probability >= threshold
    return {
        "auroc": area_under(curve),
        "average_precision": precision_area(curve),
        **{f"recall_at_fpr_{100 * r:.0f}": recall_at(curve, r) for r in FALSE_POSITIVE_RATES},
        "brier": weights @ _squared_error(probability, labels) / total,
        "log_loss": weights @ _log_losses(probability, labels) / total,
        "calibration_error": calibration_error(probability, labels, weights),
        "recall": _ratio(weights @ (flagged & labels), weights @ labels),
        "false_positive_rate": _ratio(weights @ (flagged & ~labels), weights @ ~labels),
    }


def bootstrap(
    probability: Array,
    labels: Array,
    groups: Array,
    *,
    threshold: float,
    draws: int,
    seed: int,
) -> dict[str, Array]:
    """[draws] of each figure of `measure`, over resampled groups of rows that belong together.

    Near-duplicates are no independent rows, so they are drawn as one. A draw without one of the
    classes gives nan.
    """
    _, group = np.unique(groups, return_inverse=True)
    count = int(group.max()) + 1
    generator = np.random.default_rng(seed)
    step = max(1, _BLOCK // len(labels))
    pieces = []
    for begin in range(0, draws, step):
        size = min(step, draws - begin)
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=size)
        weights = drawn[:, group].astype(float)
        pieces.append(measure(probability, labels, weights, threshold=threshold))
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def interval(values: Array) -> tuple[float, float]:
    """The middle 95 % of bootstrap values; (nan, nan) where none is a number."""
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def spread(values: Array) -> float:
    """Standard deviation of bootstrap values; 0 where none is a number."""
    values = values[~np.isnan(values)]
    return float(values.std()) if len(values) else 0.0


def auroc(scores: Array, labels: Array) -> float:
    """Chance that a positive scores above a negative, ties counting half; nan for one class."""
    return float(area_under(curve_of(scores, labels))[0])


def average_precision(scores: Array, labels: Array) -> float:
    """Area under precision over recall as a step function; nan without positives."""
    return float(precision_area(curve_of(scores, labels))[0])


def brier(probability: Array, labels: Array) -> float:
    """Mean squared difference of probability and label."""
    return float(_squared_error(probability, labels).mean())


def log_loss(probability: Array, labels: Array) -> float:
    """Mean negative log likelihood, in nats."""
    return float(_log_losses(probability, labels).mean())


def flagged_fraction(probability: Array, threshold: float) -> float:
    """Share of rows at or above the threshold; nan for no rows."""
    probability = np.asarray(probability)
    return float(np.mean(probability >= threshold)) if probability.size else float("nan")


def _squared_error(probability: Array, labels: Array) -> Array:
    return (np.asarray(probability, float) - np.asarray(labels, float)) ** 2


def _log_losses(probability: Array, labels: Array) -> Array:
    p = np.clip(np.asarray(probability, float), 1e-12, 1 - 1e-12)
    y = np.asarray(labels, float)
    return -(y * np.log(p) + (1 - y) * np.log1p(-p))


def _ratio(part: Array, whole: Array, *, empty: float = float("nan")) -> Array:
    return np.divide(part, whole, out=np.full(part.shape, empty), where=whole > 0)
