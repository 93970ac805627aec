"""The equations of head_oracle.py in float64 torch, on any device: the judge at production shapes.

Values are written from the equations, gradients are autograd's, all columns of a few rows at a
time. Shares no code with the package. test_head_oracle.py holds it against the NumPy oracle.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS_AT_A_TIME = 128
"""Rows of float64 logits held at once: 150 MB for a vocabulary of 152 thousand, ten times that in
autograd's graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Formula:
    """What a row's loss is a function of, besides its logits."""

    direction: str = "forward"
    beta: float = 0.5
    temperature: float = 1.0
    z_loss: float = 0.0
    policy_softcap: float | None = None
    reference_softcap: float | None = None
    policy_logit_scale: float = 1.0
    reference_logit_scale: float = 1.0
    vocab_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Losses of some rows and, where asked for, their gradient in the raw logits."""

    loss: Tensor
    ce: Tensor
    divergence: Tensor
    lse: Tensor
    entropy: Tensor
    grad: Tensor
    """[rows, columns] float64, of the sum of `loss`."""


def rows_of_logits(
    policy: Tensor,
    reference: Tensor | None,
    labels: Tensor | None,
    ce_weights: Tensor | None,
    kl_weights: Tensor,
    formula: Formula,
) -> Rows:
    """Truth of rows of raw logits, of any dtype; a row without a weight is not looked at.

    Weights may have any sign here: an upstream gradient may be in them.
    """
    ce_w = torch.zeros_like(kl_weights) if ce_weights is None else ce_weights
    ce_w, kl_w = ce_w.double(), kl_weights.double()
    has_ce, has_kl = ce_w != 0, kl_w != 0
    columns = policy.shape[1] if formula.vocab_size is None else formula.vocab_size
    raw = torch.where((has_ce | has_kl)[:, None], policy, 0.0).double().requires_grad_()
    x = _transformed(raw[:, :columns], formula.policy_logit_scale, formula.policy_softcap)
    lse = x.logsumexp(-1)
    ce = torch.zeros_like(lse)
    if labels is not None:
        of_label = x.gather(-1, labels.clamp(0, columns - 1)[:, None])[:, 0]
        ce = torch.where(has_ce, lse - of_label, 0.0)
    divergence = torch.zeros_like(lse)
    if reference is not None:
        y = torch.where(has_kl[:, None], reference[:, :columns], 0.0).double()
        y = _transformed(y, formula.reference_logit_scale, formula.reference_softcap)
        divergence = torch.where(has_kl, _divergence(x, y, formula), 0.0)
    loss = ce_w * (ce + formula.z_loss * lse**2) + kl_w * divergence
    (grad,) = torch.autograd.grad(loss.sum(), raw)
    log_p = x.detach() - lse.detach()[:, None]
    entropy = -(log_p.exp() * log_p.clamp_min(-1e300)).sum(-1)
    is_there = has_ce | has_kl
    return Rows(
        loss=loss.detach(),
        ce=ce.detach(),
        divergence=divergence.detach(),
        lse=torch.where(is_there, lse.detach(), 0.0),
        entropy=torch.where(is_there, entropy, 0.0),
        grad=grad,
    )


def in_slices(rows: int) -> Iterator[slice]:
    """Slices of ROWS_AT_A_TIME rows."""
    for begin in range(0, rows, ROWS_AT_A_TIME):
        yield slice(begin, min(begin + ROWS_AT_A_TIME, rows))


def _transformed(raw: Tensor, scale: float, softcap: float | None) -> Tensor:
    return raw * scale if softcap is None else softcap * torch.tanh(raw * scale / softcap)


def _divergence(x: Tensor, y: Tensor, formula: Formula) -> Tensor:
    u = (x - y) / formula.temperature
    if formula.direction == "l2":
        return (u - u.mean(-1, keepdim=True)).square().mean(-1)
    a, b = ((z / formula.temperature).log_softmax(-1) for z in (x, y))
    if formula.direction == "forward":
        return _expected(b, a)
    if formula.direction == "reverse":
        return _expected(a, b)
    beta = formula.beta
    log_m = torch.logaddexp(b + math.log(beta), a + math.log1p(-beta))
    return beta * _expected(b, log_m) + (1.0 - beta) * _expected(a, log_m)


def _expected(log_u: Tensor, log_w: Tensor) -> Tensor:
    """KL(u||w); a token without mass in u contributes nothing."""
    is_there = log_u > -torch.inf
    gap = torch.where(is_there, log_u, 0.0) - torch.where(is_there, log_w, 0.0)
    return (log_u.exp() * gap).sum(-1)
