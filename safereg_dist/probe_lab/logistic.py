"""Logistic regression in float64: the fit, its penalty by cross-validation, its temperature."""

import numpy as np
import torch
from torch import Tensor

from safereg_dist.probe_lab.scores import log_loss

L2_GRID = (1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for the L2 penalty on standardised features, chosen by cross-validation."""
FOLDS = 3
_TEMPERATURES = np.geomspace(1 / 64, 64, 193)  # steps of 4.4 %: finer than 100 rows can tell


def fit_logistic(features: Tensor, labels: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """(weight [H], bias) minimising mean log loss + l2/2 |weight|^2, classes weighted equally.

    float64, by L-BFGS with a strong Wolfe line search.
    """
    weight = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    share = labels.mean()
    row_weight = torch.where(labels > 0.5, 0.5 / share, 0.5 / (1 - share))
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=500,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-8,
        tolerance_change=1e-14,  # the default would stop far from the optimum of a weak penalty
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            features @ weight + bias, labels, weight=row_weight
        )
        loss = loss + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)  # type: ignore[arg-type]
    return weight.detach(), bias.detach()


def cross_validated_l2(features: Tensor, labels: Tensor, fold: np.ndarray) -> float:
    """The penalty with the least held-out log loss; the strongest of those that tie."""
    losses = []
    for l2 in L2_GRID:
        total = 0.0
        for held in range(FOLDS):
            inside, outside = fold != held, fold == held
            if labels[inside].unique().numel() < 2:
                continue
            weight, bias = fit_logistic(features[inside], labels[inside], l2)
            probability = torch.sigmoid(features[outside] @ weight + bias)
            total += log_loss(probability.numpy(), labels[outside].numpy())
        losses.append(total)
    return max(l2 for l2, loss in zip(L2_GRID, losses, strict=True) if loss <= min(losses))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T of sigmoid(logit / T) with the least log loss on calibration rows.

    The targets are Platt's (1999), (n + 1) / (n + 2) for n rows of a class: n rows without a
    mistake do not prove certainty, and on rows that separate the loss would sharpen without end.
    """
    positives = labels.sum()
    negatives = len(labels) - positives
    target = torch.where(labels > 0.5, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    losses = [
        float(torch.nn.functional.binary_cross_entropy_with_logits(logits / t, target))
        for t in _TEMPERATURES
    ]
    return float(_TEMPERATURES[int(np.argmin(losses))])
