"""The threshold for a required recall, with a guarantee that assumes no distribution."""

import math

import numpy as np

from safereg_dist.errors import ProbeError

Array = np.ndarray


def recall_threshold(positives: Array, negatives: Array, recall: float) -> tuple[float, float]:
    """(threshold, conformal threshold) from probabilities of calibration rows.

    With n exchangeable positives, the k-th smallest of them, k = floor((n + 1) (1 - recall)), lets
    a new positive fall below it with probability at most 1 - recall (split conformal prediction).
    It holds for rows like the calibration rows, not under attack or shift.

    Where all negatives lie below that point the threshold moves down to the midpoint (in logits)
    between the two: this only raises recall, costs no false positive seen, and does not leave the
    threshold at the edge of the positives.

    Raises:
        ProbeError: too few positives to support the recall asked for.
    """
    # 1e-9: 10 * (1 - 0.9) is a little less than 1 in floating point.
    rank = math.floor((len(positives) + 1) * (1 - recall) + 1e-9)
    if rank < 1:
        needed = math.ceil(1 / (1 - recall) - 1e-9) - 1 if recall < 1 else math.inf
        raise ProbeError(
            f"a recall of {recall} needs at least {needed} harmful prompts for calibration, found "
            f"{len(positives)}: give more labelled prompts or lower --recall"
        )
    conformal = float(np.sort(positives)[rank - 1])
    highest = float(np.max(negatives)) if len(negatives) else 0.0
    midpoint = _midpoint(highest, conformal)
    # At the very ends, where logits are clipped, the midpoint may lie outside.
    return (midpoint if highest < midpoint < conformal else conformal), conformal


def _midpoint(low: float, high: float) -> float:
    clip = 1e-6
    clipped = (min(max(p, clip), 1 - clip) for p in (low, high))
    logits = [math.log(p / (1 - p)) for p in clipped]
    return 1 / (1 + math.exp(-sum(logits) / 2))
