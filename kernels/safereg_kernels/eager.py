"""The formulas in eager torch, float32: the CPU path, and what the Triton kernels are held against.

x, y, T, p, q as in `LossSpec`; p and q are softmax(x / T), softmax(y / T), and d = log p - log q.
Divergence of a row, and its gradient in x:

    forward  KL(q||p) = sum_v q (e^d - 1 - d)               (p - q) / T
    reverse  KL(p||q) = sum_v p (e^-d - 1 + d)              p (d - KL) / T
    l2       1/V sum_v (u_v - mean u)^2, u = (x - y) / T    2 (u - mean u) / (V T)
    jsd      -sum_v (beta q d + m L)                        -(1 - beta) p (L + KL(p||m)) / T

with m = beta q + (1 - beta) p, L = log m/p = log1p(beta (e^-d - 1)) and KL(p||m) = -sum_v p L.
Every term of a divergence is >= 0 and, to first order, insensitive to an error of d, so that one of
1e-7 nats keeps its digits. The cross-entropy, its z-loss and the entropy are of softmax(x):

    CE + z lse^2 = lse - x_label + z lse^2                  (1 + 2 z lse) softmax(x) - onehot

and the logits' own slope, scale (1 - (x / cap)^2), turns d/dx into the gradient in raw logits.

A row is reduced to its *statistics* (`block`). They merge, so that columns may be spread over
programs or over tensor-parallel ranks, by the chain rules KL = sum_k P_k KL_k + KL(P || Q) and
H = sum_k P_k H_k + H(P), with P_k, Q_k the mass of part k. The gradient needs nothing else of the
row. Only `jsd` takes a second look at the logits, `add_mixture`, since m needs both normalisers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from safereg_kernels.block import (
    DIVERGENCE,
    ENTROPY,
    LABEL_INVALID,
    LABEL_LOGIT,
    LOGIT_FLOOR,
    MAX_P,
    MIXTURE,
    NUM_STATISTICS,
    REF_A,
    REF_B,
    SUM_P,
    SUM_PT,
    Block,
)
from safereg_kernels.spec import LossSpec

LOGITS_PER_THREAD = 1 << 16
"""Logits that a thread works on at a time: its share of a temporary is 256 KiB, which bounds the
memory, stays in its cache, and is long enough to pay for starting and joining the threads."""

_LOG_RATIO_LIMIT = 80.0  # the less likely token is then one of e^-80, and float32 holds e^80

Rows = slice | Tensor


def row_statistics(block: Block, spec: LossSpec) -> Tensor:
    """Statistics of every row over this block's columns, float32 [rows, NUM_STATISTICS]."""
    statistics = _nothing_seen(len(block.policy), block.policy, spec)
    for piece in _pieces(block, spec):
        statistics[piece.rows] = _statistics_of(piece, spec)
    return statistics


def add_mixture(block: Block, spec: LossSpec, statistics: Tensor) -> None:
    """Writes these columns' share of the `jsd` of rows with a KL weight, and of their KL(p||m).

    `statistics` are those of whole rows; the shares of shards add up.
    """
    statistics[:, DIVERGENCE] = statistics[:, MIXTURE] = 0.0
    for piece in _pieces(block, spec):
        own = statistics[piece.rows]
        _exponentiate(piece, spec, own)
        _fill_mixture(piece, spec, own)
        statistics[piece.rows] = own


def merge_statistics(partials: Tensor, spec: LossSpec) -> Tensor:
    """Statistics of whole rows [rows, NUM_STATISTICS] from those of parts, [rows, parts, ..]."""
    merged = partials.new_empty(partials.shape[0], NUM_STATISTICS)
    merged[:] = partials.sum(1)  # right for the label's logit and the shares of a mixture
    max_p, sum_p = partials[..., MAX_P], partials[..., SUM_P]
    merged[:, MAX_P], merged[:, SUM_P], log_share = _merge_mass(max_p, sum_p, 1.0)
    share = log_share.exp()
    mixing = torch.where(share > 0, share * (partials[..., ENTROPY] - log_share), 0.0)
    merged[:, ENTROPY] = mixing.sum(-1) if spec.has_entropy else 0.0
    _, merged[:, SUM_PT], log_share_p = _merge_mass(max_p, partials[..., SUM_PT], spec.temperature)
    if spec.direction == "l2":
        _merge_l2(merged, partials)
    else:
        _merge_reference(merged, partials, log_share_p, spec)
    return merged


def write_gradient(out: Tensor, block: Block, spec: LossSpec, statistics: Tensor) -> None:
    """Writes ce_weight grad(CE + z lse^2) + kl_weight grad(D) in the raw policy logits into `out`.

    `out` [rows, columns] may be the policy's own logits; padding columns get exactly 0, and so do
    rows whose weights are both 0. `statistics` are those of whole rows.
    """
    _clear_unread(out, block)
    for piece in _pieces(block, spec):
        own = statistics[piece.rows]
        _exponentiate(piece, spec, own)
        out[piece.rows, : block.num_columns] = _gradient_of(piece, spec, own).to(out.dtype)


def statistics_and_gradient(out: Tensor, block: Block, spec: LossSpec) -> Tensor:
    """`row_statistics`, `add_mixture` and `write_gradient` of whole rows, with each exp taken once.

    Returns the statistics.
    """
    statistics = _nothing_seen(len(block.policy), block.policy, spec)
    _clear_unread(out, block)
    for piece in _pieces(block, spec):
        own = _statistics_of(piece, spec)
        if spec.direction == "jsd":
            _fill_mixture(piece, spec, own)
        statistics[piece.rows] = own
        out[piece.rows, : block.num_columns] = _gradient_of(piece, spec, own).to(out.dtype)
    return statistics


def scale_in_place(tensor: Tensor, scale: Tensor) -> None:
    """tensor *= scale, a scalar on its device."""
    tensor.mul_(scale)


# ---- what is worked on at a time ------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class _Piece:
    """Some of the rows that are read, those with a KL weight first, without padding."""

    rows: Rows
    """Where they are in the block."""
    x: Tensor
    """[rows, tokens] float32."""
    y: Tensor | None
    """[rows with a KL weight, tokens] float32, or None where there is no reference."""
    labels: Tensor | None
    ce_weights: Tensor | None
    kl_weights: Tensor
    """Of the rows that have one: so many are the first rows."""
    exp_p: Tensor | None = None
    """exp(x - max x), where needed. The gradient overwrites all three."""
    exp_pt: Tensor | None = None
    """exp((x - max x) / T) of the first rows; where T is 1, a view of `exp_p`."""
    exp_q: Tensor | None = None
    """exp((y - max y) / T)."""


def _pieces(block: Block, spec: LossSpec) -> Iterator[_Piece]:
    """All rows that are to be read: a view of the logits where those with a KL weight lie first."""
    if block.num_columns == 0:
        return
    has_kl = block.kl_weights != 0
    num_kl = int(has_kl.sum())
    num_read = num_kl if block.labels is None else len(has_kl)
    order = None if bool(has_kl[:num_kl].all()) else torch.argsort(~has_kl, stable=True)
    threads = torch.get_num_threads()
    step = max(threads, threads * LOGITS_PER_THREAD // block.num_columns)
    for begin in range(0, num_read, step):
        end = min(begin + step, num_read)
        rows = slice(begin, end) if order is None else order[begin:end]
        yield _read(block, spec, rows, max(0, min(end, num_kl) - begin))


def _read(block: Block, spec: LossSpec, rows: Rows, num_kl: int) -> _Piece:
    raw, y = block.policy[:, : block.num_columns][rows].float(), None
    if block.reference is not None and num_kl > 0:
        first = (
            rows[:num_kl] if isinstance(rows, Tensor) else slice(rows.start, rows.start + num_kl)
        )
        y = block.reference[:, : block.num_columns][first].float()
        if spec.is_difference:
            raw = torch.cat([raw[:num_kl] + y, raw[num_kl:]])
        y = _logits(y, spec.reference_logit_scale, spec.reference_softcap)
    return _Piece(
        rows=rows,
        x=_logits(raw, spec.policy_logit_scale, spec.policy_softcap),
        y=y,
        labels=None if block.labels is None else block.labels[rows],
        ce_weights=None if block.ce_weights is None else block.ce_weights[rows],
        kl_weights=block.kl_weights[rows][:num_kl],
    )


def _logits(raw: Tensor, scale: float, softcap: float | None) -> Tensor:
    scaled = raw if scale == 1.0 else raw * scale
    return scaled if softcap is None else (scaled / softcap).tanh_().mul_(softcap)


def _clear_unread(out: Tensor, block: Block) -> None:
    """0 in padding, and in rows that no piece holds."""
    out[:, block.num_columns :] = 0
    if block.labels is None:
        unread = block.kl_weights == 0
        if bool(unread.any()):
            out[unread] = 0


# ---- statistics -----------------------------------------------------------------------------


def _nothing_seen(rows: int, like: Tensor, spec: LossSpec) -> Tensor:
    """The neutral element of `merge_statistics`, for every row."""
    statistics = torch.zeros(rows, NUM_STATISTICS, device=like.device)
    statistics[:, MAX_P] = LOGIT_FLOOR
    if spec.direction != "l2":
        statistics[:, REF_A] = LOGIT_FLOOR
    return statistics


def _statistics_of(piece: _Piece, spec: LossSpec) -> Tensor:
    """[rows of the piece, NUM_STATISTICS]; leaves the exponentials in the piece."""
    statistics = _nothing_seen(len(piece.x), piece.x, spec)
    with_kl = statistics[: len(piece.kl_weights)]
    statistics[:, MAX_P] = piece.x.amax(-1).clamp_min_(LOGIT_FLOOR)
    if piece.y is not None and spec.direction != "l2":
        with_kl[:, REF_A] = piece.y.amax(-1).clamp_min_(LOGIT_FLOOR)
    _exponentiate(piece, spec, statistics)
    _fill_mass(piece, spec, statistics)
    if piece.labels is not None:
        statistics[:, LABEL_LOGIT] = _label_logits(piece.x, piece.labels)
    if spec.has_entropy:
        statistics[:, ENTROPY] = _entropy(piece, statistics)
    if piece.y is not None:
        if spec.direction == "l2":
            _fill_l2(piece, spec, with_kl)
        elif spec.direction != "jsd":
            with_kl[:, DIVERGENCE] = _kl(piece, spec, with_kl)
    return statistics


def _exponentiate(piece: _Piece, spec: LossSpec, statistics: Tensor) -> None:
    """Sets those exponentials that the formula has, from the maxima."""
    num_kl, temperature = len(piece.kl_weights), spec.temperature
    has_p = piece.labels is not None or spec.has_entropy
    has_pt = spec.direction != "l2"
    below = piece.x - statistics[:, MAX_P, None] if has_p or has_pt else piece.x
    if temperature == 1.0 and (has_p or has_pt):
        piece.exp_p = below.exp_()
        piece.exp_pt = piece.exp_p[:num_kl]
    else:
        piece.exp_pt = (below[:num_kl] / temperature).exp_() if has_pt else None
        piece.exp_p = below.exp_() if has_p else None
    if piece.y is not None and has_pt:
        below = piece.y - statistics[:num_kl, REF_A, None]
        piece.exp_q = (below if temperature == 1.0 else below.div_(temperature)).exp_()


def _fill_mass(piece: _Piece, spec: LossSpec, statistics: Tensor) -> None:
    with_kl = statistics[: len(piece.kl_weights)]
    if piece.exp_p is not None:
        statistics[:, SUM_P] = piece.exp_p.sum(-1)
    if spec.temperature == 1.0:
        statistics[:, SUM_PT] = statistics[:, SUM_P]
    elif piece.exp_pt is not None:
        with_kl[:, SUM_PT] = piece.exp_pt.sum(-1)
    if piece.exp_q is not None:
        with_kl[:, REF_B] = piece.exp_q.sum(-1)


def _label_logits(x: Tensor, labels: Tensor) -> Tensor:
    is_here = (labels >= 0) & (labels < x.shape[-1])
    here = x.gather(-1, torch.where(is_here, labels, 0)[:, None]).squeeze(-1)
    here = torch.where(is_here, here, 0.0)
    return torch.where(_is_invalid(x, labels), float("nan"), here)


def _is_invalid(x: Tensor, labels: Tensor) -> Tensor:
    return (labels == LABEL_INVALID) | (labels >= x.shape[-1])


def _entropy(piece: _Piece, statistics: Tensor) -> Tensor:
    """log s - sum_v softmax(x) (x - max x): no term is negative."""
    assert piece.exp_p is not None
    largest, total = statistics[:, MAX_P], statistics[:, SUM_P]
    below = (piece.x - largest[:, None]).clamp_min_(LOGIT_FLOOR)  # 0 * -inf
    entropy = total.log() - below.mul_(piece.exp_p).sum(-1) / total
    return torch.where(total != 0, entropy, 0.0)


def _fill_l2(piece: _Piece, spec: LossSpec, statistics: Tensor) -> None:
    gap, kept = _gap(piece, spec)
    count = kept.sum(-1)
    mean = gap.sum(-1) / count.clamp_min(1)
    centred = torch.where(kept, gap - mean[:, None], 0.0)
    statistics[:, REF_A], statistics[:, REF_B] = mean, count.float()
    statistics[:, DIVERGENCE] = (centred * centred).sum(-1)


def _gap(piece: _Piece, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """(u = (x - y) / T, which tokens take part: not those that a model suppresses)."""
    assert piece.y is not None
    x = piece.x[: len(piece.y)]
    kept = torch.isfinite(x) & torch.isfinite(piece.y)
    return torch.where(kept, (x - piece.y).div_(spec.temperature), 0.0), kept


def _kl(piece: _Piece, spec: LossSpec, statistics: Tensor) -> Tensor:
    """KL between the distributions conditioned on these columns; 0 where one has no mass here."""
    assert piece.exp_pt is not None
    assert piece.exp_q is not None
    log_ratio = _log_ratio(piece, spec, statistics)  # log w/u, u the weighting distribution
    if spec.direction == "reverse":
        log_ratio.neg_()
    sum_p, sum_q = statistics[:, SUM_PT], statistics[:, REF_B]
    u, w = _weighting_first(spec, piece.exp_pt, piece.exp_q)
    sum_u, sum_w = _weighting_first(spec, sum_p, sum_q)
    terms = torch.expm1(log_ratio).sub_(log_ratio).mul_(u)
    value = terms.sum(-1).div_(sum_u).clamp_min_(0)  # of two equal rows rounding may make it less
    is_wild = ~torch.isfinite(value)
    if bool(is_wild.any()):  # a suppressed token, or w / u overflows
        shares_u, shares_w = u[is_wild] / sum_u[is_wild, None], w[is_wild] / sum_w[is_wild, None]
        value[is_wild] = _kl_terms(shares_u, shares_w, -log_ratio[is_wild]).sum(-1)
    return torch.where((sum_p != 0) & (sum_q != 0), value, 0.0)


def _log_ratio(piece: _Piece, spec: LossSpec, statistics: Tensor) -> Tensor:
    """d = log p - log q in a new tensor; NaN for tokens that both models suppress."""
    assert piece.y is not None
    ratio = piece.x[: len(piece.y)] - piece.y
    if spec.temperature != 1.0:
        ratio.div_(spec.temperature)
    maxima = (statistics[:, MAX_P] - statistics[:, REF_A]) / spec.temperature
    shift = maxima + (statistics[:, SUM_PT].log() - statistics[:, REF_B].log())
    return ratio.sub_(shift[:, None])


def _weighting_first(spec: LossSpec, of_p: Tensor, of_q: Tensor) -> tuple[Tensor, Tensor]:
    """(of the distribution that weights the logarithm, of the other one)."""
    return (of_q, of_p) if spec.direction == "forward" else (of_p, of_q)


def _kl_terms(u: Tensor, w: Tensor, d: Tensor) -> Tensor:
    """u d - u + w elementwise with d = log u/w: each term >= 0, and 0 where u = 0 = w."""
    close = (torch.expm1(-d) + d).clamp_min(0) * u
    literal = torch.where(u > 0, u * d, 0.0) - u + w
    return torch.where((d.abs() < 1) & (u > 0), close, literal)


def _fill_mixture(piece: _Piece, spec: LossSpec, statistics: Tensor) -> None:
    if piece.y is None:
        return
    with_kl = statistics[: len(piece.y)]
    p, q = _probabilities(piece, with_kl)
    ratio, log_mixture = _mixture(piece, spec, with_kl)
    mixture = p.mul(1 - spec.beta).add_(q, alpha=spec.beta)
    terms = mixture.mul_(log_mixture).add_(ratio.mul_(q), alpha=spec.beta)
    with_kl[:, DIVERGENCE] = terms.sum(-1).neg_().clamp_min_(0)
    with_kl[:, MIXTURE] = p.mul_(log_mixture).sum(-1).neg_()


def _probabilities(piece: _Piece, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q) in new tensors."""
    assert piece.exp_pt is not None
    assert piece.exp_q is not None
    return piece.exp_pt / statistics[:, SUM_PT, None], piece.exp_q / statistics[:, REF_B, None]


def _mixture(piece: _Piece, spec: LossSpec, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """(d, L = log m/p), both finite: where they are clamped one of p, q is 0 to float32."""
    ratio = _log_ratio(piece, spec, statistics).nan_to_num_(0.0)
    ratio.clamp_(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    return ratio, torch.neg(ratio).expm1_().mul_(spec.beta).log1p_()


# ---- merging --------------------------------------------------------------------------------


def _merge_mass(
    largest: Tensor, total: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(max, sum of exp) of whole rows, and the log of each part's share of the mass."""
    merged = largest.amax(-1)
    below = (largest - merged[:, None]) / temperature
    summed = (total * below.exp()).sum(-1)
    return merged, summed, below + total.log() - summed.log()[:, None]


def _merge_l2(merged: Tensor, partials: Tensor) -> None:
    mean, count = partials[..., REF_A], partials[..., REF_B]
    total = count.sum(-1)
    merged_mean = (mean * count).sum(-1) / total.clamp_min(1)
    spread = count * (mean - merged_mean[:, None]) ** 2
    merged[:, REF_A], merged[:, REF_B] = merged_mean, total
    merged[:, DIVERGENCE] = (partials[..., DIVERGENCE] + spread).sum(-1)


def _merge_reference(merged: Tensor, partials: Tensor, log_share_p: Tensor, spec: LossSpec) -> None:
    merged[:, REF_A], merged[:, REF_B], log_share_q = _merge_mass(
        partials[..., REF_A], partials[..., REF_B], spec.temperature
    )
    if spec.direction == "jsd":
        return
    log_u, log_w = _weighting_first(spec, log_share_p, log_share_q)
    u = log_u.exp()
    inside = torch.where(u > 0, u * partials[..., DIVERGENCE], 0.0)
    merged[:, DIVERGENCE] = (inside + _kl_terms(u, log_w.exp(), log_u - log_w)).sum(-1)


# ---- gradient -------------------------------------------------------------------------------


def _gradient_of(piece: _Piece, spec: LossSpec, statistics: Tensor) -> Tensor:
    """Gradient in the raw logits, [rows of the piece, tokens]; uses up the exponentials."""
    with_kl = statistics[: len(piece.kl_weights)]
    of_kl, rest = _divergence_factors(piece, spec, with_kl)
    of_ce = None if piece.labels is None else _ce_factor(piece, spec, statistics)
    grad = _sum_of_terms(piece, spec, of_ce, of_kl, rest)
    if piece.labels is not None:
        _subtract_at_label(grad, piece)
    if spec.policy_softcap is not None:
        grad *= (piece.x / spec.policy_softcap).square_().neg_().add_(1)
    if spec.policy_logit_scale != 1.0:
        grad *= spec.policy_logit_scale
    if piece.labels is not None:
        _clear_idle(grad, piece)
    return grad


def _sum_of_terms(
    piece: _Piece,
    spec: LossSpec,
    of_ce: Tensor | None,
    of_kl: Tensor | None,
    rest: Tensor | None,
) -> Tensor:
    """exp_p * of_ce + exp_pt * of_kl + rest; the last two have the first rows only."""
    num_kl = len(piece.kl_weights)
    if of_ce is None:
        grad = None if of_kl is None else piece.exp_pt.mul_(of_kl)
    elif of_kl is not None and spec.temperature == 1.0:  # exp_pt is the first rows of exp_p
        grad = piece.exp_p
        grad[:num_kl] *= of_kl.add_(of_ce[:num_kl])
        grad[num_kl:] *= of_ce[num_kl:]
    else:
        grad = piece.exp_p.mul_(of_ce)
        if of_kl is not None:
            grad[:num_kl] += piece.exp_pt.mul_(of_kl)
    if grad is None or rest is None:
        return rest if grad is None else grad
    grad[:num_kl] += rest
    return grad


def _ce_factor(piece: _Piece, spec: LossSpec, statistics: Tensor) -> Tensor:
    """[rows, 1]: ce_weight (1 + 2 z lse) / s; 0 where the weight is, NaN for an invalid label."""
    weights, total = piece.ce_weights, statistics[:, SUM_P]
    lse = statistics[:, MAX_P] + total.log()
    factor = weights * (1 + 2 * spec.z_loss * lse) / total
    factor = torch.where(_is_invalid(piece.x, piece.labels), float("nan"), factor)
    return torch.where(weights != 0, factor, 0.0)[:, None]


def _subtract_at_label(grad: Tensor, piece: _Piece) -> None:
    is_here = (piece.labels >= 0) & (piece.labels < grad.shape[-1])
    column = torch.where(is_here, piece.labels, 0)[:, None]
    grad.scatter_add_(-1, column, torch.where(is_here, -piece.ce_weights, 0.0)[:, None])


def _clear_idle(grad: Tensor, piece: _Piece) -> None:
    """0 in rows whose cross-entropy is only reported: 0 * nan."""
    is_idle = piece.ce_weights == 0
    is_idle[: len(piece.kl_weights)] = False
    if bool(is_idle.any()):
        grad[is_idle] = 0


def _divergence_factors(
    piece: _Piece, spec: LossSpec, statistics: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """(of_kl, rest): kl_weight times the gradient of D in x is exp_pt * of_kl + rest."""
    weights = (piece.kl_weights / spec.temperature)[:, None]
    if spec.direction == "l2":
        return None, None if piece.y is None else _l2_gradient(piece, spec, statistics) * weights
    of_p = weights / statistics[:, SUM_PT, None]
    if piece.y is None:  # a top-k teacher's share is the caller's
        return of_p, None
    if spec.direction == "forward":
        return of_p, piece.exp_q.mul_(-weights / statistics[:, REF_B, None])
    return _centred_score(piece, spec, statistics).mul_(of_p), None


def _l2_gradient(piece: _Piece, spec: LossSpec, statistics: Tensor) -> Tensor:
    gap, kept = _gap(piece, spec)
    centred = torch.where(kept, gap - statistics[:, REF_A, None], 0.0)
    return centred.mul_(2 / statistics[:, REF_B, None].clamp_min(1))


def _centred_score(piece: _Piece, spec: LossSpec, statistics: Tensor) -> Tensor:
    """The gradient of D in x is p times this, by T; 0 where p is."""
    if spec.direction == "jsd":
        _, log_mixture = _mixture(piece, spec, statistics)
        return log_mixture.add_(statistics[:, MIXTURE, None]).mul_(spec.beta - 1)
    score = _log_ratio(piece, spec, statistics).sub_(statistics[:, DIVERGENCE, None])
    return score.masked_fill_(piece.exp_pt == 0, 0.0)
