"""The equations of the head's losses in float64 NumPy: the judge that shares no code with us.

raw logits of policy and reference are hidden @ head.T + bias; x and y are the logits of which the
losses are functions: x = scale raw, or cap tanh(scale raw / cap) with a soft cap. A row costs

    ce_weight (CE + z_loss lse^2) + kl_weight D,    CE = lse - x_label,  lse = log sum exp x

With p = softmax(x / T), q = softmax(y / T), a = log p, b = log q, and d/dx the gradient in x:

    forward  KL(q||p) = sum_v q (b - a)                      d/dx = (p - q) / T
    reverse  KL(p||q) = sum_v p (a - b)                      d/dx = p (a - b - KL(p||q)) / T
    l2       1/V sum_v (u_v - mean u)^2, u = (x - y) / T     d/dx = 2 (u - mean u) / (V T)
    jsd      beta KL(q||m) + (1 - beta) KL(p||m), m = beta q + (1 - beta) p
                                                d/dx = (1 - beta) p (a - log m - KL(p||m)) / T
    CE + z_loss lse^2                           d/dx = softmax(x) (1 + 2 z_loss lse) - onehot

and in raw logits all of it times scale (1 - (x / cap)^2). A token of probability 0 contributes
nothing where it is the weighting distribution. For `l2` a token whose logit is not finite in either
model takes no part, neither in the means nor in V. A teacher of k tokens is a reference whose other
logits are -inf. The gradients were derived by hand; test_head_oracle.py holds them against central
differences.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Array = np.ndarray
DIRECTIONS = ("forward", "reverse", "l2", "jsd")


# ---- of logits, over the last axis ---------------------------------------------------------------


def log_sum_exp(logits: Array) -> Array:
    """log sum_v exp(logits_v)."""
    x = np.asarray(logits, dtype=np.float64)
    largest = x.max(axis=-1, keepdims=True)
    return largest[..., 0] + np.log(np.exp(x - largest).sum(axis=-1))


def log_softmax(logits: Array) -> Array:
    """Log-probabilities; -inf logits stay -inf."""
    x = np.asarray(logits, dtype=np.float64)
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def softmax(logits: Array) -> Array:
    """Probabilities."""
    return np.exp(log_softmax(logits))


def entropy(logits: Array) -> Array:
    """-sum_v p log p in nats."""
    log_p = log_softmax(logits)
    return -_expected(np.exp(log_p), log_p)


def divergence(
    policy_logits: Array,
    reference_logits: Array,
    direction: str,
    temperature: float = 1.0,
    beta: float = 0.5,
) -> Array:
    """Divergence of each token, [..., vocab] -> [...], in nats (l2: squared logit units)."""
    x = np.asarray(policy_logits, dtype=np.float64) / temperature
    y = np.asarray(reference_logits, dtype=np.float64) / temperature
    if direction == "l2":
        gap, count = _centred_gap(x, y)
        return (gap**2).sum(axis=-1) / count
    a, b = log_softmax(x), log_softmax(y)
    with np.errstate(invalid="ignore"):  # -inf - -inf where a token is suppressed in both
        if direction == "forward":
            return _expected(np.exp(b), b - a)
        if direction == "reverse":
            return _expected(np.exp(a), a - b)
        log_m = _log_mixture(a, b, beta)
        of_q, of_p = _expected(np.exp(b), b - log_m), _expected(np.exp(a), a - log_m)
        return beta * of_q + (1.0 - beta) * of_p


def divergence_grad(
    policy_logits: Array,
    reference_logits: Array,
    direction: str,
    temperature: float = 1.0,
    beta: float = 0.5,
) -> Array:
    """Gradient of each token's divergence in its own policy logits, [..., vocab]."""
    x = np.asarray(policy_logits, dtype=np.float64) / temperature
    y = np.asarray(reference_logits, dtype=np.float64) / temperature
    if direction == "l2":
        gap, count = _centred_gap(x, y)
        return 2.0 * gap / (count[..., None] * temperature)
    a, b = log_softmax(x), log_softmax(y)
    p = np.exp(a)
    if direction == "forward":
        return (p - np.exp(b)) / temperature
    with np.errstate(invalid="ignore"):
        other = b if direction == "reverse" else _log_mixture(a, b, beta)
        factor = 1.0 if direction == "reverse" else 1.0 - beta
        ratio = np.where(p > 0, a - other, 0.0)
        value = _expected(p, a - other)
        # NaN where the value is infinite: there is no gradient then.
        return factor * p * (ratio - value[..., None]) / temperature


def cross_entropy(logits: Array, labels: Array) -> Array:
    """-log p(label) of each token, [tokens, vocab] -> [tokens]; NaN where it is no token id."""
    labels, is_id = _token_ids(logits, labels)
    value = -np.take_along_axis(log_softmax(logits), labels[:, None], axis=-1)[:, 0]
    return np.where(is_id, value, np.nan)


def cross_entropy_grad(logits: Array, labels: Array) -> Array:
    """Gradient of each token's cross-entropy in its own logits: p - onehot, [tokens, vocab]."""
    labels, is_id = _token_ids(logits, labels)
    grad = softmax(logits)
    grad[np.arange(len(grad)), labels] -= 1.0
    return np.where(is_id[:, None], grad, np.nan)


def z_loss(logits: Array) -> Array:
    """Square of log sum exp."""
    return log_sum_exp(logits) ** 2


def z_loss_grad(logits: Array) -> Array:
    """Gradient of each token's z-loss in its own logits, [..., vocab]."""
    return 2.0 * log_sum_exp(logits)[..., None] * softmax(logits)


def is_label_largest(logits: Array, labels: Array) -> Array:
    """1.0 where no logit exceeds the label's, [tokens, vocab] -> [tokens]."""
    labels, is_id = _token_ids(logits, labels)
    own = np.take_along_axis(np.asarray(logits), labels[:, None], axis=-1)[:, 0]
    return np.where(is_id & (np.asarray(logits).max(axis=-1) <= own), 1.0, 0.0)


def transformed(raw: Array, scale: float = 1.0, softcap: float | None = None) -> Array:
    """Logits from what the head gives: scaled, then soft-capped."""
    scaled = scale * np.asarray(raw, dtype=np.float64)
    return scaled if softcap is None else softcap * np.tanh(scaled / softcap)


def transformed_grad(raw: Array, scale: float = 1.0, softcap: float | None = None) -> Array:
    """Derivative of `transformed` in each raw logit."""
    if softcap is None:
        return np.full_like(np.asarray(raw, dtype=np.float64), scale)
    return scale * (1.0 - np.tanh(scale * np.asarray(raw, dtype=np.float64) / softcap) ** 2)


def sparse_logits(ids: Array, logits: Array, vocab: int) -> Array:
    """Logits [tokens, vocab] of a teacher that knows k tokens: -inf at all others."""
    full = np.full((len(ids), vocab), -np.inf)
    np.put_along_axis(full, np.asarray(ids), np.asarray(logits, dtype=np.float64), axis=-1)
    return full


def _expected(weight: Array, value: Array) -> Array:
    """sum_v weight * value with 0 * anything = 0."""
    return np.where(weight > 0, weight * np.where(weight > 0, value, 0.0), 0.0).sum(axis=-1)


def _log_mixture(a: Array, b: Array, beta: float) -> Array:
    """log(beta q + (1 - beta) p)."""
    return np.logaddexp(np.log(beta) + b, np.log1p(-beta) + a)


def _centred_gap(x: Array, y: Array) -> tuple[Array, Array]:
    """(u - mean u) with 0 at tokens that take no part, and the number of tokens that do."""
    kept = np.isfinite(x) & np.isfinite(y)
    count = kept.sum(axis=-1)
    u = np.where(kept, np.where(kept, x, 0.0) - np.where(kept, y, 0.0), 0.0)
    mean = u.sum(axis=-1, keepdims=True) / count[..., None]
    return np.where(kept, u - mean, 0.0), count


def _token_ids(logits: Array, labels: Array) -> tuple[Array, Array]:
    """(labels with 0 for what is no token id, whether each is one)."""
    labels = np.asarray(labels)
    is_id = (labels >= 0) & (labels < np.shape(logits)[-1])
    return np.where(is_id, labels, 0), is_id


# ---- of hidden states ----------------------------------------------------------------------------


class HeadResult(NamedTuple):
    """What `linear_ce_kl` yields; gradients are of `loss` times `upstream`."""

    loss: float | Array
    ce: Array
    divergence: Array
    grad_hidden: Array
    grad_head: Array
    grad_bias: Array
    lse: Array
    entropy: Array
    accuracy: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class _Formula:
    """What a row's loss is a function of, beside its logits."""

    direction: str
    beta: float
    temperature: float
    z_loss: float
    softcap: float | None
    logit_scale: float


def linear_ce_kl(
    hidden: Array,
    head: Array,
    labels: Array,
    *,
    ce_weights: Array | None = None,
    kl_weights: Array | None = None,
    reference_hidden: Array | None = None,
    reference_head: Array | None = None,
    reference_topk: tuple[Array, Array] | None = None,
    direction: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    bias: Array | float = 0.0,
    reference_bias: Array | float = 0.0,
    softcap: float | None = None,
    reference_softcap: float | None = None,
    logit_scale: float = 1.0,
    reference_logit_scale: float = 1.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    ce_report: Array | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    reduction: str = "sum",
    upstream: Array | float = 1.0,
) -> HeadResult:
    """Cross-entropy plus divergence from hidden states, one token at a time.

    hidden is [T, H], and all that is per token [T]; or [B, S, H] and [B, S]. Rows with no weight
    (and no report wanted) are never looked at: their results are 0. Columns from `vocab_size` on do
    not exist: their gradient is 0. `temperature` is the divergence's alone.
    """
    labels, ce_weights, kl_weights = _aligned(labels, ce_weights, kl_weights, ignore_index, shift)
    shape, width = labels.shape, np.shape(hidden)[-1]
    states = np.asarray(hidden, np.float64).reshape(-1, width)
    head = np.asarray(head, np.float64)
    ce_w, kl_w, ids = ce_weights.ravel(), kl_weights.ravel(), labels.ravel()
    is_shown = np.zeros(len(ids), bool) if ce_report is None else np.ravel(ce_report).astype(bool)
    factor = _upstream_of_rows(upstream, reduction, shape, (ce_w != 0) | (kl_w != 0))
    targets = _Targets(
        reference_hidden,
        reference_head,
        reference_topk,
        reference_bias,
        (reference_logit_scale, reference_softcap),
        head.shape[0] if vocab_size is None else vocab_size,
    )
    formula = _Formula(
        direction=direction,
        beta=beta,
        temperature=temperature,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
    )
    values = np.zeros((6, len(ids)))
    grad_hidden, grad_head = np.zeros_like(states), np.zeros_like(head)
    grad_bias = np.zeros(len(head))
    for t in np.flatnonzero((ce_w != 0) | (kl_w != 0) | is_shown):
        raw = (head @ states[t] + bias)[None, :vocab_size]
        target = targets.of(t) if kl_w[t] != 0 else None
        wanted = bool(ce_w[t] != 0 or is_shown[t])
        values[:, t], grad = _row(raw, ids[t], ce_w[t], kl_w[t], target, wanted, formula)
        grad = np.pad(grad, (0, len(head) - len(grad))) * factor[t]
        grad_hidden[t] = grad @ head
        grad_head += np.outer(grad, states[t])
        grad_bias += grad
    loss, ce, div, *metrics = (row.reshape(shape) for row in values)
    count = max(1, int(((ce_w != 0) | (kl_w != 0)).sum()))
    reduced = {"sum": loss.sum(), "mean": loss.sum() / count, "none": loss}[reduction]
    return HeadResult(
        reduced, ce, div, grad_hidden.reshape(np.shape(hidden)), grad_head, grad_bias, *metrics
    )


def _aligned(
    labels: Array,
    ce_weights: Array | None,
    kl_weights: Array | None,
    ignore_index: int,
    shift: bool,
) -> tuple[Array, Array, Array]:
    """(labels, ce_weights, kl_weights) of each position, as the defaults and `shift` have them."""
    labels = np.asarray(labels)
    ce_weights = np.ones(labels.shape) if ce_weights is None else np.array(ce_weights, np.float64)
    kl_weights = np.zeros(labels.shape) if kl_weights is None else np.array(kl_weights, np.float64)
    if shift:
        last = np.full_like(labels[:, :1], ignore_index)
        labels = np.concatenate([labels[:, 1:], last], axis=1)
        kl_weights[:, -1] = 0.0
    ce_weights[labels == ignore_index] = 0.0
    return labels, ce_weights, kl_weights


def _upstream_of_rows(
    upstream: Array | float, reduction: str, shape: tuple[int, ...], is_weighted: Array
) -> Array:
    """The factor of each row's gradient."""
    rows = np.broadcast_to(np.asarray(upstream, np.float64), shape).ravel()
    return rows / max(1, int(is_weighted.sum())) if reduction == "mean" else rows


class _Targets:
    """The reference's logits of a row, from its hidden states or from its k largest logits."""

    def __init__(
        self,
        hidden: Array | None,
        head: Array | None,
        topk: tuple[Array, Array] | None,
        bias: Array | float,
        transform: tuple[float, float | None],
        vocab_size: int,
    ) -> None:
        self._hidden = None if hidden is None else np.asarray(hidden, np.float64)
        self._head = None if head is None else np.asarray(head, np.float64)
        self._topk, self._bias, self._transform = topk, bias, transform
        self._vocab_size = vocab_size

    def of(self, t: int) -> Array:
        """[1, vocab_size]."""
        if self._topk is not None:
            ids, logits = (np.asarray(part).reshape(-1, part.shape[-1]) for part in self._topk)
            return sparse_logits(ids[t : t + 1], logits[t : t + 1], self._vocab_size)
        if self._hidden is None or self._head is None:
            raise ValueError("a row has a KL weight but there is no reference")
        state = self._hidden.reshape(-1, self._hidden.shape[-1])[t]
        raw = (self._head @ state + self._bias)[None, : self._vocab_size]
        return transformed(raw, *self._transform)


def _row(
    raw: Array,
    label: int,
    ce_weight: float,
    kl_weight: float,
    target: Array | None,
    is_ce_wanted: bool,
    formula: _Formula,
) -> tuple[Array, Array]:
    """((loss, ce, divergence, lse, entropy, accuracy), gradient in the raw logits) of one row."""
    x = transformed(raw, formula.logit_scale, formula.softcap)
    grad = np.zeros(x.shape[1])
    loss = ce = div = accuracy = 0.0
    if is_ce_wanted:
        ce = cross_entropy(x, np.asarray([label]))[0]
        accuracy = is_label_largest(x, np.asarray([label]))[0]
    if ce_weight != 0:
        loss += ce_weight * (ce + formula.z_loss * z_loss(x)[0])
        of_ce = cross_entropy_grad(x, np.asarray([label]))[0]
        grad += ce_weight * (of_ce + formula.z_loss * z_loss_grad(x)[0])
    if target is not None:
        how = (formula.direction, formula.temperature, formula.beta)
        div = divergence(x, target, *how)[0]
        loss += kl_weight * div
        grad += kl_weight * divergence_grad(x, target, *how)[0]
    grad = grad * transformed_grad(raw, formula.logit_scale, formula.softcap)[0]
    return np.array([loss, ce, div, log_sum_exp(x)[0], entropy(x)[0], accuracy]), grad


# ---- its own judge -------------------------------------------------------------------------------


def central_differences(value: Callable[[Array], float], at: Array, step: float = 1e-5) -> Array:
    """Gradient of a scalar function, one coordinate at a time."""
    grad = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        grad[index] = (value(up) - value(down)) / (2 * step)
    return grad
