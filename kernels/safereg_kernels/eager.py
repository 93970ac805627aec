"""The formulas in eager torch, float32: the CPU path, and what the Triton kernels are held against.

x, y = policy and reference logits (soft-capped and divided by the temperature T), p = softmax(x),
q = softmax(y), a = log p, b = log q. Divergence of a row and its gradient in the raw logits:

    forward  KL(q||p) = sum_v q (b - a)            grad = (p - q) / T
    reverse  KL(p||q) = sum_v p (a - b)            grad = p (a - b - KL) / T
    l2       1/V sum_v (u_v - mean u)^2, u = x - y grad = 2 (u - mean u) / (V T)

and the cross-entropy, log sum exp x - x_label, with gradient p - onehot. Each path has the same
three functions. A row is reduced to six numbers, its *statistics*; they merge, so the columns may
be spread over programs or over tensor-parallel ranks; the gradient needs nothing else of the row:

    MAX_P, SUM_P        m = max x,  s = sum exp(x - m)
    LABEL_LOGIT         x of the label
    REF_A, REF_B        the same m, s of y           (l2: mean of u, number of tokens)
    DIVERGENCE          KL between the two distributions conditioned on these columns
                        (l2: sum of (u - mean)^2)

The KL merges by the chain rule, KL = sum_k P_k KL_k + KL(P || Q) with P_k, Q_k the mass of part k.
Each sum is written with non-negative terms, u log(u/w) - u + w, so that a divergence of 1e-7 nats
keeps its digits and none is ever negative.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from safereg_kernels.block import (
    DIVERGENCE,
    LABEL_INVALID,
    LABEL_LOGIT,
    LOGIT_FLOOR,
    MAX_P,
    NUM_STATISTICS,
    REF_A,
    REF_B,
    SERIES_BELOW,
    SUM_P,
    Block,
    Formula,
)

BLOCK_LOGITS = 1 << 23
"""Logits worked on at a time, which bounds each temporary to 32 MiB. Blocks that fit a cache were
slower: every operation on one starts and joins the threads again."""


def row_statistics(block: Block, formula: Formula) -> Tensor:
    """Statistics of every row over this block's columns, float32 [rows, 6]."""
    statistics = _nothing_seen(block.policy, formula.direction)
    if formula.num_columns > 0:
        for rows in _blocks_of_rows(block):
            _fill_statistics(statistics[rows], _rows_of(block, rows), formula)
    return statistics


def _fill_statistics(statistics: Tensor, block: Block, formula: Formula) -> None:
    kl_rows = block.kl_weights.nonzero().squeeze(-1)
    rows = None if block.labels is not None else kl_rows
    x, y = _logits(block, formula, rows, kl_rows)
    on_rows = slice(None) if rows is None else rows
    statistics[on_rows, MAX_P], statistics[on_rows, SUM_P], scaled = _max_and_sum(x)
    if block.labels is not None:
        statistics[:, LABEL_LOGIT] = _label_logits(x, block.labels)
        x, scaled = _take(x, kl_rows), _take(scaled, kl_rows)
    if y is None:
        return
    with_kl = statistics[kl_rows]
    if formula.direction == "l2":
        _fill_l2(with_kl, x, y)
    else:
        _fill_kl(with_kl, x, y, scaled, formula.direction)
    statistics[kl_rows] = with_kl


def merge_statistics(partials: Tensor, direction: str) -> Tensor:
    """Statistics of whole rows [rows, 6] from those of their parts, float32 [rows, parts, 6]."""
    merged = partials.new_empty(partials.shape[0], NUM_STATISTICS)
    max_p, sum_p, log_share_p = _merge_mass(partials[..., MAX_P], partials[..., SUM_P])
    merged[:, MAX_P], merged[:, SUM_P] = max_p, sum_p
    merged[:, LABEL_LOGIT] = partials[..., LABEL_LOGIT].sum(-1)
    part = partials[..., DIVERGENCE]
    if direction == "l2":
        mean, count = partials[..., REF_A], partials[..., REF_B]
        total = count.sum(-1)
        merged_mean = (mean * count).sum(-1) / total.clamp_min(1)
        spread = count * (mean - merged_mean[:, None]) ** 2
        merged[:, REF_A], merged[:, REF_B] = merged_mean, total
        merged[:, DIVERGENCE] = (part + spread).sum(-1)
        return merged
    max_q, sum_q, log_share_q = _merge_mass(partials[..., REF_A], partials[..., REF_B])
    merged[:, REF_A], merged[:, REF_B] = max_q, sum_q
    log_u, log_w = _weighting_first(direction, log_share_p, log_share_q)
    u = log_u.exp()
    inside = torch.where(u > 0, u * part, 0.0)
    merged[:, DIVERGENCE] = (inside + _kl_terms(u, log_w.exp(), log_u - log_w)).sum(-1)
    return merged


def write_gradient(out: Tensor, block: Block, formula: Formula, statistics: Tensor) -> None:
    """Writes ce_weight grad(CE) + kl_weight grad(D) in the raw policy logits into `out`.

    `out` [rows, columns] may be the policy's own logits; padding columns get exactly 0, and so do
    rows whose weights are both 0.
    """
    n = formula.num_columns
    if n > 0:
        for rows in _blocks_of_rows(block):
            _fill_gradient(out[rows, :n], _rows_of(block, rows), formula, statistics[rows])
    out[:, n:] = 0


def _fill_gradient(out: Tensor, block: Block, formula: Formula, statistics: Tensor) -> None:
    kl_rows = block.kl_weights.nonzero().squeeze(-1)
    rows = None if block.labels is not None else kl_rows
    x, y = _logits(block, formula, rows, kl_rows)
    own = _take(statistics, rows)
    p = (x - own[:, MAX_P, None]).exp_().div_(own[:, SUM_P, None])
    in_x = kl_rows if rows is None else None
    of_divergence = None
    if y is not None:
        of_divergence = _divergence_grad(
            _take(x, in_x), _take(p, in_x), y, formula.direction, statistics[kl_rows]
        ).mul_(block.kl_weights[kl_rows, None] / formula.temperature)
    grad = p if of_divergence is None else of_divergence
    if block.labels is not None:
        assert block.ce_weights is not None
        grad = p.mul_(block.ce_weights[:, None])
        _subtract_at_label(grad, block.labels, block.ce_weights)
        if of_divergence is not None:
            grad[slice(None) if len(kl_rows) == len(grad) else kl_rows] += of_divergence
    if formula.policy_softcap is not None:  # d(c tanh(raw/c)) / d raw = 1 - (x/c)^2
        grad *= 1 - (x * formula.temperature / formula.policy_softcap) ** 2
    if rows is None:
        out.copy_(grad)
    else:
        out.zero_()
        out[rows] = grad.to(out.dtype)


def _blocks_of_rows(block: Block) -> Iterator[slice]:
    rows, columns = block.policy.shape
    step = max(1, BLOCK_LOGITS // max(columns, 1))
    for begin in range(0, rows, step):
        yield slice(begin, begin + step)


def _rows_of(block: Block, rows: slice) -> Block:
    """The same rows of everything; the reference has the first ones only, and may end sooner."""
    reference = None if block.reference is None else block.reference[rows]
    return Block(
        policy=block.policy[rows],
        reference=reference,
        labels=None if block.labels is None else block.labels[rows],
        ce_weights=None if block.ce_weights is None else block.ce_weights[rows],
        kl_weights=block.kl_weights[rows],
    )


def _nothing_seen(like: Tensor, direction: str) -> Tensor:
    """The neutral element of `merge_statistics`, for every row."""
    statistics = torch.zeros(like.shape[0], NUM_STATISTICS, device=like.device)
    statistics[:, MAX_P] = LOGIT_FLOOR
    if direction != "l2":
        statistics[:, REF_A] = LOGIT_FLOOR
    return statistics


def _logits(
    block: Block, formula: Formula, rows: Tensor | None, kl_rows: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(x of `rows` (None = all), y of `kl_rows`), float32, capped and divided; padding cut off."""
    n = formula.num_columns
    x = _take(block.policy[:, :n], rows).float()
    y = None
    if block.reference is not None and kl_rows.numel() > 0:
        y = _take(block.reference[:, :n], kl_rows).float()
        if formula.is_difference:
            x = x.clone()
            x[slice(None) if rows is not None else kl_rows] += y
        y = _scaled(y, formula.reference_softcap, formula.temperature)
    return _scaled(x, formula.policy_softcap, formula.temperature), y


def _take(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """The rows named; without a copy where that is all of them, in order."""
    if rows is None or len(rows) == len(tensor):
        return tensor
    return tensor[rows]


def _scaled(raw: Tensor, softcap: float | None, temperature: float) -> Tensor:
    capped = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    return capped if temperature == 1.0 else capped / temperature


def _max_and_sum(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(max, sum of exp(x - max), exp(x - max)) of every row."""
    largest = x.amax(-1).clamp_min(LOGIT_FLOOR)
    scaled = (x - largest[:, None]).exp_()
    return largest, scaled.sum(-1), scaled


def _label_logits(x: Tensor, labels: Tensor) -> Tensor:
    here = x.gather(-1, labels.clamp_min(0)[:, None]).squeeze(-1)
    here = torch.where(labels >= 0, here, 0.0)
    return torch.where(labels == LABEL_INVALID, float("nan"), here)


def _fill_l2(statistics: Tensor, x: Tensor, y: Tensor) -> None:
    gap, kept = _gap(x, y)
    count = kept.sum(-1)
    mean = gap.sum(-1) / count.clamp_min(1)
    centred = torch.where(kept, gap - mean[:, None], 0.0)
    statistics[:, REF_A], statistics[:, REF_B] = mean, count.float()
    statistics[:, DIVERGENCE] = (centred * centred).sum(-1)


def _fill_kl(statistics: Tensor, x: Tensor, y: Tensor, scaled_p: Tensor, direction: str) -> None:
    max_p, sum_p = statistics[:, MAX_P], statistics[:, SUM_P]
    max_q, sum_q, scaled_q = _max_and_sum(y)
    statistics[:, REF_A], statistics[:, REF_B] = max_q, sum_q
    shift = (max_p + sum_p.log()) - (max_q + sum_q.log())
    log_ratio = (x - y).sub_(shift[:, None])  # log p/q
    u, w = _weighting_first(direction, scaled_p, scaled_q)
    sum_u, sum_w = _weighting_first(direction, sum_p, sum_q)
    d = log_ratio.neg_() if direction == "forward" else log_ratio
    value = _kl_of_tame_rows(u, d) / sum_u
    if not bool((value < float("inf")).all()):
        value = _kl_terms(u / sum_u[:, None], w / sum_w[:, None], d).sum(-1)
    # Without mass on both sides there is no conditional distribution: the merge sees to it.
    statistics[:, DIVERGENCE] = torch.where((sum_p != 0) & (sum_q != 0), value, 0.0)


def _kl_of_tame_rows(u: Tensor, d: Tensor) -> Tensor:
    """Sum of u (d - 1 + exp(-d)), a third of the passes of `_kl_terms`; overwrites nothing.

    NaN or inf where a token is suppressed, or w is so much larger than u that exp(-d) overflows.
    A term is >= 0; where rounding of a tiny d makes it less, it is 0 to float32.
    """
    return torch.expm1(-d).add_(d).clamp_min_(0).mul_(u).sum(-1)


def _weighting_first(direction: str, of_p: Tensor, of_q: Tensor) -> tuple[Tensor, Tensor]:
    """(of the distribution that weights the logarithm, of the other one)."""
    return (of_q, of_p) if direction == "forward" else (of_p, of_q)


def _kl_terms(u: Tensor, w: Tensor, d: Tensor) -> Tensor:
    """u d - u + w elementwise with d = log(u/w): each term >= 0, and 0 where u = 0 = w."""
    series = u * d * d * (0.5 - d / 6 + d * d / 24)
    literal = torch.where(u > 0, u * d, 0.0) - u + w
    return torch.where((d.abs() < SERIES_BELOW) & (u > 0), series, literal)


def _gap(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    kept = torch.isfinite(x) & torch.isfinite(y)  # suppressed tokens take no part
    return torch.where(kept, x - y, 0.0), kept


def _merge_mass(largest: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(max, sum of exp) of whole rows, and the log of each part's share of the mass."""
    merged = largest.amax(-1)
    scaled = total * (largest - merged[:, None]).exp()
    summed = scaled.sum(-1)
    return merged, summed, largest - merged[:, None] + total.log() - summed.log()[:, None]


def _divergence_grad(x: Tensor, p: Tensor, y: Tensor, direction: str, statistics: Tensor) -> Tensor:
    """d D / d x in a new tensor; without the factor 1/T."""
    if direction == "l2":
        gap, kept = _gap(x, y)
        centred = torch.where(kept, gap - statistics[:, REF_A, None], 0.0)
        return centred.mul_(2 / statistics[:, REF_B, None].clamp_min(1))
    max_q, sum_q = statistics[:, REF_A], statistics[:, REF_B]
    if direction == "forward":
        q = (y - max_q[:, None]).exp_().div_(sum_q[:, None])
        return torch.sub(p, q, out=q)
    log_p_mass = statistics[:, MAX_P] + statistics[:, SUM_P].log()
    shift = log_p_mass - (max_q + sum_q.log()) + statistics[:, DIVERGENCE]
    grad = (x - y).sub_(shift[:, None]).mul_(p)
    return grad.masked_fill_(p == 0, 0.0)


def _subtract_at_label(grad: Tensor, labels: Tensor, weights: Tensor) -> None:
    at_label = torch.where(labels >= 0, -weights, 0.0)
    grad.scatter_add_(-1, labels.clamp_min(0)[:, None], at_label[:, None])
