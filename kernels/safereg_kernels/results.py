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
from safereg_kernels.call import Call
from safereg_kernels.selection import Selection


class RowResults(NamedTuple):
    """Of the active rows in working order, float32 [num_active]; the last three where wanted."""

    loss: Tensor
    ce: Tensor
    divergence: Tensor
    lse: Tensor | None
    entropy: Tensor | None
    accuracy: Tensor | None


def row_results(statistics: Tensor, selection: Selection, call: Call) -> RowResults:
    """What each row yields: loss = ce_weight (CE + z_loss lse^2) + kl_weight D."""
    spec, wanted = call.spec, selection.is_ce_wanted
    ce = of_label = cross_entropy_of(statistics, wanted)
    divergence = divergence_of(statistics, selection.kl_weights, spec.direction)
    if spec.z_loss != 0:
        of_label = ce + spec.z_loss * lse_of(statistics) ** 2
    loss = weighted(selection.ce_weights, of_label) + weighted(selection.kl_weights, divergence)
    if not call.has_metrics:
        return RowResults(loss, ce, divergence, None, None, None)
    metrics = lse_of(statistics), entropy_of(statistics), accuracy_of(statistics, wanted)
    return RowResults(loss, ce, divergence, *metrics)


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
    return torch.where(is_wanted, lse_of(statistics) - statistics[:, LABEL_LOGIT], 0.0)


def lse_of(statistics: Tensor) -> Tensor:
    """log sum exp x of whole rows, float32 [rows]."""
    return _if_any_token(statistics, statistics[:, MAX_P] + statistics[:, SUM_P].log())


def entropy_of(statistics: Tensor) -> Tensor:
    """Entropy of softmax(x) of whole rows in nats, float32 [rows]."""
    return _if_any_token(statistics, statistics[:, ENTROPY])


def accuracy_of(statistics: Tensor, is_wanted: Tensor) -> Tensor:
    """1 where no logit exceeds the label's, which an invalid one never reaches; float32 [rows].

    0 where it is not wanted.
    """
    is_best = statistics[:, LABEL_LOGIT] >= statistics[:, MAX_P]  # false for NaN
    return torch.where(is_wanted, _if_any_token(statistics, is_best.float()), 0.0)


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """weights * values, float32 [rows], where 0 times anything is 0."""
    return torch.where(weights != 0, weights * values, 0.0)


def _if_any_token(statistics: Tensor, values: Tensor) -> Tensor:
    """The values; NaN in rows that have no token."""
    return torch.where(statistics[:, SUM_P] != 0, values, float("nan"))
