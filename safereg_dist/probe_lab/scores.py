"""How good a probability is: ranking, recall, calibration. Plain NumPy, float64."""

import numpy as np

Array = np.ndarray


def auroc(scores: Array, labels: Array) -> float:
    """Chance that a positive scores above a negative, ties counting half; nan for one class."""
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    positives, negatives = labels.sum(), (~labels).sum()
    if positives == 0 or negatives == 0:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2  # mean rank of each tied value
    rank_sum = rank[inverse][labels].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(scores: Array, labels: Array) -> float:
    """Area under precision over recall as a step function; tied scores enter together."""
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(labels[order])
    last_of_tie = np.append(ranked[1:] != ranked[:-1], True)
    precision = (hits / np.arange(1, len(hits) + 1))[last_of_tie]
    recall = (hits / max(hits[-1], 1))[last_of_tie]
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def brier(probability: Array, labels: Array) -> float:
    """Mean squared difference of probability and label."""
    return float(np.mean((np.asarray(probability) - np.asarray(labels, float)) ** 2))


def log_loss(probability: Array, labels: Array) -> float:
    """Mean negative log likelihood, in nats."""
    p = np.clip(np.asarray(probability, float), 1e-12, 1 - 1e-12)
    y = np.asarray(labels, float)
    return float(-np.mean(y * np.log(p) + (1 - y) * np.log1p(-p)))


def flagged_fraction(probability: Array, threshold: float) -> float:
    """Share of rows at or above the threshold; nan for no rows."""
    probability = np.asarray(probability)
    return float(np.mean(probability >= threshold)) if probability.size else float("nan")


def bootstrap_error(statistic, scores: Array, labels: Array, *, draws: int, seed: int) -> float:
    """Standard deviation of a statistic over resampled rows."""
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        index = generator.integers(0, len(labels), len(labels))
        if len(set(labels[index].tolist())) == 2:
            values.append(statistic(scores[index], labels[index]))
    return float(np.std(values)) if values else 0.0
