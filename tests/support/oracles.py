"""The step of design section 2 in float64 NumPy: the judge that shares no code with us.

The losses of the head are those of kernels/tests/head_oracle.py. Gradients were derived by hand;
tests/unit/test_oracles.py holds them against central differences.
"""

import numpy as np
from head_oracle import (
    HeadResult,
    cross_entropy,
    cross_entropy_grad,
    divergence,
    divergence_grad,
    linear_ce_kl,
    log_softmax,
    softmax,
)

__all__ = [
    "DIRECTIONS",
    "OBJECTIVES",
    "SCHEDULES",
    "HeadResult",
    "coefficients",
    "cross_entropy",
    "cross_entropy_grad",
    "divergence",
    "divergence_grad",
    "linear_ce_kl",
    "log_softmax",
    "softmax",
    "step_loss",
    "token_weights",
]

Array = np.ndarray
DIRECTIONS = ("forward", "reverse", "l2")
"""Those of the trainer."""
SCHEDULES = ("step", "threshold", "linear", "clamp", "sigmoid")
OBJECTIVES = ("convex", "additive", "static", "none", "token_wise")


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


def token_weights(
    kl_coef: Array, is_anchor: Array, row_of_token: Array, objective: str, num_tokens: float
) -> tuple[Array, Array]:
    """(ce_weights, kl_weights), each [tokens]: the factors of CE_t and D_t in L, 1/N included.

    convex, static  (1 - b) / N and b / N;    additive  1 / N and b / N;    none  1 / N and 0;
    token_wise      1 / N, of a term that is not CE, and 0.
    An anchor row carries only D with b = 1, whatever the objective.
    """
    b = np.asarray(kl_coef, dtype=np.float64)[row_of_token]
    anchor = np.asarray(is_anchor, dtype=bool)[row_of_token]
    if objective in ("convex", "static"):
        task, regulariser = 1.0 - b, b
    elif objective == "additive":
        task, regulariser = np.ones_like(b), b
    elif objective in ("none", "token_wise"):
        task, regulariser = np.ones_like(b), np.zeros_like(b)
    else:
        raise ValueError(f"unknown objective {objective!r}")
    return np.where(anchor, 0.0, task) / num_tokens, np.where(anchor, 1.0, regulariser) / num_tokens


def betas(row_of_token: Array) -> Array:
    """beta_t of constrained fine-tuning (2406.05946) for rows of one response: 0.5, 2 x 4, 0.1."""
    place = np.arange(len(row_of_token)) - np.searchsorted(row_of_token, row_of_token)
    return np.select([place == 0, place < 5], [0.5, 2.0], 0.1)


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
    beyond = 0.0
    if objective == "token_wise":
        # 2/beta log(1 + exp(beta (CE - CE'))), whose derivative in CE is `factor`.
        own, other = (
            cross_entropy(np.asarray(h, np.float64) @ np.asarray(w, np.float64).T, labels)
            for h, w in ((hidden, head), (reference_hidden, reference_head))
        )
        beta = betas(row_of_token)
        value = 2 / beta * np.logaddexp(0, beta * (own - other))
        factor = 2 / (1 + np.exp(-beta * (own - other)))
        beyond = float((ce_weights * (value - factor * own)).sum())
        ce_weights = ce_weights * factor
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
    div = result.divergence
    if objective == "token_wise":  # of all rows, though only anchors have it in their loss
        active = np.ones(len(hidden), dtype=bool)
        models = (np.asarray(h, np.float64) @ np.asarray(w, np.float64).T
                  for h, w in ((hidden, head), (reference_hidden, reference_head)))  # fmt: skip
        div = divergence(*models, direction=direction)
    return {
        "loss": result.loss + beyond,
        "task_loss": float(ce[task].mean()) if task.any() else 0.0,
        "divergence": float(div[active].mean()) if active.any() else 0.0,
        "grad_hidden": result.grad_hidden,
        "grad_head": result.grad_head,
        "ce": ce,
        "div": div,
    }


def pooled(span, pooling):
    """[H] or [2H] float64 of a span's states [tokens, H]: last, mean, or the one and the other."""
    states = np.asarray(span, np.float64)
    parts = {"last": [states[-1]], "mean": [states.mean(0)], "both": [states[-1], states.mean(0)]}
    return np.concatenate(parts[pooling.split("_")[0]])
