"""What both paths compute on: a block of rows of logits, and the formula to apply to them."""

from dataclasses import dataclass

from torch import Tensor

DIRECTIONS = ("forward", "reverse", "l2")

LOGIT_FLOOR = -1e30
"""Start of a running maximum: finite, since -inf - -inf is NaN; below any logit that counts."""

SERIES_BELOW = 0.06
"""|d| under which d - 1 + exp(-d) is taken as d^2 (1/2 - d/6 + d^2/24): its error there is below
2e-6 of the value, while the literal form has lost four digits."""

LABEL_ELSEWHERE = -1
"""Label of a row whose label lies in another shard of the vocabulary: contributes nothing here."""
LABEL_INVALID = -2
"""Label that is no token id: the row's cross-entropy is NaN, never a plausible number."""

# Statistics of a row, or of some of its columns: float32 [.., NUM_STATISTICS].
MAX_P, SUM_P, LABEL_LOGIT, REF_A, REF_B, DIVERGENCE = range(6)
NUM_STATISTICS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Formula:
    """Which divergence, of which function of the raw logits."""

    direction: str = "forward"
    """`forward`, `reverse` or `l2`."""
    temperature: float = 1.0
    """Divides both logits."""
    policy_softcap: float | None = None
    """Cap c of soft-capped logits, x = c tanh(raw / c); None = none."""
    reference_softcap: float | None = None
    """The same of the reference."""
    is_difference: bool = False
    """True where the policy's raw logits of rows with a divergence are given as their difference
    from the reference's."""
    num_columns: int
    """Columns that are tokens; the rest is padding of the vocabulary, with gradient 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Rows of raw logits. Row r of `reference` belongs to row r of `policy`."""

    policy: Tensor
    """[rows, columns], any float dtype, unit last stride."""
    reference: Tensor | None
    """[at least the last row with a KL weight + 1, columns], or None where no row has one."""
    labels: Tensor | None
    """[rows] int64 column of the label, or LABEL_ELSEWHERE, LABEL_INVALID; None = no
    cross-entropy, and rows of KL weight 0 are not read at all."""
    ce_weights: Tensor | None
    """[rows] float32, None like `labels`."""
    kl_weights: Tensor
    """[rows] float32; the reference is not read where it is 0."""
