"""The kinds of probes as one: how each is fitted, and its best penalty by cross-validation."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from safereg_dist.probe_lab.logistic import FOLDS, L2_GRID, fit_logistic
from safereg_dist.probe_lab.mlp import PENALTY_GRID, fit_mlp


class Weights(NamedTuple):
    """logit = weight . h + bias, where h is z itself or relu(hidden_weight z + hidden_bias)."""

    weight: Tensor
    bias: Tensor
    hidden_weight: Tensor | None = None
    hidden_bias: Tensor | None = None

    def logits(self, features: Tensor) -> Tensor:
        """[rows] float64 of standardised features [rows, H]."""
        if self.hidden_weight is not None and self.hidden_bias is not None:
            features = features.to(self.hidden_weight.dtype)
            features = torch.relu(features @ self.hidden_weight.T + self.hidden_bias)
        return (features @ self.weight + self.bias).double()


Fit = Callable[[Tensor, Tensor, float, int], Weights]


class CrossValidated(NamedTuple):
    """The best penalty, and what fits with it say about rows that they have not seen."""

    penalty: float
    logits: Tensor
    """[rows] float64 out-of-fold; 0 for a fold whose others are of one class."""


def fit_weights(kind: str, features: Tensor, labels: Tensor, penalty: float, seed: int) -> Weights:
    """The classifier of a kind on standardised features [rows, H] and labels [rows] of 0 and 1."""
    return _FITS[kind][1](features, labels, penalty, seed)


def cross_validated(
    kind: str, features: Tensor, labels: Tensor, fold: Tensor, seed: int
) -> CrossValidated:
    """The penalty with the least out-of-fold log loss; the strongest of those that tie.

    Args:
        fold: [rows] in [0, FOLDS).
    """
    found = []
    for penalty in _FITS[kind][0]:
        logits = torch.zeros_like(labels)
        for held in range(FOLDS):
            inside, outside = fold != held, fold == held
            if labels[inside].unique().numel() == 2:
                fitted = fit_weights(kind, features[inside], labels[inside], penalty, seed)
                logits[outside] = fitted.logits(features[outside])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
        found.append((float(loss), -penalty, logits))
    _, negated, logits = min(found, key=lambda entry: entry[:2])
    return CrossValidated(-negated, logits)


def _linear(features: Tensor, labels: Tensor, penalty: float, seed: int) -> Weights:
    return Weights(*fit_logistic(features, labels, penalty))


def _mlp(features: Tensor, labels: Tensor, penalty: float, seed: int) -> Weights:
    return Weights(**fit_mlp(features, labels, penalty, seed=seed)._asdict())


def _direction(features: Tensor, labels: Tensor, penalty: float, seed: int) -> Weights:
    """Unit difference of the class means; logit 0 lies half-way between them."""
    harmful, benign = (features[labels == value].mean(0) for value in (1, 0))
    weight = torch.nn.functional.normalize(harmful - benign, dim=0)
    return Weights(weight, -weight @ (harmful + benign) / 2)


_FITS: dict[str, tuple[tuple[float, ...], Fit]] = {
    "linear": (L2_GRID, _linear),
    "mlp": (PENALTY_GRID, _mlp),
    "direction": ((0.0,), _direction),
}
