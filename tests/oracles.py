"""The equations of design section 2 in float64 NumPy: the judge that shares no code with us.

x, y = policy and reference logits, p = softmax(x / T), q = softmax(y / T), a = log p, b = log q:

    forward  KL(q||p) = sum_v q (b - a)                      d/dx = (p - q) / T
    reverse  KL(p||q) = sum_v p (a - b)                      d/dx = p (a - b - KL(p||q)) / T
    l2       1/V sum_v (u_v - mean u)^2, u = (x - y) / T     d/dx = 2 (u - mean u) / (V T)

A token of probability 0 contributes nothing where it is the weighting distribution. For `l2` a
token whose logit is not finite in either model takes no part, neither in the means nor in V. The
gradients were derived by hand; tests/unit/test_oracles.py holds them against central differences.
"""

from typing import NamedTuple

import numpy as np

Array = np.ndarray
DIRECTIONS = ("forward", "reverse", "l2")
SCHEDULES = ("step", "threshold", "linear", "clamp", "sigmoid")
OBJECTIVES = ("convex", "additive", "static", "none")


def log_softmax(logits: Array) -> Array:
    """Log-probabilities over the last axis; -inf logits stay -inf."""
    x = np.asarray(logits, dtype=np.float64)
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def softmax(logits: Array) -> Array:
    """Probabilities over the last axis."""
    return np.exp(log_softmax(logits))


def _expected_gap(weight: Array, log_ratio: Array) -> Array:
    """sum_v weight * log_ratio with 0 * anything = 0."""
    return np.where(weight > 0, weight * np.where(weight > 0, log_ratio, 0.0), 0.0).sum(axis=-1)


def divergence(
    policy_logits: Array, reference_logits: Array, direction: str, temperature: float = 1.0
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
            return _expected_gap(np.exp(b), b - a)
        return _expected_gap(np.exp(a), a - b)


def divergence_grad(
    policy_logits: Array, reference_logits: Array, direction: str, temperature: float = 1.0
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
        ratio = np.where(p > 0, a - b, 0.0)
        value = divergence(policy_logits, reference_logits, direction, temperature)
        # NaN where the value is infinite: there is no gradient then.
        return p * (ratio - value[..., None]) / temperature


def _centred_gap(x: Array, y: Array) -> tuple[Array, Array]:
    """(u - mean u) with 0 at tokens that take no part, and the number of tokens that do."""
    kept = np.isfinite(x) & np.isfinite(y)
    count = kept.sum(axis=-1)
    u = np.where(kept, np.where(kept, x, 0.0) - np.where(kept, y, 0.0), 0.0)
    mean = u.sum(axis=-1, keepdims=True) / count[..., None]
    return np.where(kept, u - mean, 0.0), count


def cross_entropy(logits: Array, labels: Array) -> Array:
    """-log p(label) of each token, [tokens, vocab] -> [tokens]."""
    return -np.take_along_axis(log_softmax(logits), np.asarray(labels)[:, None], axis=-1)[:, 0]


def cross_entropy_grad(logits: Array, labels: Array) -> Array:
    """Gradient of each token's cross-entropy in its own logits: p - onehot, [tokens, vocab]."""
    grad = softmax(logits)
    grad[np.arange(len(grad)), np.asarray(labels)] -= 1.0
    return grad


def coefficients(
    risk: Array,
    schedule: str,
    *,
    threshold: float = 0.5,
    floor: float = 0.0,
    ceiling: float = 1.0,
    slope: float = 10.0,
) -> Array:
    """Coefficient b of each row from its risk in [0, 1].

    step       ceiling where risk >= threshold, else floor
    threshold  floor below it, from there on a line that reaches the ceiling at risk 1
    linear     floor + (ceiling - floor) risk
    clamp      clip((4 risk - 1) / 3, floor, ceiling): the official code's clip((score - 2) / 3) of
               a score 1..5, with risk = (score - 1) / 4
    sigmoid    floor + (ceiling - floor) / (1 + exp(-slope (risk - threshold)))
    """
    r = np.asarray(risk, dtype=np.float64)
    span = ceiling - floor
    if schedule == "step":
        return np.where(r >= threshold, ceiling, floor).astype(np.float64)
    if schedule == "threshold":
        if threshold >= 1.0:  # the line has no length left: only certain risk reaches the ceiling
            return np.where(r >= 1.0, ceiling, floor).astype(np.float64)
        return np.where(r < threshold, floor, floor + span * (r - threshold) / (1.0 - threshold))
    if schedule == "linear":
        return floor + span * r
    if schedule == "clamp":
        return np.clip((4.0 * r - 1.0) / 3.0, floor, ceiling)
    if schedule == "sigmoid":
        return floor + span / (1.0 + np.exp(-slope * (r - threshold)))
    raise ValueError(f"unknown schedule {schedule!r}")


class HeadResult(NamedTuple):
    """What `linear_ce_kl` yields; gradients are of `loss` with an upstream gradient of 1."""

    loss: float
    ce: Array
    divergence: Array
    grad_hidden: Array
    grad_head: Array
    grad_bias: Array


def _capped(raw: Array, softcap: float | None) -> Array:
    return raw if softcap is None else softcap * np.tanh(raw / softcap)


def linear_ce_kl(
    hidden: Array,
    head: Array,
    labels: Array,
    *,
    ce_weights: Array,
    kl_weights: Array,
    reference_hidden: Array | None = None,
    reference_head: Array | None = None,
    direction: str = "forward",
    bias: Array | float = 0.0,
    reference_bias: Array | float = 0.0,
    softcap: float | None = None,
    reference_softcap: float | None = None,
    vocab_size: int | None = None,
) -> HeadResult:
    """sum_t ce_weights_t CE_t + kl_weights_t D_t from hidden states, one token at a time.

    Rows with a weight of 0 are never looked at; their `ce` or `divergence` is 0. With a soft cap c
    logits are c tanh(raw / c), whose derivative is 1 - tanh^2. Columns from `vocab_size` on do not
    exist: their gradient is 0.
    """
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    ce, div = np.zeros(len(hidden)), np.zeros(len(hidden))
    grad_hidden, grad_head = np.zeros_like(hidden), np.zeros_like(head)
    grad_bias = np.zeros(len(head))
    loss = 0.0
    for t in range(len(hidden)):
        if ce_weights[t] == 0 and kl_weights[t] == 0:
            continue
        logits = _capped(head @ hidden[t] + bias, softcap)[None, :vocab_size]
        grad = np.zeros(logits.shape[1])
        if ce_weights[t] != 0:
            label = np.asarray([labels[t]])
            ce[t] = cross_entropy(logits, label)[0]
            grad += ce_weights[t] * cross_entropy_grad(logits, label)[0]
            loss += ce_weights[t] * ce[t]
        if kl_weights[t] != 0:
            if reference_hidden is None or reference_head is None:
                raise ValueError("a row has a KL weight but there is no reference")
            state = np.asarray(reference_hidden[t], np.float64)
            raw = np.asarray(reference_head, np.float64) @ state + reference_bias
            target = _capped(raw, reference_softcap)[None, :vocab_size]
            div[t] = divergence(logits, target, direction)[0]
            grad += kl_weights[t] * divergence_grad(logits, target, direction)[0]
            loss += kl_weights[t] * div[t]
        if softcap is not None:
            grad = grad * (1.0 - (logits[0] / softcap) ** 2)
        grad = np.pad(grad, (0, len(head) - len(grad)))
        grad_hidden[t] = grad @ head
        grad_head += np.outer(grad, hidden[t])
        grad_bias += grad
    return HeadResult(float(loss), ce, div, grad_hidden, grad_head, grad_bias)


def token_weights(
    kl_coef: Array, is_anchor: Array, row_of_token: Array, objective: str, num_tokens: float
) -> tuple[Array, Array]:
    """(ce_weights, kl_weights), each [tokens]: the factors of CE_t and D_t in L, 1/N included.

    convex, static  (1 - b) / N and b / N;    additive  1 / N and b / N;    none  1 / N and 0.
    An anchor row carries only D with b = 1, whatever the objective.
    """
    b = np.asarray(kl_coef, dtype=np.float64)[row_of_token]
    anchor = np.asarray(is_anchor, dtype=bool)[row_of_token]
    if objective in ("convex", "static"):
        task, regulariser = 1.0 - b, b
    elif objective == "additive":
        task, regulariser = np.ones_like(b), b
    elif objective == "none":
        task, regulariser = np.ones_like(b), np.zeros_like(b)
    else:
        raise ValueError(f"unknown objective {objective!r}")
    return np.where(anchor, 0.0, task) / num_tokens, np.where(anchor, 1.0, regulariser) / num_tokens


def step_loss(
    hidden: Array,
    head: Array,
    labels: Array,
    row_of_token: Array,
    kl_coef: Array,
    is_anchor: Array,
    reference_hidden: Array | None,
    reference_head: Array | None,
    *,
    objective: str = "convex",
    direction: str = "forward",
    num_tokens: float | None = None,
) -> dict:
    """One step's L of design section 2, its parts and its gradients, over the tokens given.

    Args:
        hidden: [T, H] of the response tokens, anchors included; head: [V, H]; labels: [T], aligned.
        row_of_token: [T] index of each token's row; kl_coef, is_anchor: [rows].
        reference_hidden: [T, H_ref]; reference_head: [V, H_ref]; None if nothing is regularised.
        num_tokens: N, the response tokens of all ranks and micro-batches; T if None.
    Returns:
        loss; task_loss = mean CE over response tokens of rows that are no anchors, unweighted (also
        where its weight in L is 0); divergence = mean D over tokens with b > 0, anchors included;
        grad_hidden, grad_head of `loss`; ce [T] (0 on anchors); div [T] (0 where b = 0).
    """
    row_of_token = np.asarray(row_of_token)
    total = len(hidden) if num_tokens is None else num_tokens
    ce_weights, kl_weights = token_weights(kl_coef, is_anchor, row_of_token, objective, total)
    result = linear_ce_kl(
        hidden,
        head,
        labels,
        ce_weights=ce_weights,
        kl_weights=kl_weights,
        reference_hidden=reference_hidden,
        reference_head=reference_head,
        direction=direction,
    )
    task = ~np.asarray(is_anchor, dtype=bool)[row_of_token]
    ce = np.zeros(len(hidden))
    if task.any():
        logits = np.asarray(hidden, np.float64)[task] @ np.asarray(head, np.float64).T
        ce[task] = cross_entropy(logits, np.asarray(labels)[task])
    active = kl_weights > 0
    return {
        "loss": result.loss,
        "task_loss": float(ce[task].mean()) if task.any() else 0.0,
        "divergence": float(result.divergence[active].mean()) if active.any() else 0.0,
        "grad_hidden": result.grad_hidden,
        "grad_head": result.grad_head,
        "ce": ce,
        "div": result.divergence,
    }
