"""Scores turned into probabilities on calibration rows, by one temperature or by isotonic steps.

Both keep the order of the scores, so neither can lower the recall of a threshold.
"""

import numpy as np
import torch
from torch import Tensor

CALIBRATIONS = ("temperature", "isotonic")
_TEMPERATURES = np.geomspace(1 / 64, 64, 193)  # steps of 4.4 %: finer than 100 rows can tell


def certainty(labels: Tensor) -> tuple[float, float]:
    """(least, largest) probability that this many rows of each class support (Platt, 1999).

    1 / (n + 2) and (n + 1) / (n + 2): n rows without a mistake do not prove certainty.
    """
    positives = float(labels.sum())
    negatives = len(labels) - positives
    return 1 / (negatives + 2), (positives + 1) / (positives + 2)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T of sigmoid(logit / T) with the least log loss on calibration rows.

    The targets are `certainty`'s: on rows that separate, the loss would sharpen without end.
    """
    low, high = certainty(labels)
    target = torch.where(labels > 0.5, high, low).to(logits.dtype)
    losses = [
        float(torch.nn.functional.binary_cross_entropy_with_logits(logits / t, target))
        for t in _TEMPERATURES
    ]
    return float(_TEMPERATURES[int(np.argmin(losses))])


def fit_isotonic(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Knots (logit, probability), float32 [K] each, of the best function that never falls.

    Least squares by pool-adjacent-violators (scikit-learn), kept within `certainty`. Scores between
    two neighbouring steps are interpolated; scores on one step tie.
    """
    from sklearn.isotonic import IsotonicRegression

    low, high = certainty(labels)
    fitted = IsotonicRegression(y_min=low, y_max=high).fit(logits.numpy(), labels.numpy())
    x, y = (np.maximum.accumulate(k) for k in (fitted.X_thresholds_, fitted.y_thresholds_))
    return torch.from_numpy(x).float(), torch.from_numpy(y).float()
