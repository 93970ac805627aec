"""Logistic regression in float64."""

import torch
from torch import Tensor

L2_GRID = (1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for the L2 penalty on standardised features, chosen by cross-validation."""
FOLDS = 3


def fit_logistic(features: Tensor, labels: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """(weight [H], bias) minimising mean log loss + l2/2 |weight|^2, classes weighted equally.

    float64, by L-BFGS with a strong Wolfe line search, on the device of the features.
    """
    weight, bias = (
        torch.zeros(shape, dtype=torch.float64, device=features.device, requires_grad=True)
        for shape in (features.shape[1:], ())
    )
    row_weight = class_weights(labels)
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


def class_weights(labels: Tensor) -> Tensor:
    """[rows] weights of mean 1 under which both classes weigh the same."""
    share = labels.mean()
    return torch.where(labels > 0.5, 0.5 / share, 0.5 / (1 - share))
