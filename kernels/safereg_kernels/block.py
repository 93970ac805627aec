"""What both paths compute on: a block of rows of logits, and the statistics of its rows."""

from dataclasses import dataclass

from torch import Tensor

LOGIT_FLOOR = -1e30
"""Start of a running maximum: finite, since -inf - -inf is NaN; below any logit that counts."""

LABEL_ELSEWHERE = -1
"""Label of a row whose label lies in another shard of the vocabulary: contributes nothing here."""
LABEL_INVALID = -2
"""Label that is no token id: the row's cross-entropy and its gradient are NaN, never plausible."""

# Statistics of a row, or of some of its columns: float32 [.., NUM_STATISTICS]. x, y, T: `LossSpec`.
MAX_P = 0  # max x
SUM_P = 1  # sum exp(x - max x); unspecified in rows without a cross-entropy where T is not 1
LABEL_LOGIT = 2  # x of the label; 0 elsewhere; NaN for LABEL_INVALID
SUM_PT = 3  # sum exp((x - max x) / T); equal to SUM_P where T is 1
REF_A = 4  # max y                     (l2: mean of u = (x - y) / T over tokens finite in both)
REF_B = 5  # sum exp((y - max y) / T)  (l2: number of such tokens)
DIVERGENCE = 6  # KL between the distributions conditioned on these columns
#                 (l2: sum of (u - mean)^2; jsd: 0 until `add_mixture`, then these columns' share)
MIXTURE = 7  # jsd after `add_mixture`: these columns' share of KL(p||m); else 0
ENTROPY = 8  # of softmax(x) (T = 1) conditioned on these columns, where `has_entropy`; else 0
NUM_STATISTICS = 9
SHARES = slice(DIVERGENCE, MIXTURE + 1)
"""What is known of some columns only once the statistics of whole rows are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Rows of raw logits. Row r of `reference` belongs to row r of `policy`."""

    policy: Tensor
    """[rows, columns], any float dtype, unit last stride."""
    reference: Tensor | None
    """[at least the last row with a KL weight + 1, columns], or None where no row has one (or where
    the divergence is a top-k teacher's: then a KL weight is one of p alone)."""
    labels: Tensor | None
    """[rows] int64 column of the label, or LABEL_ELSEWHERE, LABEL_INVALID; None = no
    cross-entropy, and rows of KL weight 0 are not read at all."""
    ce_weights: Tensor | None
    """[rows] float32, None like `labels`."""
    kl_weights: Tensor
    """[rows] float32; the reference is not read where it is 0."""
    reference_lse: Tensor | None = None
    """[rows] float32 log sum exp(y / T) of whole rows where it is known, or None."""
    num_columns: int
    """Columns that are tokens; the rest is padding of the vocabulary, with gradient 0."""
