"""From the statistics of rows to what the public functions return."""

from typing import NamedTuple

import torch
from torch import Tensor

from safereg_kernels.block import (
    DIVERGENCE,
    ENTROPY,
    LABEL_LOGIT,
    MAX_P,
    REF_B,
    SUM_P,
    SUM_PT,
)
from safereg_kernels.selection import Selection
from safereg_kernels.spec import LossSpec


class RowResults(NamedTuple):
    """Of the active rows in working order, float32 [num_active] each."""

    loss: Tensor
    ce: Tensor
    divergence: Tensor
    lse: Tensor
    entropy: Tensor
    accuracy: Tensor


def row_results(statistics: Tensor, selection: Selection, spec: LossSpec) -> RowResults:
    """What each row yields: loss = ce_weight (CE + z_loss lse^2) + kl_weight D."""
    wanted = selection.is_ce_wanted
    every = torch.ones_like(wanted)
    ce = cross_entropy_of(statistics, wanted)
    divergence = divergence_of(statistics, selection.kl_weights, spec.direction)
    lse = lse_of(statistics, every)
    of_label = ce if spec.z_loss == 0 else ce + spec.z_loss * lse * lse
    loss = weighted(selection.ce_weights, of_label) + weighted(selection.kl_weights, divergence)
    entropy, accuracy = entropy_of(statistics, every), accuracy_of(statistics, wanted)
    return RowResults(loss, ce, divergence, lse, entropy, accuracy)


def divergence_of(statistics: Tensor, weights: Tensor, direction: str) -> Tensor:
    """Divergence of whole rows, float32 [rows]; 0 where the weight is 0.

    A row without any token has none: it is NaN, and must not look like a perfect one.
    """
    value, of_reference = statistics[:, DIVERGENCE], statistics[:, REF_B]
    if direction == "l2":
        value = value / of_reference
    else:
        has_mass = (statistics[:, SUM_PT] != 0) & (of_reference != 0)
        value = torch.where(has_mass, value, float("nan"))
    return torch.where(weights != 0, value, 0.0)


def cross_entropy_of(statistics: Tensor, is_wanted: Tensor) -> Tensor:
    """Cross-entropy of whole rows, float32 [rows]; 0 where it is not wanted."""
    value = _log_sum_exp(statistics) - statistics[:, LABEL_LOGIT]
    return torch.where(is_wanted, value, 0.0)


def lse_of(statistics: Tensor, is_wanted: Tensor) -> Tensor:
    """log sum exp x of whole rows, float32 [rows]; 0 where it is not wanted."""
    return torch.where(is_wanted, _log_sum_exp(statistics), 0.0)


def entropy_of(statistics: Tensor, is_wanted: Tensor) -> Tensor:
    """Entropy of softmax(x) of whole rows in nats, float32 [rows]; 0 where it is not wanted."""
    return torch.where(is_wanted, _if_any_token(statistics, statistics[:, ENTROPY]), 0.0)


def accuracy_of(statistics: Tensor, is_wanted: Tensor) -> Tensor:
    """1 where no logit exceeds the label's, which an invalid one never reaches; float32 [rows].

    0 where it is not wanted.
    """
    is_best = statistics[:, LABEL_LOGIT] >= statistics[:, MAX_P]  # false for NaN
    return torch.where(is_wanted, _if_any_token(statistics, is_best.float()), 0.0)


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """weights * values, float32 [rows], where 0 times anything is 0."""
    return torch.where(weights != 0, weights * values, 0.0)


def _log_sum_exp(statistics: Tensor) -> Tensor:
    return _if_any_token(statistics, statistics[:, MAX_P] + statistics[:, SUM_P].log())


def _if_any_token(statistics: Tensor, values: Tensor) -> Tensor:
    """The values; NaN in rows that have no token."""
    return torch.where(statistics[:, SUM_P] != 0, values, float("nan"))
