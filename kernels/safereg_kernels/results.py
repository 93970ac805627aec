"""From the statistics of rows to what the public functions return."""

import torch
from torch import Tensor

from safereg_kernels.block import DIVERGENCE, LABEL_LOGIT, MAX_P, REF_B, SUM_P


def divergence_of(statistics: Tensor, weights: Tensor, direction: str) -> Tensor:
    """Divergence of whole rows, float32 [rows]; 0 where the weight is 0."""
    value = statistics[:, DIVERGENCE]
    if direction == "l2":
        value = value / statistics[:, REF_B].clamp_min(1)
    else:  # a row without any mass has no divergence, and must not look like a perfect one
        has_mass = (statistics[:, SUM_P] != 0) & (statistics[:, REF_B] != 0)
        value = torch.where(has_mass, value, float("nan"))
    return torch.where(weights != 0, value, 0.0)


def cross_entropy_of(statistics: Tensor, is_wanted: Tensor) -> Tensor:
    """Cross-entropy of whole rows, float32 [rows]; 0 where it is not wanted."""
    value = statistics[:, MAX_P] + statistics[:, SUM_P].log() - statistics[:, LABEL_LOGIT]
    return torch.where(is_wanted, value, 0.0)


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """sum_t weights_t values_t, float32 scalar, where 0 times anything is 0."""
    return torch.where(weights != 0, weights * values, 0.0).sum()
