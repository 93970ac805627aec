"""The formulas in eager torch: values and gradients of a block of tokens, in float32.

x = policy logits, y = reference logits, p = softmax(x / T), q = softmax(y / T), a = log p and
b = log q. Each function returns the divergence of every row and its gradient in x:

    forward  KL(q||p) = sum_v q (b - a)           grad = (p - q) / T
    reverse  KL(p||q) = sum_v p (a - b)           grad = p (a - b - KL) / T
    l2       1/V sum_v (cx_v - cy_v)^2            grad = 2 (cx - cy) / (V T)

with cx = x/T - mean(x/T), cy likewise (centred logits, so that a constant shift changes nothing).
"""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

DIRECTIONS = ("forward", "reverse", "l2")


def divergence_and_grad(
    policy_logits: Tensor,
    reference_logits: Tensor,
    *,
    direction: str,
    temperature: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Divergence [rows] in float32 and its gradient [rows, vocab] in the policy logits (or None).

    -inf logits (suppressed tokens) in both models contribute nothing; p > 0 where q = 0 is a
    genuine +inf of the reverse direction and is reported as such.
    """
    x = policy_logits.float() / temperature
    y = reference_logits.float() / temperature
    if direction == "l2":
        return _l2(x, y, temperature, need_grad)
    a, b = log_softmax(x, dim=-1), log_softmax(y, dim=-1)
    p, q = a.exp(), b.exp()
    # KL as a sum of non-negative terms, e.g. q (b - a) + p - q >= 0: adding p - q (which sums to 0)
    # keeps the value accurate when the two models nearly agree and plain summation cancels.
    if direction == "forward":
        value = _bregman(q, b, p, a).sum(-1)
        return value, ((p - q) / temperature if need_grad else None)
    value = _bregman(p, a, q, b).sum(-1)
    if not need_grad:
        return value, None
    gap = torch.where(p > 0, a - b, 0.0)
    return value, p * (gap - (p * gap).sum(-1, keepdim=True)) / temperature


def _bregman(u: Tensor, log_u: Tensor, w: Tensor, log_w: Tensor) -> Tensor:
    """u log(u/w) - u + w elementwise, each term >= 0; 0 where u = 0 = w."""
    d = log_u - log_w
    # Series of u (d - 1 + exp(-d)) for small d, where the literal form loses all digits.
    series = u * d * d * (0.5 - d / 6 + d * d / 24)
    literal = torch.where(u > 0, u * d, 0.0) - u + w
    return torch.where((d.abs() < 0.06) & (u > 0), series, literal)


def _l2(x: Tensor, y: Tensor, temperature: float, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    kept = torch.isfinite(x) & torch.isfinite(y)  # suppressed tokens take no part
    count = kept.sum(-1, keepdim=True).clamp_min(1)
    x, y = torch.where(kept, x, 0.0), torch.where(kept, y, 0.0)
    gap = (x - y) - ((x - y).sum(-1, keepdim=True) / count)
    gap = torch.where(kept, gap, 0.0)
    value = (gap * gap).sum(-1) / count.squeeze(-1)
    return value, (2 * gap / (count * temperature) if need_grad else None)


def cross_entropy_and_grad(
    policy_logits: Tensor, labels: Tensor, *, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy [rows] in float32 and its gradient p - onehot [rows, vocab] (or None)."""
    logprobs = log_softmax(policy_logits.float(), dim=-1)
    value = -logprobs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if not need_grad:
        return value, None
    grad = logprobs.exp_()
    grad.scatter_add_(
        -1, labels.unsqueeze(-1), torch.full_like(labels, -1, dtype=grad.dtype)[:, None]
    )
    return value, grad
