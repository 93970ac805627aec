"""The same functions as Triton kernels: one program per row and range of columns.

Notation of `eager`: x, y = logits of policy and reference, m, s = maximum and sum of exp(. - m).
All exponentials are powers of two, exp(x / T) = 2^(c x) with c = log2(e) / T: one multiply-add and
one instruction each. What a row needs is kept per thread, [N] accumulators of groups of G columns
that lie in one thread; threads meet once, after the last column, so no barrier is in a loop.

The KL of u to w (u = q, w = p for `forward`, u = p, w = q for `reverse`) comes from two sums over
d = log2(u/w) - centre, where the centre is any number near the mean of d:

    KL = E_u[d] ln 2 + log E_u[2^-d],    log E_u[2^-d] = log1p(E_u[2^-d - 1])

Both sums have terms as small as d, so a KL of 1e-7 nats keeps its digits, and both merge by
addition. Offsets of rows are 64-bit, so rows * columns may exceed 2^31. Each element is read once
for the statistics and once for the gradient.
"""

# ruff: noqa: N803  (Triton's convention: constexpr arguments in capitals)
# Arguments and results of kernels have Triton's types, which a checker of Python does not know.
# pyright: reportArgumentType=false, reportOperatorIssue=false

import os

import triton
import triton.language as tl

from safereg_kernels import block as shared
from safereg_kernels.spec import DIRECTIONS

_FLOOR = tl.constexpr(shared.LOGIT_FLOOR)
_LABEL_INVALID = tl.constexpr(shared.LABEL_INVALID)
_NUM_STATISTICS = tl.constexpr(shared.NUM_STATISTICS)
_FORWARD = tl.constexpr(DIRECTIONS.index("forward"))
_REVERSE = tl.constexpr(DIRECTIONS.index("reverse"))
_L2 = tl.constexpr(DIRECTIONS.index("l2"))
_JSD = tl.constexpr(DIRECTIONS.index("jsd"))
_IS_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_INF = tl.constexpr(float("inf"))
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)

# |d| below which 2^-d - 1 is its Taylor polynomial of degree 5, here an eighth of a nat: the next
# term is 7e-7 of what d adds to the KL, and above it the rounding of 2^-d is 3e-5 of that.
_SERIES_BELOW = tl.constexpr(0.125 * 1.4426950408889634)
_T1 = tl.constexpr(-0.6931471805599453)
_T2 = tl.constexpr(0.24022650695910072)
_T3 = tl.constexpr(-0.05550410866482158)
_T4 = tl.constexpr(0.009618129107628477)
_T5 = tl.constexpr(-0.0013333558146428443)
_LARGEST_EXPONENT = tl.constexpr(100.0)  # 2^100 times a sum of as many terms as there are is finite


@triton.jit
def statistics_kernel(
    policy_ptr,  # [rows, columns], any float dtype
    reference_ptr,  # [rows with a KL weight, columns], unread without HAS_REFERENCE
    label_ptr,  # [rows] int64, unread without HAS_LABELS
    kl_weight_ptr,  # [rows] float32
    reference_lse_ptr,  # [rows] float32, unread without HAS_REFERENCE_LSE
    partial_ptr,  # [rows, splits, 9] float32, written
    policy_stride,
    reference_stride,
    num_columns,
    num_readable,  # columns that may be read: whole vectors, where rows have room for them
    columns_per_split,
    inv_temperature,
    policy_scale,
    reference_scale,
    policy_cap,
    reference_cap,
    DIRECTION: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_REFERENCE_LSE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    IS_TEMPERED: tl.constexpr,
    IS_SCALED: tl.constexpr,
    POLICY_CAPPED: tl.constexpr,
    REFERENCE_CAPPED: tl.constexpr,
    IS_DIFFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Statistics of row `program_id(0)` over the columns of split `program_id(1)`."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    first = split * columns_per_split
    end = tl.minimum(first + columns_per_split, num_columns)
    whole_end = first + (end - first) // BLOCK * BLOCK
    policy_row = policy_ptr + row * policy_stride
    reference_row = reference_ptr + row * reference_stride
    has_kl = tl.load(kl_weight_ptr + row) != 0
    c = inv_temperature * _LOG2_E
    unit = c  # of d and of the centre: octaves, or for l2 what its result has
    if DIRECTION == _L2:
        unit = inv_temperature

    N: tl.constexpr = BLOCK // GROUP  # noqa: N806
    zero = tl.zeros([N], tl.float32)
    m_p = tl.full([N], _FLOOR, tl.float32)
    s_p, s_pt, h_p = zero, zero, zero
    m_q = tl.full([N], _FLOOR, tl.float32)
    s_q, sum_d, sum_e = zero, zero, zero
    centre = 0.0
    if has_kl and HAS_REFERENCE:
        if HAS_REFERENCE_LSE:
            m_q = zero + tl.load(reference_lse_ptr + row) / inv_temperature
        columns = first + tl.arange(0, BLOCK)
        x, y, gap = _load_both(
            policy_row, reference_row, columns, end, num_readable, policy_scale, reference_scale,
            policy_cap, reference_cap, IS_SCALED, POLICY_CAPPED, REFERENCE_CAPPED, IS_DIFFERENCE,
            True,
        )  # fmt: skip
        centre = _centre(x, y, gap, unit, DIRECTION)
        for start in range(first, whole_end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x, y, gap = _load_both(
                policy_row, reference_row, columns, end, num_readable, policy_scale,
                reference_scale,
                policy_cap, reference_cap, IS_SCALED, POLICY_CAPPED, REFERENCE_CAPPED,
                IS_DIFFERENCE, False,
            )  # fmt: skip
            m_p, s_p, s_pt, h_p, m_q, s_q, sum_d, sum_e = _add_both(
                x, y, gap, m_p, s_p, s_pt, h_p, m_q, s_q, sum_d, sum_e, c, unit, centre,
                DIRECTION, HAS_LABELS, HAS_ENTROPY, IS_TEMPERED, HAS_REFERENCE_LSE, N, GROUP,
            )  # fmt: skip
        if whole_end < end:
            columns = whole_end + tl.arange(0, BLOCK)
            x, y, gap = _load_both(
                policy_row, reference_row, columns, end, num_readable, policy_scale,
                reference_scale,
                policy_cap, reference_cap, IS_SCALED, POLICY_CAPPED, REFERENCE_CAPPED,
                IS_DIFFERENCE, True,
            )  # fmt: skip
            m_p, s_p, s_pt, h_p, m_q, s_q, sum_d, sum_e = _add_both(
                x, y, gap, m_p, s_p, s_pt, h_p, m_q, s_q, sum_d, sum_e, c, unit, centre,
                DIRECTION, HAS_LABELS, HAS_ENTROPY, IS_TEMPERED, HAS_REFERENCE_LSE, N, GROUP,
            )  # fmt: skip
    elif has_kl or HAS_LABELS:
        for start in range(first, whole_end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = _load(
                policy_row,
                columns,
                end,
                num_readable,
                policy_scale,
                policy_cap,
                IS_SCALED,
                POLICY_CAPPED,
                False,
            )
            m_p, s_p, s_pt, h_p = _add_policy(
                x, m_p, s_p, s_pt, h_p, c, HAS_ENTROPY, IS_TEMPERED, N, GROUP
            )
        if whole_end < end:
            columns = whole_end + tl.arange(0, BLOCK)
            x = _load(
                policy_row, columns, end, num_readable, policy_scale, policy_cap, IS_SCALED,
                POLICY_CAPPED, True,
            )  # fmt: skip
            m_p, s_p, s_pt, h_p = _add_policy(
                x, m_p, s_p, s_pt, h_p, c, HAS_ENTROPY, IS_TEMPERED, N, GROUP
            )

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
            label_logit = _scaled(raw, policy_scale, policy_cap, IS_SCALED, POLICY_CAPPED)

    # The threads meet.
    max_p = tl.max(m_p, 0)
    c_p = c
    if IS_TEMPERED:
        c_p = _LOG2_E
    moved = _product(m_p, c_p) - _product(max_p, c_p)
    sum_p = tl.sum(s_p * _exp2(moved), 0)
    entropy = 0.0
    if HAS_ENTROPY:
        entropy = _entropy(h_p, s_p, moved, sum_p)
    sum_pt = sum_p
    if IS_TEMPERED:
        sum_pt = tl.sum(s_pt * _exp2(_product(m_p, c) - _product(max_p, c)), 0)
    ref_a, ref_b, divergence = _divergence(
        m_p, max_p, sum_pt, m_q, s_q, sum_d, sum_e, c, centre, DIRECTION
    )
    sum_p = _unrounded(sum_p, max_p, c_p)
    sum_pt = _unrounded(sum_pt, max_p, c)
    out = partial_ptr + (row * tl.num_programs(1) + split) * _NUM_STATISTICS
    _store_statistics(
        out, max_p, sum_p, label_logit, sum_pt, ref_a, ref_b, divergence, 0.0, entropy
    )


@triton.jit
def mixture_kernel(
    policy_ptr,  # [rows, columns], any float dtype
    reference_ptr,  # [rows with a KL weight, columns]
    kl_weight_ptr,  # [rows] float32
    statistics_ptr,  # [rows, 9] float32 of whole rows
    partial_ptr,  # [rows, splits, 2] float32, written: these columns' share of JSD and KL(p||m)
    policy_stride,
    reference_stride,
    num_columns,
    num_readable,  # columns that may be read: whole vectors, where rows have room for them
    columns_per_split,
    inv_temperature,
    policy_scale,
    reference_scale,
    policy_cap,
    reference_cap,
    beta,
    IS_SCALED: tl.constexpr,
    POLICY_CAPPED: tl.constexpr,
    REFERENCE_CAPPED: tl.constexpr,
    IS_DIFFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the mixture m = beta q + (1 - beta) p needs a second reading for."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * columns_per_split
    end = tl.minimum(first + columns_per_split, num_columns)
    policy_row = policy_ptr + row * policy_stride
    reference_row = reference_ptr + row * reference_stride
    out = partial_ptr + (row * tl.num_programs(1) + tl.program_id(1)) * 2
    at = statistics_ptr + row * _NUM_STATISTICS
    c = inv_temperature * _LOG2_E
    log_s_p = tl.log2(tl.load(at + 3))
    log_s_q = tl.log2(tl.load(at + 5))
    max_p = tl.load(at)
    max_q = tl.load(at + 4)
    jsd = tl.zeros([BLOCK], tl.float32)
    of_p = tl.zeros([BLOCK], tl.float32)
    if tl.load(kl_weight_ptr + row) != 0:
        for start in range(first, end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x, y, gap = _load_both(
                policy_row, reference_row, columns, end, num_readable, policy_scale,
                reference_scale,
                policy_cap, reference_cap, IS_SCALED, POLICY_CAPPED, REFERENCE_CAPPED,
                IS_DIFFERENCE, True,
            )  # fmt: skip
            # beta (q log(q/m) - q + m) + (1 - beta) (p log(p/m) - p + m): what is not of a
            # logarithm cancels; each term is >= 0.
            p = _exp2((x - max_p) * c - log_s_p)
            q = _exp2((y - max_q) * c - log_s_q)
            apart = beta * (q - p)  # exactly 0 where the two agree, below float32's normals too
            m = p + apart
            d = _within(gap * c - ((max_p - max_q) * c + (log_s_p - log_s_q)))
            log_ratio = _log_to_mixture(d, beta)
            jsd -= m * log_ratio + (beta * _LN_2) * q * d
            of_p += apart - p * log_ratio
    tl.store(out, tl.sum(jsd, 0))
    tl.store(out + 1, tl.sum(of_p, 0))


@triton.jit
def merge_kernel(
    partial_ptr,  # [rows, parts, 9] float32
    merged_ptr,  # [rows, 9] float32, written
    num_parts,
    inv_temperature,
    DIRECTION: tl.constexpr,
):
    """Merges the parts of row `program_id(0)`: the chain rule of KL and entropy, Chan's of l2."""
    row = tl.program_id(0).to(tl.int64)
    max_p = _FLOOR * 1.0
    sum_p, sum_pt, label_logit, entropy = 0.0, 0.0, 0.0, 0.0
    ref_a = _FLOOR * 1.0
    if DIRECTION == _L2:
        ref_a = 0.0
    ref_b, divergence, mixture = 0.0, 0.0, 0.0
    for part in range(0, num_parts):
        at = partial_ptr + (row * num_parts + part) * _NUM_STATISTICS
        m_p = tl.load(at)
        s_p = tl.load(at + 1)
        label_logit += tl.load(at + 2)
        s_pt = tl.load(at + 3)
        a = tl.load(at + 4)
        b = tl.load(at + 5)
        value = tl.load(at + 6)
        mixture += tl.load(at + 7)
        entropy = _merged_entropy(max_p, sum_p, entropy, m_p, s_p, tl.load(at + 8))
        if DIRECTION == _L2:
            count = ref_b + b
            share = b / tl.maximum(count, 1.0)
            apart = a - ref_a
            divergence += value + apart * apart * ref_b * share
            ref_a += apart * share
            ref_b = count
        else:
            divergence = _merged_kl(
                max_p, sum_pt, ref_a, ref_b, divergence, m_p, s_pt, a, b, value, inv_temperature,
                DIRECTION,
            )  # fmt: skip
            ref_a, ref_b = _merged_mass(ref_a, ref_b, a, b, inv_temperature)
        _, sum_pt = _merged_mass(max_p, sum_pt, m_p, s_pt, inv_temperature)
        max_p, sum_p = _merged_mass(max_p, sum_p, m_p, s_p, 1.0)
    out = merged_ptr + row * _NUM_STATISTICS
    _store_statistics(
        out, max_p, sum_p, label_logit, sum_pt, ref_a, ref_b, divergence, mixture, entropy
    )


@triton.jit
def gradient_kernel(
    policy_ptr,  # [rows, columns], any float dtype
    reference_ptr,  # [rows with a KL weight, columns], unread without HAS_REFERENCE
    label_ptr,  # [rows] int64, unread without HAS_LABELS
    ce_weight_ptr,  # [rows] float32, unread without HAS_LABELS
    kl_weight_ptr,  # [rows] float32
    statistics_ptr,  # [rows, 9] float32 of whole rows
    out_ptr,  # [rows, width], written; may be the policy's logits
    policy_stride,
    reference_stride,
    out_stride,
    num_columns,
    num_readable,
    width,
    columns_per_split,
    inv_temperature,
    policy_scale,
    reference_scale,
    policy_cap,
    reference_cap,
    beta,
    z_loss,
    DIRECTION: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    IS_TEMPERED: tl.constexpr,
    IS_SCALED: tl.constexpr,
    POLICY_CAPPED: tl.constexpr,
    REFERENCE_CAPPED: tl.constexpr,
    IS_DIFFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of row `program_id(0)` in the columns of split `program_id(1)`; 0 in padding."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * columns_per_split
    end = tl.minimum(first + columns_per_split, width)
    token_end = tl.minimum(end, num_columns)
    whole_end = first + tl.maximum(token_end - first, 0) // BLOCK * BLOCK
    policy_row = policy_ptr + row * policy_stride
    reference_row = reference_ptr + row * reference_stride
    out_row = out_ptr + row * out_stride
    kl_weight = tl.load(kl_weight_ptr + row)

    at = statistics_ptr + row * _NUM_STATISTICS
    max_p = tl.load(at)
    s_p = tl.load(at + 1)
    c = inv_temperature * _LOG2_E
    # grad = 2^(c x - at_p) (on_p1 + ...) - ...: sums, weights and 1 / T are in the factors.
    at_p1 = _product(max_p, _LOG2_E * 1.0)
    at_p = _product(max_p, c)
    at_q = at_p
    on_p1 = 0.0
    ce_weight = 0.0
    label = -1
    if HAS_LABELS:
        ce_weight = tl.load(ce_weight_ptr + row)
        label = tl.load(label_ptr + row).to(tl.int32)
        if (label == _LABEL_INVALID) & (ce_weight != 0):
            ce_weight = float("nan")
        lse = max_p + tl.log(s_p)
        on_p1 = ce_weight * (1.0 + 2.0 * z_loss * lse) / _rounded(s_p, max_p, _LOG2_E * 1.0)
        on_p1 = tl.where(ce_weight != 0, on_p1, 0.0)
    if kl_weight != 0:
        s_pt = tl.load(at + 3)
        ref_a = tl.load(at + 4)
        ref_b = tl.load(at + 5)
        scaled_weight = kl_weight * inv_temperature
        on_pt = scaled_weight / _rounded(s_pt, max_p, c)
        at_q = _product(ref_a, c)
        on_q = scaled_weight / _rounded(ref_b, ref_a, c)
        shift = 0.0
        if DIRECTION == _REVERSE:
            shift = (
                (max_p - ref_a) * c + (tl.log2(s_pt) - tl.log2(ref_b)) + tl.load(at + 6) * _LOG2_E
            )
            on_pt *= _LN_2
        elif DIRECTION == _L2:
            on_q = 2.0 * scaled_weight / tl.maximum(ref_b, 1.0)
        elif DIRECTION == _JSD:
            shift = (max_p - ref_a) * c + (tl.log2(s_pt) - tl.log2(ref_b))
            on_q = tl.load(at + 7)
            on_pt *= 1.0 - beta
        if not IS_TEMPERED and (DIRECTION == _FORWARD or not HAS_REFERENCE):
            on_pt += on_p1
        for start in range(first, whole_end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            grad, x = _gradient_with_reference(
                policy_row, reference_row, columns, end, num_readable, policy_scale,
                reference_scale, policy_cap,
                reference_cap, inv_temperature, c, at_p1, at_p, on_p1, on_pt, ref_a, at_q, on_q,
                shift,
                beta, DIRECTION, HAS_LABELS, HAS_REFERENCE, IS_TEMPERED, IS_SCALED, POLICY_CAPPED,
                REFERENCE_CAPPED, IS_DIFFERENCE, False,
            )  # fmt: skip
            if HAS_LABELS:
                grad -= tl.where(columns == label, ce_weight, 0.0)
            _store_gradient(
                out_row, columns, None, grad, x, policy_scale, policy_cap, IS_SCALED, POLICY_CAPPED,
                False,
            )  # fmt: skip
        for start in range(whole_end, end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            grad, x = _gradient_with_reference(
                policy_row, reference_row, columns, token_end, num_readable, policy_scale,
                reference_scale, policy_cap, reference_cap, inv_temperature, c, at_p1, at_p, on_p1,
                on_pt, ref_a, at_q, on_q, shift, beta, DIRECTION, HAS_LABELS, HAS_REFERENCE,
                IS_TEMPERED, IS_SCALED, POLICY_CAPPED, REFERENCE_CAPPED, IS_DIFFERENCE, True,
            )  # fmt: skip
            if HAS_LABELS:
                grad -= tl.where(columns == label, ce_weight, 0.0)
            grad = tl.where(columns < token_end, grad, 0.0)
            _store_gradient(
                out_row, columns, columns < end, grad, x, policy_scale, policy_cap, IS_SCALED,
                POLICY_CAPPED, True,
            )  # fmt: skip
    elif ce_weight != 0.0:
        for start in range(first, whole_end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = _load(
                policy_row,
                columns,
                end,
                num_readable,
                policy_scale,
                policy_cap,
                IS_SCALED,
                POLICY_CAPPED,
                False,
            )
            grad = _exp2(x * _LOG2_E - at_p1) * on_p1
            grad -= tl.where(columns == label, ce_weight, 0.0)
            _store_gradient(
                out_row, columns, None, grad, x, policy_scale, policy_cap, IS_SCALED, POLICY_CAPPED,
                False,
            )  # fmt: skip
        for start in range(whole_end, end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = _load(
                policy_row, columns, token_end, num_readable, policy_scale, policy_cap, IS_SCALED,
                POLICY_CAPPED, True,
            )  # fmt: skip
            grad = _exp2(x * _LOG2_E - at_p1) * on_p1
            grad -= tl.where(columns == label, ce_weight, 0.0)
            grad = tl.where(columns < token_end, grad, 0.0)
            _store_gradient(
                out_row, columns, columns < end, grad, x, policy_scale, policy_cap, IS_SCALED,
                POLICY_CAPPED, True,
            )  # fmt: skip
    else:
        for start in range(first, end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            tl.store(out_row + columns, tl.zeros([BLOCK], tl.float32), mask=columns < end)


@triton.jit
def scale_kernel(tensor_ptr, scale_ptr, size, BLOCK: tl.constexpr):
    """tensor *= scale, where the scale is not 1."""
    scale = tl.load(scale_ptr)
    if scale != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        begin = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(begin, size, step):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(tensor_ptr + at, mask=at < size).to(tl.float32)
            tl.store(tensor_ptr + at, value * scale, mask=at < size)


# ---- elements ----------------------------------------------------------------------------------


@triton.jit
def _exp2(x):
    """2^x in one instruction; below 2^-126 it is 0."""
    if _IS_INTERPRETED:
        result = tl.exp2(x)
    else:
        result = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return result


@triton.jit
def _log2(x):
    """log2 x in one instruction, within 2^-22 of it where x is near 1."""
    if _IS_INTERPRETED:
        result = tl.log2(x)
    else:
        result = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return result


@triton.jit
def _product(a, b):
    """a * b rounded, which no compiler may fuse into a sum: both of its users see one number."""
    if _IS_INTERPRETED:
        result = a * b
    else:
        result = tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    return result


@triton.jit
def _unrounded(sum_of_exp, largest, c):
    """A sum of 2^(c x - round(c m)) as one of 2^(c (x - m))."""
    return sum_of_exp / _rounding(largest, c)


@triton.jit
def _rounded(sum_of_exp, largest, c):
    """The inverse of `_unrounded`."""
    return sum_of_exp * _rounding(largest, c)


@triton.jit
def _rounding(largest, c):
    """2^(c m - round(c m)), where c x - round(c m) is one operation that rounds once."""
    if _IS_INTERPRETED:
        factor = 1.0
    else:
        factor = _exp2(tl.fma(largest, c, -_product(largest, c)))
    return factor


@triton.jit
def _scaled(raw, scale, cap, IS_SCALED: tl.constexpr, IS_CAPPED: tl.constexpr):
    if IS_SCALED:
        raw = raw * scale
    if IS_CAPPED:
        shrunk = _exp2(tl.abs(raw) * (-2.0 * _LOG2_E / cap))  # tanh without overflow
        tanh = (1.0 - shrunk) / (1.0 + shrunk)
        raw = tl.where(raw < 0, -cap, cap) * tanh
    return raw


@triton.jit
def _load(
    row_ptr, columns, end, num_readable, scale, cap,
    IS_SCALED: tl.constexpr, IS_CAPPED: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Logits in float32; -inf outside, which is what a token of probability 0 has."""
    if IS_MASKED:
        raw = tl.load(row_ptr + columns, mask=columns < num_readable, other=0.0).to(tl.float32)
    else:
        raw = tl.load(row_ptr + columns).to(tl.float32)
    x = _scaled(raw, scale, cap, IS_SCALED, IS_CAPPED)
    if IS_MASKED:
        x = tl.where(columns < end, x, -_INF)
    return x


@triton.jit
def _load_both(
    policy_row, reference_row, columns, end, num_readable, policy_scale, reference_scale,
    policy_cap, reference_cap, IS_SCALED: tl.constexpr, POLICY_CAPPED: tl.constexpr,
    REFERENCE_CAPPED: tl.constexpr, IS_DIFFERENCE: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """(x, y, x - y); the last keeps the digits of a difference that was given as such."""
    y = _load(
        reference_row, columns, end, num_readable, reference_scale, reference_cap, IS_SCALED,
        REFERENCE_CAPPED, IS_MASKED,
    )  # fmt: skip
    if IS_DIFFERENCE:
        if IS_MASKED:
            is_readable = columns < num_readable
            apart = tl.load(policy_row + columns, mask=is_readable, other=0.0).to(tl.float32)
            raw = tl.load(reference_row + columns, mask=is_readable, other=0.0).to(tl.float32)
        else:
            apart = tl.load(policy_row + columns).to(tl.float32)
            raw = tl.load(reference_row + columns).to(tl.float32)
        x = _scaled(raw + apart, policy_scale, policy_cap, IS_SCALED, POLICY_CAPPED)
        if IS_MASKED:
            x = tl.where(columns < end, x, -_INF)
        if IS_SCALED or POLICY_CAPPED or REFERENCE_CAPPED:
            gap = x - y
        else:
            gap = apart
    else:
        x = _load(
            policy_row, columns, end, num_readable, policy_scale, policy_cap, IS_SCALED,
            POLICY_CAPPED, IS_MASKED,
        )  # fmt: skip
        gap = x - y
    return x, y, gap


# ---- statistics --------------------------------------------------------------------------------


@triton.jit
def _centre(x, y, gap, unit, DIRECTION: tl.constexpr):
    """Mean of d over a block, of tokens that are finite in both; any number would be right."""
    is_kept = (tl.abs(x) < _INF) & (tl.abs(y) < _INF)
    total = tl.sum(tl.where(is_kept, gap, 0.0), 0)
    mean = total / tl.maximum(tl.sum(is_kept.to(tl.float32), 0), 1.0) * unit
    if DIRECTION == _FORWARD:
        mean = -mean
    return mean


@triton.jit
def _add_policy(
    x, m_p, s_p, s_pt, h_p, c,
    HAS_ENTROPY: tl.constexpr, IS_TEMPERED: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The policy's accumulators with one more block."""
    x = tl.reshape(x, [N, GROUP])
    new_p = tl.maximum(m_p, tl.max(x, 1))
    s_p, s_pt, h_p, _ = _add_exponentials(
        x, m_p, new_p, s_p, s_pt, h_p, c, HAS_ENTROPY, IS_TEMPERED
    )
    return new_p, s_p, s_pt, h_p


@triton.jit
def _add_exponentials(
    x, old, new, s_p, s_pt, h_p, c, HAS_ENTROPY: tl.constexpr, IS_TEMPERED: tl.constexpr
):
    """(s_p, s_pt, h_p, 2^(c (x - new))): sums at T = 1 and at T, and of 2^arg arg at T = 1."""
    c_p = c
    if IS_TEMPERED:
        c_p = _LOG2_E
    at = _product(new, c_p)
    moved = _product(old, c_p) - at
    arg = x * c_p - at[:, None]
    e = _exp2(arg)
    rescale = _exp2(moved)
    if HAS_ENTROPY:
        # 0 * -inf where a token is suppressed; 2^-1000 is 0 as well.
        term = tl.sum(e * tl.maximum(arg, -1000.0), 1)
        h_p = rescale * (h_p + s_p * tl.maximum(moved, -1000.0)) + term
    s_p = s_p * rescale + tl.sum(e, 1)
    if IS_TEMPERED:
        at = _product(new, c)
        e = _exp2(x * c - at[:, None])
        s_pt = s_pt * _exp2(_product(old, c) - at) + tl.sum(e, 1)
    return s_p, s_pt, h_p, e


@triton.jit
def _add_both(
    x, y, gap, m_p, s_p, s_pt, h_p, m_q, s_q, sum_d, sum_e, c, unit, centre,
    DIRECTION: tl.constexpr, NEEDS_MASS: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    IS_TEMPERED: tl.constexpr, HAS_REFERENCE_LSE: tl.constexpr,
    N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """All accumulators with one more block of columns."""
    if DIRECTION == _L2:
        if NEEDS_MASS:
            m_p, s_p, s_pt, h_p = _add_policy(
                x, m_p, s_p, s_pt, h_p, c, HAS_ENTROPY, IS_TEMPERED, N, GROUP
            )
        is_kept = (tl.abs(x) < _INF) & (tl.abs(y) < _INF)
        apart = tl.reshape(tl.where(is_kept, gap * unit - centre, 0.0), [N, GROUP])
        s_q += tl.sum(tl.reshape(is_kept.to(tl.float32), [N, GROUP]), 1)
        sum_d += tl.sum(apart, 1)
        sum_e += tl.sum(apart * apart, 1)
    else:
        x = tl.reshape(x, [N, GROUP])
        y = tl.reshape(y, [N, GROUP])
        gap = tl.reshape(gap, [N, GROUP])
        new_p = tl.maximum(m_p, tl.max(x, 1))
        s_p, s_pt, h_p, e_p = _add_exponentials(
            x, m_p, new_p, s_p, s_pt, h_p, c, HAS_ENTROPY, IS_TEMPERED
        )
        new_q = m_q
        rescale_q = 1.0
        at_p = _product(new_p, c)
        at_q = _product(m_q, c)
        if not HAS_REFERENCE_LSE:
            new_q = tl.maximum(m_q, tl.max(y, 1))
            at_q = _product(new_q, c)
            rescale_q = _exp2(_product(m_q, c) - at_q)
        e_q = _exp2(y * c - at_q[:, None])
        s_q = s_q * rescale_q + tl.sum(e_q, 1)
        if DIRECTION == _FORWARD:
            d = -(gap * unit) - centre
            ratio = _exp2(tl.minimum(at_p - at_q + centre, _LARGEST_EXPONENT))
            sum_d, sum_e = _add_kl_terms(e_q, e_p, d, ratio, sum_d, sum_e, rescale_q)
        elif DIRECTION == _REVERSE:
            d = gap * unit - centre
            ratio = _exp2(tl.minimum(at_q - at_p + centre, _LARGEST_EXPONENT))
            rescale_p = _exp2(_product(m_p, c) - at_p)
            sum_d, sum_e = _add_kl_terms(e_p, e_q, d, ratio, sum_d, sum_e, rescale_p)
        m_p = new_p
        m_q = new_q
    return m_p, s_p, s_pt, h_p, m_q, s_q, sum_d, sum_e


@triton.jit
def _add_kl_terms(e_u, e_w, d, ratio, sum_d, sum_e, rescale):
    """Sums of e_u d and of e_u (2^-d - 1) = ratio e_w - e_u."""
    series = d * (_T1 + d * (_T2 + d * (_T3 + d * (_T4 + d * _T5))))
    literal = e_w * ratio[:, None] - e_u
    of_e = tl.where(tl.abs(d) < _SERIES_BELOW, e_u * series, literal)
    of_d = e_u * tl.where(e_u > 0, d, 0.0)  # d is inf or nan where a token is suppressed
    return sum_d * rescale + tl.sum(of_d, 1), sum_e * rescale + tl.sum(of_e, 1)


@triton.jit
def _divergence(m_p, max_p, sum_pt, m_q, s_q, sum_d, sum_e, c, centre, DIRECTION: tl.constexpr):
    """(REF_A, REF_B, DIVERGENCE) from the accumulators of all threads."""
    if DIRECTION == _L2:
        count = tl.sum(s_q, 0)
        apart = tl.sum(sum_d, 0) / tl.maximum(count, 1.0)
        spread = tl.sum(sum_e, 0) - apart * apart * count
        return apart + centre, count, tl.maximum(spread, 0.0)
    max_q = tl.max(m_q, 0)
    at_p = _product(max_p, c)
    at_q = _product(max_q, c)
    share_q = _exp2(_product(m_q, c) - at_q)
    sum_q = tl.sum(s_q * share_q, 0)
    divergence = 0.0
    gap = (at_p - at_q) + (tl.log2(sum_pt) - tl.log2(sum_q))
    if DIRECTION == _FORWARD:
        mean_d = tl.sum(sum_d * share_q, 0) / sum_q
        divergence = _kl(mean_d, tl.sum(sum_e * share_q, 0) / sum_q, centre + gap)
    elif DIRECTION == _REVERSE:
        share_p = _exp2(_product(m_p, c) - at_p)
        mean_d = tl.sum(sum_d * share_p, 0) / sum_pt
        divergence = _kl(mean_d, tl.sum(sum_e * share_p, 0) / sum_pt, centre - gap)
    # Without mass on both sides there is no conditional distribution: the merge sees to it.
    has_both = (sum_pt != 0) & (sum_q != 0)
    return max_q, _unrounded(sum_q, max_q, c), tl.where(has_both, divergence, 0.0)


@triton.jit
def _kl(mean_d, mean_e, gap):
    """E[d] ln 2 + log1p(E[2^-d - 1]); `gap` is log2 E[2^-d] by another way, for large ones."""
    # 2 atanh(t), t = e / (2 + e): the polynomial is exact to float32 for |e| < 1/2.
    t = mean_e / (2.0 + mean_e)
    v = t * t
    small = 2.0 * t * (1.0 + v * (1 / 3 + v * (1 / 5 + v * (1 / 7 + v * (1 / 9)))))
    kl = mean_d * _LN_2 + tl.where(tl.abs(mean_e) < 0.5, small, gap * _LN_2)
    kl = tl.where(mean_d == _INF, mean_d, kl)
    return tl.where(kl < 0, 0.0, kl)  # less than its rounding


@triton.jit
def _entropy(h_p, s_p, moved, sum_p):
    """Entropy in nats: log s - E[arg], from sums of 2^arg arg that each thread has at its own m."""
    total = tl.sum((h_p + s_p * tl.maximum(moved, -1000.0)) * _exp2(moved), 0)
    some = tl.where(sum_p != 0, sum_p, 1.0)
    return (tl.log2(some) - total / some) * _LN_2


@triton.jit
def _log_mass(m, s):
    """m + log2 s; finite where s = 0, since such a side is masked by its user."""
    return m + tl.log2(tl.where(s != 0, s, 1.0))


@triton.jit
def _merged_mass(m_a, s_a, m_b, s_b, inv_temperature):
    m = tl.maximum(m_a, m_b)
    c = inv_temperature * _LOG2_E
    return m, s_a * tl.exp2((m_a - m) * c) + s_b * tl.exp2((m_b - m) * c)


@triton.jit
def _merged_entropy(m_a, s_a, entropy_a, m_b, s_b, entropy_b):
    m, s = _merged_mass(m_a, s_a, m_b, s_b, 1.0)
    some = tl.where(s != 0, s, 1.0)
    share_a = s_a * tl.exp2((m_a - m) * _LOG2_E) / some
    share_b = s_b * tl.exp2((m_b - m) * _LOG2_E) / some
    of_a = share_a * (entropy_a - tl.log(tl.where(share_a > 0, share_a, 1.0)))
    of_b = share_b * (entropy_b - tl.log(tl.where(share_b > 0, share_b, 1.0)))
    return of_a + of_b


@triton.jit
def _merged_kl(
    m_p, s_p, m_q, s_q, part, m_p2, s_p2, m_q2, s_q2, part2, inv_temperature,
    DIRECTION: tl.constexpr,
):  # fmt: skip
    """KL = sum_k U_k KL_k + KL(U || W) of two parts, with U_k, W_k their mass."""
    m, s = _merged_mass(m_p, s_p, m_p2, s_p2, inv_temperature)
    n, t = _merged_mass(m_q, s_q, m_q2, s_q2, inv_temperature)
    c = inv_temperature * _LOG2_E
    first = _weighted_part(m_p, s_p, m_q, s_q, part, m, s, n, t, c, DIRECTION)
    return first + _weighted_part(m_p2, s_p2, m_q2, s_q2, part2, m, s, n, t, c, DIRECTION)


@triton.jit
def _weighted_part(m_p, s_p, m_q, s_q, part, m, s, n, t, c, DIRECTION: tl.constexpr):
    mass_p = s_p * tl.exp2((m_p - m) * c) / tl.where(s != 0, s, 1.0)
    mass_q = s_q * tl.exp2((m_q - n) * c) / tl.where(t != 0, t, 1.0)
    gap = _log_mass(m_p * c, s_p) - _log_mass(m * c, s)
    gap = (gap - (_log_mass(m_q * c, s_q) - _log_mass(n * c, t))) * _LN_2
    gap = tl.where(s_q != 0, gap, _INF)  # p has mass where q has none
    gap = tl.where(s_p != 0, gap, -_INF)
    u, w, d = mass_p, mass_q, gap
    if DIRECTION == _FORWARD:
        u, w, d = mass_q, mass_p, -gap
    # u d - u + w >= 0, and 0 where u = 0 = w.
    d = tl.where(u > 0, d, 1.0)  # inf or nan there; 1 makes it literal, and that w
    series = u * (d * d * (0.5 + d * (d * (1.0 / 24.0) - 1.0 / 6.0)))
    terms = tl.where(tl.abs(d) < 0.06, series, u * (d - 1.0) + w)
    return tl.where(u > 0, u * part, 0.0) + terms


@triton.jit
def _store_statistics(
    out, max_p, sum_p, label_logit, sum_pt, ref_a, ref_b, divergence, mixture, entropy
):
    tl.store(out, max_p)
    tl.store(out + 1, sum_p)
    tl.store(out + 2, label_logit)
    tl.store(out + 3, sum_pt)
    tl.store(out + 4, ref_a)
    tl.store(out + 5, ref_b)
    tl.store(out + 6, divergence)
    tl.store(out + 7, mixture)
    tl.store(out + 8, entropy)


# ---- Jensen-Shannon ----------------------------------------------------------------------------


@triton.jit
def _within(d):
    """d where both models have the token; +-100 where one has not, which is as good as infinite."""
    return tl.minimum(tl.maximum(d, -_LARGEST_EXPONENT), _LARGEST_EXPONENT)


@triton.jit
def _log_to_mixture(d, beta):
    """log(m/p) in nats for m = beta q + (1 - beta) p and d = log2(p/q) within +-100.

    m/p - 1 = beta (2^-d - 1), of which both the power and the logarithm are series for small d.
    """
    e = beta * (d * (_T1 + d * (_T2 + d * (_T3 + d * (_T4 + d * _T5)))))
    series = e * (1.0 - e * (0.5 - e * (1 / 3 - e * (0.25 - e * (0.2 - e * (1 / 6))))))
    literal = _log2(1.0 + beta * (_exp2(-d) - 1.0)) * _LN_2
    return tl.where(tl.abs(d) < _SERIES_BELOW, series, literal)


# ---- gradient ----------------------------------------------------------------------------------


@triton.jit
def _gradient_with_reference(
    policy_row, reference_row, columns, end, num_readable, policy_scale, reference_scale,
    policy_cap,
    reference_cap, inv_temperature, c, at_p1, at_p, on_p1, on_pt, ref_a, at_q, on_q, shift, beta,
    DIRECTION: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_REFERENCE: tl.constexpr,
    IS_TEMPERED: tl.constexpr, IS_SCALED: tl.constexpr, POLICY_CAPPED: tl.constexpr,
    REFERENCE_CAPPED: tl.constexpr, IS_DIFFERENCE: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """(gradient in x without the label's -1, x) of a block of a row with a divergence."""
    if HAS_REFERENCE:
        x, y, gap = _load_both(
            policy_row, reference_row, columns, end, num_readable, policy_scale, reference_scale,
            policy_cap, reference_cap, IS_SCALED, POLICY_CAPPED, REFERENCE_CAPPED, IS_DIFFERENCE,
            IS_MASKED,
        )  # fmt: skip
    else:
        x = _load(
            policy_row, columns, end, num_readable, policy_scale, policy_cap, IS_SCALED,
            POLICY_CAPPED, IS_MASKED,
        )  # fmt: skip
    if not HAS_REFERENCE:
        grad = _exp2(x * c - at_p) * on_pt
    elif DIRECTION == _FORWARD:
        grad = _exp2(x * c - at_p) * on_pt - _exp2(y * c - at_q) * on_q
    elif DIRECTION == _REVERSE:
        e_p = _exp2(x * c - at_p)
        on_p = (gap * c - shift) * on_pt
        if HAS_LABELS and not IS_TEMPERED:
            on_p += on_p1
        grad = tl.where(e_p > 0, e_p * on_p, 0.0)
    elif DIRECTION == _L2:
        is_kept = (tl.abs(x) < _INF) & (tl.abs(y) < _INF)
        grad = tl.where(is_kept, (gap * inv_temperature - ref_a) * on_q, 0.0)
    else:
        e_p = _exp2(x * c - at_p)
        on_p = -(_log_to_mixture(_within(gap * c - shift), beta) + on_q) * on_pt
        if HAS_LABELS and not IS_TEMPERED:
            on_p += on_p1
        grad = tl.where(e_p > 0, e_p * on_p, 0.0)
    if HAS_LABELS and (IS_TEMPERED or (HAS_REFERENCE and DIRECTION == _L2)):
        grad += _exp2(x * _LOG2_E - at_p1) * on_p1
    return grad, x


@triton.jit
def _store_gradient(
    out_row, columns, is_column, grad, x, scale, cap,
    IS_SCALED: tl.constexpr, IS_CAPPED: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """The store, after d x / d raw = scale (1 - (x / cap)^2)."""
    if IS_CAPPED:
        part = x / cap
        grad = tl.where(grad != 0, grad * (1.0 - part * part), grad)  # 0 * -inf in padding
    if IS_SCALED:
        grad = grad * scale
    if IS_MASKED:
        tl.store(out_row + columns, grad, mask=is_column)
    else:
        tl.store(out_row + columns, grad)
