"""The formulas in eager torch, float32: the CPU path, and what the Triton kernels are held against.

x, y, T, p, q as in `LossSpec`; p and q are softmax(x / T), softmax(y / T), and d = log p - log q.
Divergence of a row, and its gradient in x:

    forward  KL(q||p) = sum_v q (e^d - 1 - d)               (p - q) / T
    reverse  KL(p||q) = sum_v p (e^-d - 1 + d)              p (d - KL) / T
    l2       1/V sum_v (u_v - mean u)^2, u = (x - y) / T    2 (u - mean u) / (V T)
    jsd      -sum_v (beta q d + m L)                        -(1 - beta) p (L + KL(p||m)) / T

with m = beta q + (1 - beta) p, L = log m/p = log1p(beta (e^-d - 1)) and KL(p||m) = -sum_v p L.
Every term of a divergence is >= 0, and an error that all d share (the normalisers' rounding) acts
on the sum in second order only, so that 1e-7 nats keep their digits; sum_v q d would lose them. The
cross-entropy, its z-loss and the entropy are of softmax(x):

    CE + z lse^2 = lse - x_label + z lse^2                  (1 + 2 z lse) softmax(x) - onehot

and the logits' own slope, scale (1 - (x / cap)^2), turns d/dx into the gradient in raw logits.

A row is reduced to its *statistics* (`block`). They merge, so that columns may be spread over
programs or over tensor-parallel ranks, by the chain rules KL = sum_k P_k KL_k + KL(P || Q) and
H = sum_k P_k H_k + H(P), with P_k, Q_k the mass of part k. The gradient needs nothing else of the
row. Only `jsd` takes a second look at the logits, `add_mixture`, since m needs both normalisers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

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

LOGITS_PER_THREAD = 1 << 17
"""Logits that a thread works on at a time: 512 KiB of each of four temporaries, which bounds the
memory. With half as many the hundred calls and joins of threads that a piece costs are felt."""

_LOG_RATIO_LIMIT = 80.0  # the less likely token is then one of e^-80, and float32 holds e^80

Rows = slice | Tensor


def row_statistics(block: Block, spec: LossSpec) -> Tensor:
    """Statistics of every row over this block's columns, float32 [rows, NUM_STATISTICS]."""
    statistics = _nothing_seen(block, spec)
    for piece in _pieces(block, spec, statistics):
        _fill_statistics(piece, spec)
        statistics[piece.rows] = piece.statistics
    return statistics


def add_mixture(block: Block, spec: LossSpec, statistics: Tensor) -> None:
    """Writes these columns' share of the `jsd` of rows with a KL weight, and of their KL(p||m).

    `statistics` are those of whole rows; the shares of shards add up.
    """
    statistics[:, DIVERGENCE] = statistics[:, MIXTURE] = 0.0
    for piece in _pieces(block, spec, statistics):
        _exponentiate(piece, spec)
        _fill_mixture(piece, spec)
        statistics[piece.rows] = piece.statistics


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
    for piece in _pieces(block, spec, statistics):
        _exponentiate(piece, spec)
        _store_gradient(out, piece, spec)


def statistics_and_gradient(out: Tensor, block: Block, spec: LossSpec) -> Tensor:
    """`row_statistics`, `add_mixture` and `write_gradient` of whole rows, with each exp taken once.

    Returns the statistics.
    """
    statistics = _nothing_seen(block, spec)
    _clear_unread(out, block)
    for piece in _pieces(block, spec, statistics):
        _fill_statistics(piece, spec)
        if spec.direction == "jsd":
            _fill_mixture(piece, spec)
        statistics[piece.rows] = piece.statistics
        _store_gradient(out, piece, spec)
    return statistics


def scale_in_place(tensor: Tensor, scale: Tensor) -> None:
    """tensor *= scale, a scalar on its device."""
    tensor.mul_(scale)


# ---- what is worked on at a time ------------------------------------------------------------


class _Labels(NamedTuple):
    """Of some rows, each [rows, 1]."""

    column: Tensor
    """Of the label; 0 where it is not here."""
    is_here: Tensor
    logit_elsewhere: Tensor
    """Its logit where it is not here: 0, or NaN where it is invalid."""
    weight: Tensor
    """Of the cross-entropy; NaN where it is not 0 but the label is invalid."""
    gradient: Tensor
    """What the label's own logit gets: minus the weight; 0 where it is not here."""


@dataclass(slots=True, kw_only=True)
class _Piece:
    """Some of the rows that are read, without padding; those with a KL weight are the *first*."""

    rows: Rows
    """Where they are in the block."""
    num_kl: int
    """How many have a KL weight."""
    x: Tensor
    """[rows, tokens] float32."""
    y: Tensor
    """[first rows, tokens] float32; [0, tokens] where there is no reference."""
    labels: _Labels | None
    kl_weights: Tensor
    """[first rows, 1]."""
    statistics: Tensor
    """[rows, NUM_STATISTICS]."""
    whole: tuple[Tensor, ...]
    """Its columns, views [rows, 1]."""
    first: tuple[Tensor, ...]
    """The same of the first rows."""
    exp_p: Tensor
    """exp(x - max x); here and below nothing until `_exponentiate`, nor where it is not needed."""
    exp_pt: Tensor
    """exp((x - max x) / T) of the first rows; where T is 1, a view of `exp_p`."""
    exp_q: Tensor
    """exp((y - max y) / T)."""


def _pieces(block: Block, spec: LossSpec, statistics: Tensor) -> Iterator[_Piece]:
    """All rows that are to be read: views of the logits where those with a KL weight lie first."""
    if block.num_columns == 0:
        return
    has_kl = block.kl_weights != 0
    num_kl = int(has_kl.sum())
    num_read = num_kl if block.labels is None else len(has_kl)
    order = None if bool(has_kl[:num_kl].all()) else torch.argsort(~has_kl, stable=True)
    labels = _labels_of(block)
    threads = torch.get_num_threads()
    step = max(threads, threads * LOGITS_PER_THREAD // block.num_columns)
    for begin in range(0, num_read, step):
        end = min(begin + step, num_read)
        first_end = max(begin, min(end, num_kl))
        rows, first = slice(begin, end), slice(begin, first_end)
        if order is not None:
            rows, first = order[rows], order[first]
        x, y = _read(block, spec, rows, first)
        own, nothing = statistics[rows], x[:0]
        yield _Piece(
            rows=rows,
            num_kl=first_end - begin,
            x=x,
            y=y,
            labels=None if labels is None else _Labels(*(column[rows] for column in labels)),
            kl_weights=block.kl_weights[first, None],
            statistics=own,
            whole=own.split(1, -1),
            first=own[: first_end - begin].split(1, -1),
            exp_p=nothing,
            exp_pt=nothing,
            exp_q=nothing,
        )


def _labels_of(block: Block) -> _Labels | None:
    if block.labels is None or block.ce_weights is None:
        return None
    labels, weights = block.labels[:, None], block.ce_weights[:, None]
    is_here = (labels >= 0) & (labels < block.num_columns)
    is_invalid = (labels == LABEL_INVALID) | (labels >= block.num_columns)
    elsewhere = torch.where(is_invalid, float("nan"), 0.0)
    return _Labels(
        column=torch.where(is_here, labels, 0),
        is_here=is_here,
        logit_elsewhere=elsewhere,
        weight=torch.where(weights != 0, weights + elsewhere, 0.0),
        gradient=torch.where(is_here, -weights, 0.0),
    )


def _read(block: Block, spec: LossSpec, rows: Rows, first: Rows) -> tuple[Tensor, Tensor]:
    """(x, y) of a piece; x is a view where nothing is to be done to the raw logits."""
    raw = block.policy[:, : block.num_columns][rows].float()
    if block.reference is None:
        return _logits(raw, spec.policy_logit_scale, spec.policy_softcap), raw[:0]
    y = block.reference[:, : block.num_columns][first].float()
    if spec.is_difference:
        raw = torch.cat([raw[: len(y)] + y, raw[len(y) :]])
    return (
        _logits(raw, spec.policy_logit_scale, spec.policy_softcap),
        _logits(y, spec.reference_logit_scale, spec.reference_softcap),
    )


def _logits(raw: Tensor, scale: float, softcap: float | None) -> Tensor:
    scaled = raw if scale == 1.0 else raw * scale
    return scaled if softcap is None else (scaled / softcap).tanh_().mul_(softcap)


def _clear_unread(out: Tensor, block: Block) -> None:
    """0 in padding, and in rows that no piece holds."""
    if block.num_columns < out.shape[1]:
        out[:, block.num_columns :] = 0
    if block.labels is None:
        unread = block.kl_weights == 0
        if bool(unread.any()):
            out[unread] = 0


# ---- statistics -----------------------------------------------------------------------------


def _nothing_seen(block: Block, spec: LossSpec) -> Tensor:
    """The neutral element of `merge_statistics`, for every row."""
    rows, device = len(block.policy), block.policy.device
    statistics = torch.zeros(rows, NUM_STATISTICS, dtype=torch.float32, device=device)
    statistics[:, MAX_P] = LOGIT_FLOOR
    if spec.direction != "l2":
        statistics[:, REF_A] = LOGIT_FLOOR
    return statistics


def _fill_statistics(piece: _Piece, spec: LossSpec) -> None:
    """All but the mixture; leaves the exponentials in the piece."""
    whole, first = piece.whole, piece.first
    has_reference = len(piece.y) > 0
    torch.amax(piece.x, -1, keepdim=True, out=whole[MAX_P]).clamp_min_(LOGIT_FLOOR)
    if has_reference and spec.direction != "l2":
        torch.amax(piece.y, -1, keepdim=True, out=first[REF_A]).clamp_min_(LOGIT_FLOOR)
    _exponentiate(piece, spec)
    _fill_mass(piece, spec)
    if piece.labels is not None:
        label_logit = piece.x.gather(-1, piece.labels.column)
        whole[LABEL_LOGIT].copy_(
            torch.where(piece.labels.is_here, label_logit, piece.labels.logit_elsewhere)
        )
    if spec.has_entropy:
        whole[ENTROPY].copy_(_entropy(piece))
    if has_reference and spec.direction == "l2":
        _fill_l2(piece, spec)
    elif has_reference and spec.direction != "jsd":
        first[DIVERGENCE].copy_(_kl(piece, spec))


def _exponentiate(piece: _Piece, spec: LossSpec) -> None:
    """Sets those exponentials that the formula has, from the maxima."""
    has_p, has_kl = piece.labels is not None or spec.has_entropy, spec.direction != "l2"
    if not has_p and not has_kl:
        return
    below = piece.x - piece.whole[MAX_P]
    if spec.temperature == 1.0:
        piece.exp_p = below.exp_()
        piece.exp_pt = piece.exp_p[: piece.num_kl]
    else:
        if has_kl:
            piece.exp_pt = (below[: piece.num_kl] / spec.temperature).exp_()
        if has_p:
            piece.exp_p = below.exp_()
    if has_kl and len(piece.y) > 0:
        piece.exp_q = _tempered(piece.y - piece.first[REF_A], spec).exp_()


def _tempered(logits: Tensor, spec: LossSpec) -> Tensor:
    return logits if spec.temperature == 1.0 else logits.div_(spec.temperature)


def _fill_mass(piece: _Piece, spec: LossSpec) -> None:
    if len(piece.exp_p) > 0:
        torch.sum(piece.exp_p, -1, keepdim=True, out=piece.whole[SUM_P])
    if spec.temperature == 1.0:
        piece.whole[SUM_PT].copy_(piece.whole[SUM_P])
    elif len(piece.exp_pt) > 0:
        torch.sum(piece.exp_pt, -1, keepdim=True, out=piece.first[SUM_PT])
    if len(piece.exp_q) > 0:
        torch.sum(piece.exp_q, -1, keepdim=True, out=piece.first[REF_B])


def _entropy(piece: _Piece) -> Tensor:
    """log s - sum_v softmax(x) (x - max x), whose terms are not negative; 0 without a token."""
    total = piece.whole[SUM_P]
    below = (piece.x - piece.whole[MAX_P]).clamp_min_(LOGIT_FLOOR)  # 0 * -inf
    entropy = total.log() - below.mul_(piece.exp_p).sum(-1, keepdim=True) / total
    return torch.where(total != 0, entropy, 0.0)


def _fill_l2(piece: _Piece, spec: LossSpec) -> None:
    gap, kept = _gap(piece, spec)
    count = kept.sum(-1, keepdim=True)
    mean = gap.sum(-1, keepdim=True) / count.clamp_min(1)
    centred = gap.sub_(mean).mul_(kept)
    piece.first[REF_A].copy_(mean)
    piece.first[REF_B].copy_(count)
    torch.sum(centred.square_(), -1, keepdim=True, out=piece.first[DIVERGENCE])


def _gap(piece: _Piece, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """(u = (x - y) / T, which tokens take part: not those that a model suppresses)."""
    gap = _tempered(piece.x[: len(piece.y)] - piece.y, spec)
    kept = torch.isfinite(gap)
    return gap.masked_fill_(~kept, 0.0), kept


def _kl(piece: _Piece, spec: LossSpec) -> Tensor:
    """KL [rows, 1] of the distributions conditioned on these columns; 0 where one has no mass."""
    sum_p, sum_q = piece.first[SUM_PT], piece.first[REF_B]
    u, w = _weighting_first(spec, piece.exp_pt, piece.exp_q)
    sum_u, sum_w = _weighting_first(spec, sum_p, sum_q)
    log_ratio = _log_ratio(piece, spec)  # log w/u
    if spec.direction == "reverse":
        log_ratio.neg_()
    terms = torch.expm1(log_ratio).sub_(log_ratio).mul_(u)
    value = terms.sum(-1, keepdim=True).div_(sum_u)
    if not math.isfinite(float(value.sum())):  # a suppressed token, or w/u overflows
        is_wild = ~torch.isfinite(value.squeeze(-1))
        share_u, share_w = u[is_wild] / sum_u[is_wild], w[is_wild] / sum_w[is_wild]
        value[is_wild] = _kl_terms(share_u, share_w, -log_ratio[is_wild]).sum(-1, keepdim=True)
        value = torch.where((sum_p != 0) & (sum_q != 0), value, 0.0)
    return value.clamp_min_(0)  # rounding may bring a value near 0 below it


def _log_ratio(piece: _Piece, spec: LossSpec) -> Tensor:
    """d = log p - log q in a new tensor; NaN for tokens that both models suppress."""
    first = piece.first
    shift = _tempered(first[MAX_P] - first[REF_A], spec) + (first[SUM_PT] / first[REF_B]).log_()
    return _tempered(piece.x[: piece.num_kl] - piece.y, spec).sub_(shift)


def _weighting_first(spec: LossSpec, of_p: Tensor, of_q: Tensor) -> tuple[Tensor, Tensor]:
    """(of the distribution that weights the logarithm, of the other one)."""
    return (of_q, of_p) if spec.direction == "forward" else (of_p, of_q)


def _kl_terms(u: Tensor, w: Tensor, d: Tensor) -> Tensor:
    """u d - u + w elementwise with d = log u/w: each term >= 0, and 0 where u = 0 = w."""
    close = (torch.expm1(-d) + d).clamp_min(0) * u
    literal = torch.where(u > 0, u * d, 0.0) - u + w
    return torch.where((d.abs() < 1) & (u > 0), close, literal)


def _fill_mixture(piece: _Piece, spec: LossSpec) -> None:
    """These columns' share of the divergence and of KL(p||m), from whole rows' normalisers."""
    if len(piece.y) == 0:
        return
    first = piece.first
    p, q = piece.exp_pt / first[SUM_PT], piece.exp_q / first[REF_B]
    ratio, log_mixture = _mixture(piece, spec)
    mixture = p.mul(1 - spec.beta).add_(q, alpha=spec.beta)
    terms = mixture.mul_(log_mixture).add_(ratio.mul_(q), alpha=spec.beta)
    first[DIVERGENCE].copy_(terms.sum(-1, keepdim=True).neg_().clamp_min_(0))
    first[MIXTURE].copy_(p.mul_(log_mixture).sum(-1, keepdim=True).neg_())


def _mixture(piece: _Piece, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """(d, L = log m/p), both finite: where they are clamped one of p, q is 0 to float32."""
    ratio = _log_ratio(piece, spec).nan_to_num_(0.0)
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


def _store_gradient(out: Tensor, piece: _Piece, spec: LossSpec) -> None:
    """Fills the piece's rows of `out`, directly where its layout allows."""
    n = piece.x.shape[1]
    if isinstance(piece.rows, slice) and out.dtype == torch.float32:
        _fill_gradient(out[piece.rows, :n], piece, spec)
    else:
        grad = torch.empty_like(piece.x)
        _fill_gradient(grad, piece, spec)
        out[piece.rows, :n] = grad.to(out.dtype)


def _fill_gradient(out: Tensor, piece: _Piece, spec: LossSpec) -> None:
    """Gradient in the raw logits; `out` may be x. Uses up the exponentials."""
    of_kl, rest = _divergence_factors(piece, spec)
    slope = None  # from x, while it is there
    if spec.policy_softcap is not None:
        slope = (piece.x / spec.policy_softcap).square_().neg_().add_(1)
    _fill_sum(out, piece, spec, of_kl, rest)
    if piece.labels is not None:
        out.scatter_add_(-1, piece.labels.column, piece.labels.gradient)
    if slope is not None:
        out *= slope
    if spec.policy_logit_scale != 1.0:
        out *= spec.policy_logit_scale
    if piece.labels is not None and piece.num_kl < len(out):
        _clear_idle(out[piece.num_kl :], piece.labels.weight[piece.num_kl :])


def _fill_sum(
    out: Tensor, piece: _Piece, spec: LossSpec, of_kl: Tensor | None, rest: Tensor | None
) -> None:
    """out = exp_p * of_ce + exp_pt * of_kl + rest, where the last two have the first rows only."""
    num_kl = piece.num_kl
    terms = [] if rest is None else [rest]
    if piece.labels is not None:
        of_ce = _ce_factor(piece, piece.labels, spec)
        torch.mul(piece.exp_p[num_kl:], of_ce[num_kl:], out=out[num_kl:])
        if of_kl is not None and spec.temperature == 1.0:  # one exponential for both
            of_kl.add_(of_ce[:num_kl])
        else:
            terms.append(piece.exp_p[:num_kl].mul_(of_ce[:num_kl]))
    if of_kl is not None:
        terms.append(piece.exp_pt.mul_(of_kl))
    if len(terms) == 1:
        out[:num_kl] = terms[0]
        return
    torch.add(terms[0], terms[1], out=out[:num_kl])
    for term in terms[2:]:
        out[:num_kl] += term


def _ce_factor(piece: _Piece, labels: _Labels, spec: LossSpec) -> Tensor:
    """[rows, 1]: the gradient of ce_weight (CE + z lse^2) is exp_p times this, but at the label."""
    total = piece.whole[SUM_P]
    factor = labels.weight / total
    if spec.z_loss != 0.0:
        lse = piece.whole[MAX_P] + total.log()
        factor *= lse.mul_(2 * spec.z_loss).add_(1)
    return factor


def _clear_idle(out: Tensor, ce_weights: Tensor) -> None:
    """0 in rows without any weight, whose cross-entropy is only reported: 0 * nan."""
    is_idle = ce_weights == 0
    if bool(is_idle.any()):
        out.masked_fill_(is_idle, 0.0)


def _divergence_factors(piece: _Piece, spec: LossSpec) -> tuple[Tensor | None, Tensor | None]:
    """(of_kl, rest): kl_weight times the gradient of D in x is exp_pt * of_kl + rest."""
    weights, first = piece.kl_weights / spec.temperature, piece.first
    if spec.direction == "l2":
        return None, _l2_gradient(piece, spec).mul_(weights) if len(piece.y) > 0 else None
    of_p = weights / first[SUM_PT]
    if len(piece.y) == 0:  # no row with a KL weight; or a top-k teacher, whose part is the caller's
        return of_p, None
    if spec.direction == "forward":
        return of_p, piece.exp_q.mul_(-weights / first[REF_B])
    return _centred_score(piece, spec).mul_(of_p), None


def _l2_gradient(piece: _Piece, spec: LossSpec) -> Tensor:
    gap, kept = _gap(piece, spec)
    return gap.sub_(piece.first[REF_A]).mul_(kept).mul_(2 / piece.first[REF_B].clamp_min(1))


def _centred_score(piece: _Piece, spec: LossSpec) -> Tensor:
    """The gradient of D in x is p times this, by T; 0 where p is."""
    if spec.direction == "jsd":
        _, log_mixture = _mixture(piece, spec)
        return log_mixture.add_(piece.first[MIXTURE]).mul_(spec.beta - 1)
    score = _log_ratio(piece, spec).sub_(piece.first[DIVERGENCE])
    return score.masked_fill_(piece.exp_pt == 0, 0.0)
