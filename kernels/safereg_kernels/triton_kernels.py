"""The same three functions as Triton kernels: one program per row and range of columns.

Notation of `eager`: x, y = logits of policy and reference, m, s = maximum and sum of exp(. - m),
l = m + log s. `d` is the log ratio of the weighting distribution to the other one: log q/p for
`forward`, log p/q for `reverse`. Offsets of rows are 64-bit, so rows * columns may exceed 2^31.
Each element is read once for the statistics and once for the gradient.
"""

# ruff: noqa: N803  (Triton's convention: constexpr arguments in capitals)

import triton
import triton.language as tl

from safereg_kernels import block as shared

_FLOOR = tl.constexpr(shared.LOGIT_FLOOR)
_SERIES_BELOW = tl.constexpr(shared.SERIES_BELOW)
_LABEL_INVALID = tl.constexpr(shared.LABEL_INVALID)
_NUM_STATISTICS = tl.constexpr(shared.NUM_STATISTICS)
FORWARD = tl.constexpr(shared.DIRECTIONS.index("forward"))
L2 = tl.constexpr(shared.DIRECTIONS.index("l2"))
_INF = tl.constexpr(float("inf"))


@triton.jit
def statistics_kernel(
    policy_ptr,  # [rows, columns], any float dtype
    reference_ptr,  # [rows with a KL weight, columns]
    label_ptr,  # [rows] int64, unread without HAS_LABELS
    kl_weight_ptr,  # [rows] float32
    partial_ptr,  # [rows, splits, 6] float32, written
    policy_stride,
    reference_stride,
    num_columns,
    columns_per_split,
    inv_temperature,
    policy_cap,
    reference_cap,
    DIRECTION: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    POLICY_CAPPED: tl.constexpr,
    REFERENCE_CAPPED: tl.constexpr,
    IS_DIFFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics of row `program_id(0)` over the columns of split `program_id(1)`."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    first = split * columns_per_split
    end = tl.minimum(first + columns_per_split, num_columns)
    policy_row = policy_ptr + row * policy_stride
    reference_row = reference_ptr + row * reference_stride
    has_kl = tl.load(kl_weight_ptr + row) != 0

    m_p, s_p, m_q, s_q, divergence = _nothing_seen(DIRECTION)
    if has_kl:
        for start in range(first, end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x, y = _load_both(
                policy_row,
                reference_row,
                columns,
                columns < end,
                inv_temperature,
                policy_cap,
                reference_cap,
                POLICY_CAPPED,
                REFERENCE_CAPPED,
                IS_DIFFERENCE,
            )
            b_m_p, b_s_p, b_m_q, b_s_q, b_divergence = _of_block(x, y, DIRECTION, HAS_LABELS)
            m_p, s_p, m_q, s_q, divergence = _merged(
                m_p, s_p, m_q, s_q, divergence, b_m_p, b_s_p, b_m_q, b_s_q, b_divergence, DIRECTION
            )
    elif HAS_LABELS:
        for start in range(first, end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = _load(
                policy_row, columns, columns < end, inv_temperature, policy_cap, POLICY_CAPPED
            )
            b_m_p, b_s_p, _ = _max_and_sum(x)
            m_p, s_p = _merged_mass(m_p, s_p, b_m_p, b_s_p)

    label_logit = 0.0
    if HAS_LABELS:
        label = tl.load(label_ptr + row)
        if label == _LABEL_INVALID:
            label_logit = float("nan")
        if (label >= first) & (label < end):
            raw = tl.load(policy_row + label).to(tl.float32)
            if IS_DIFFERENCE:
                if has_kl:
                    raw += tl.load(reference_row + label).to(tl.float32)
            label_logit = _scaled(raw, inv_temperature, policy_cap, POLICY_CAPPED)

    out = partial_ptr + (row * tl.num_programs(1) + split) * _NUM_STATISTICS
    _store_statistics(out, m_p, s_p, label_logit, m_q, s_q, divergence)


@triton.jit
def merge_kernel(
    partial_ptr,  # [rows, parts, 6] float32
    merged_ptr,  # [rows, 6] float32, written
    num_parts,
    DIRECTION: tl.constexpr,
):
    """Merges the parts of row `program_id(0)`."""
    row = tl.program_id(0).to(tl.int64)
    m_p, s_p, m_q, s_q, divergence = _nothing_seen(DIRECTION)
    label_logit = 0.0
    for part in range(0, num_parts):
        at = partial_ptr + (row * num_parts + part) * _NUM_STATISTICS
        label_logit += tl.load(at + 2)
        m_p, s_p, m_q, s_q, divergence = _merged(
            m_p,
            s_p,
            m_q,
            s_q,
            divergence,
            tl.load(at),
            tl.load(at + 1),
            tl.load(at + 3),
            tl.load(at + 4),
            tl.load(at + 5),
            DIRECTION,
        )
    out = merged_ptr + row * _NUM_STATISTICS
    _store_statistics(out, m_p, s_p, label_logit, m_q, s_q, divergence)


@triton.jit
def gradient_kernel(
    policy_ptr,  # [rows, columns], any float dtype
    reference_ptr,  # [rows with a KL weight, columns]
    label_ptr,  # [rows] int64, unread without HAS_LABELS
    ce_weight_ptr,  # [rows] float32, unread without HAS_LABELS
    kl_weight_ptr,  # [rows] float32
    statistics_ptr,  # [rows, 6] float32 of whole rows
    out_ptr,  # [rows, width], written; may be the policy's logits
    policy_stride,
    reference_stride,
    out_stride,
    num_columns,
    width,
    columns_per_split,
    inv_temperature,
    policy_cap,
    reference_cap,
    DIRECTION: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    POLICY_CAPPED: tl.constexpr,
    REFERENCE_CAPPED: tl.constexpr,
    IS_DIFFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of row `program_id(0)` in the columns of split `program_id(1)`; 0 in padding."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * columns_per_split
    end = tl.minimum(first + columns_per_split, width)
    policy_row = policy_ptr + row * policy_stride
    reference_row = reference_ptr + row * reference_stride
    out_row = out_ptr + row * out_stride
    kl_weight = tl.load(kl_weight_ptr + row)
    ce_weight = 0.0
    label = -1
    if HAS_LABELS:
        ce_weight = tl.load(ce_weight_ptr + row)
        label = tl.load(label_ptr + row).to(tl.int32)

    at = statistics_ptr + row * _NUM_STATISTICS
    m_p = tl.load(at)
    s_p = tl.load(at + 1)
    ref_a = tl.load(at + 3)
    ref_b = tl.load(at + 4)
    divergence = tl.load(at + 5)
    inv_s_p = 1.0 / s_p
    if kl_weight != 0:
        inv_ref_b = 1.0 / ref_b
        shift = 0.0
        if DIRECTION != FORWARD and DIRECTION != L2:
            shift = m_p - ref_a + tl.log(s_p) - tl.log(ref_b) + divergence
        scaled_weight = kl_weight * inv_temperature
        for start in range(first, end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x, y = _load_both(
                policy_row,
                reference_row,
                columns,
                columns < num_columns,
                inv_temperature,
                policy_cap,
                reference_cap,
                POLICY_CAPPED,
                REFERENCE_CAPPED,
                IS_DIFFERENCE,
            )
            if DIRECTION == L2:
                is_kept = (tl.abs(x) < _INF) & (tl.abs(y) < _INF)
                grad = tl.where(is_kept, 2 * (x - y - ref_a) * inv_ref_b, 0.0) * scaled_weight
            else:
                p = tl.exp(x - m_p) * inv_s_p
                if DIRECTION == FORWARD:
                    grad = (p - tl.exp(y - ref_a) * inv_ref_b) * scaled_weight
                else:
                    grad = tl.where(p > 0, p * (x - y - shift), 0.0) * scaled_weight
            if HAS_LABELS:
                p = tl.exp(x - m_p) * inv_s_p
                grad += p * ce_weight - tl.where(columns == label, ce_weight, 0.0)
            _store_gradient(
                out_row, columns, end, grad, x, inv_temperature, policy_cap, POLICY_CAPPED
            )
    else:
        for start in range(first, end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            if HAS_LABELS:
                x = _load(
                    policy_row,
                    columns,
                    columns < num_columns,
                    inv_temperature,
                    policy_cap,
                    POLICY_CAPPED,
                )
                p = tl.exp(x - m_p) * inv_s_p
                grad = p * ce_weight - tl.where(columns == label, ce_weight, 0.0)
                _store_gradient(
                    out_row, columns, end, grad, x, inv_temperature, policy_cap, POLICY_CAPPED
                )
            else:
                tl.store(out_row + columns, tl.zeros([BLOCK], tl.float32), mask=columns < end)


@triton.jit
def _nothing_seen(DIRECTION: tl.constexpr):
    """The neutral element of `_merged`."""
    m_p = _FLOOR * 1.0
    m_q = _FLOOR * 1.0
    if DIRECTION == L2:
        m_q = 0.0
    return m_p, 0.0, m_q, 0.0, 0.0


@triton.jit
def _scaled(raw, inv_temperature, cap, IS_CAPPED: tl.constexpr):
    if IS_CAPPED:
        shrunk = tl.exp(-2.0 * tl.abs(raw) / cap)  # tanh without overflow
        tanh = (1.0 - shrunk) / (1.0 + shrunk)
        raw = tl.where(raw < 0, -cap, cap) * tanh
    return raw * inv_temperature


@triton.jit
def _load(row_ptr, columns, is_column, inv_temperature, cap, IS_CAPPED: tl.constexpr):
    """Logits in float32; -inf outside, which is what a token of probability 0 has."""
    raw = tl.load(row_ptr + columns, mask=is_column, other=-_INF).to(tl.float32)
    scaled = _scaled(raw, inv_temperature, cap, IS_CAPPED)
    if IS_CAPPED:
        scaled = tl.where(is_column, scaled, -_INF)
    return scaled


@triton.jit
def _load_both(
    policy_row,
    reference_row,
    columns,
    is_column,
    inv_temperature,
    policy_cap,
    reference_cap,
    POLICY_CAPPED: tl.constexpr,
    REFERENCE_CAPPED: tl.constexpr,
    IS_DIFFERENCE: tl.constexpr,
):
    y = _load(reference_row, columns, is_column, inv_temperature, reference_cap, REFERENCE_CAPPED)
    if IS_DIFFERENCE:
        raw = tl.load(policy_row + columns, mask=is_column, other=0.0).to(tl.float32)
        raw += tl.load(reference_row + columns, mask=is_column, other=0.0).to(tl.float32)
        x = tl.where(is_column, _scaled(raw, inv_temperature, policy_cap, POLICY_CAPPED), -_INF)
    else:
        x = _load(policy_row, columns, is_column, inv_temperature, policy_cap, POLICY_CAPPED)
    return x, y


@triton.jit
def _max_and_sum(x):
    """(max, sum of exp(x - max), exp(x - max)) of a block."""
    largest = tl.maximum(tl.max(x, 0), _FLOOR)
    scaled = tl.exp(x - largest)
    return largest, tl.sum(scaled, 0), scaled


@triton.jit
def _of_block(x, y, DIRECTION: tl.constexpr, NEEDS_MASS: tl.constexpr):
    """Statistics of one block of columns, its divergence between the conditional distributions."""
    if DIRECTION == L2:
        m_p = _FLOOR * 1.0
        s_p = 0.0
        if NEEDS_MASS:
            m_p, s_p, _ = _max_and_sum(x)
        is_kept = (tl.abs(x) < _INF) & (tl.abs(y) < _INF)
        gap = tl.where(is_kept, x - y, 0.0)
        count = tl.sum(is_kept.to(tl.float32), 0)
        mean = tl.sum(gap, 0) / tl.maximum(count, 1.0)
        centred = tl.where(is_kept, gap - mean, 0.0)
        return m_p, s_p, mean, count, tl.sum(centred * centred, 0)
    m_p, s_p, e_p = _max_and_sum(x)
    m_q, s_q, e_q = _max_and_sum(y)
    has_both = (s_p != 0) & (s_q != 0)
    some_s_p = tl.where(s_p != 0, s_p, 1.0)
    some_s_q = tl.where(s_q != 0, s_q, 1.0)
    shift = _log_mass(m_p, s_p) - _log_mass(m_q, s_q)
    # Not normalised: sum u (d - 1) + w = 1/s_u sum e_u (d - 1) + e_w s_u/s_w.
    if DIRECTION == FORWARD:
        terms = _kl_terms(e_q, e_p * (some_s_q / some_s_p), (y - x) + shift)
        divergence = tl.sum(terms, 0) / some_s_q
    else:
        terms = _kl_terms(e_p, e_q * (some_s_p / some_s_q), (x - y) - shift)
        divergence = tl.sum(terms, 0) / some_s_p
    return m_p, s_p, m_q, s_q, tl.where(has_both, divergence, 0.0)


@triton.jit
def _kl_terms(u, w, d):
    """u d - u + w with d = log(u/w): each term >= 0, and 0 where u = 0 = w."""
    d = tl.where(u > 0, d, 1.0)  # inf or nan there; 1 makes it literal, and that w
    series = u * (d * d * (0.5 + d * (d * (1.0 / 24.0) - 1.0 / 6.0)))
    literal = u * (d - 1.0) + w
    return tl.where(tl.abs(d) < _SERIES_BELOW, series, literal)


@triton.jit
def _log_mass(m, s):
    """m + log s; finite where s = 0, since such a side is masked by its user."""
    return m + tl.log(tl.where(s != 0, s, 1.0))


@triton.jit
def _merged_mass(m_a, s_a, m_b, s_b):
    m = tl.maximum(m_a, m_b)
    return m, s_a * tl.exp(m_a - m) + s_b * tl.exp(m_b - m)


@triton.jit
def _merged(
    m_p, s_p, ref_a, ref_b, part, m_p2, s_p2, ref_a2, ref_b2, part2, DIRECTION: tl.constexpr
):
    """Statistics of two disjoint sets of columns together (chain rule; Chan's rule for l2)."""
    m, s = _merged_mass(m_p, s_p, m_p2, s_p2)
    if DIRECTION == L2:
        count = ref_b + ref_b2
        share = ref_b2 / tl.maximum(count, 1.0)
        apart = ref_a2 - ref_a
        mean = ref_a + apart * share
        return m, s, mean, count, part + part2 + apart * apart * ref_b * share
    n, t = _merged_mass(ref_a, ref_b, ref_a2, ref_b2)
    divergence = _weighted_part(m_p, s_p, ref_a, ref_b, part, m, s, n, t, DIRECTION)
    divergence += _weighted_part(m_p2, s_p2, ref_a2, ref_b2, part2, m, s, n, t, DIRECTION)
    return m, s, n, t, divergence


@triton.jit
def _weighted_part(m_p, s_p, m_q, s_q, part, m, s, n, t, DIRECTION: tl.constexpr):
    """One part's share of KL = sum_k U_k KL_k + KL(U || W), with U_k, W_k its mass."""
    mass_p = s_p * tl.exp(m_p - m) / tl.where(s != 0, s, 1.0)
    mass_q = s_q * tl.exp(m_q - n) / tl.where(t != 0, t, 1.0)
    gap = (_log_mass(m_p, s_p) - _log_mass(m, s)) - (_log_mass(m_q, s_q) - _log_mass(n, t))
    gap = tl.where(s_q != 0, gap, _INF)  # p has mass where q has none
    gap = tl.where(s_p != 0, gap, -_INF)
    if DIRECTION == FORWARD:
        u = mass_q
        terms = _kl_terms(mass_q, mass_p, -gap)
    else:
        u = mass_p
        terms = _kl_terms(mass_p, mass_q, gap)
    return tl.where(u > 0, u * part, 0.0) + terms


@triton.jit
def _store_statistics(out, m_p, s_p, label_logit, ref_a, ref_b, divergence):
    tl.store(out, m_p)
    tl.store(out + 1, s_p)
    tl.store(out + 2, label_logit)
    tl.store(out + 3, ref_a)
    tl.store(out + 4, ref_b)
    tl.store(out + 5, divergence)


@triton.jit
def _store_gradient(out_row, columns, end, grad, x, inv_temperature, cap, IS_CAPPED: tl.constexpr):
    """The store, after the soft cap's derivative d(c tanh(raw / c)) / d raw = 1 - (x / c)^2."""
    if IS_CAPPED:
        part = x / (inv_temperature * cap)
        grad = tl.where(grad != 0, grad * (1.0 - part * part), grad)  # 0 * -inf in padding
    tl.store(out_row + columns, grad, mask=columns < end)
