"""How many rows are worked on at a time, from a bound on memory."""

from typing import NamedTuple

HEAD_BYTES = {"cuda": 3 << 30, "cpu": 8 << 20}
"""Memory for logits and their gradient where the caller gives no bound, by kind of device. On a GPU
it holds the gradient of 8000 rows at a vocabulary of 128256: what dW = grad.T @ hidden needs to be
bound by arithmetic, not by reading and writing dW once for every few rows. On a CPU products are
fast from about a hundred rows on, and logits that fit a cache are cheaper than those that do
not."""
LOGITS_ROWS = 1024
"""Rows of float32 logits at a time on a GPU: 8 tiles of 128, so that a product fills the chip."""
ROW_STEP = 64
COLUMN_STEP = 64
"""Rows of logits start at multiples of so many columns, whatever the vocabulary."""


class ChunkSizes(NamedTuple):
    """Rows at a time."""

    logits_rows: int
    """Rows whose logits exist at once."""
    grad_rows: int
    """Rows whose gradient is collected before the products over it; >= `logits_rows`."""


def padded(columns: int) -> int:
    """Elements from one row of logits to the next."""
    return -(-max(columns, 1) // COLUMN_STEP) * COLUMN_STEP


def chunk_sizes(
    num_rows: int,
    *,
    logits_bytes: int,
    grad_bytes: int,
    is_collected: bool,
    head_bytes: int,
    chunk_tokens: int | None,
) -> ChunkSizes:
    """Sizes for `num_rows` rows within `head_bytes`.

    Args:
        logits_bytes: bytes of one row's logits, of both models.
        grad_bytes: bytes of one row's gradient where it has memory of its own, else 0.
        is_collected: more rows of gradient than of logits serve a purpose (a trained head on a
            GPU, where each product over the gradient reads and writes dW).
        chunk_tokens: rows of gradient, whatever memory they take, or None.
    """
    num_rows = max(num_rows, 1)
    if chunk_tokens is not None:
        logits_rows = min(chunk_tokens, LOGITS_ROWS) if is_collected else chunk_tokens
        return ChunkSizes(min(logits_rows, num_rows), min(chunk_tokens, num_rows))
    both = _whole_steps(head_bytes // max(logits_bytes + grad_bytes, 1))
    if not is_collected or both <= LOGITS_ROWS:
        rows = _even(num_rows, both if grad_bytes == 0 else min(both, LOGITS_ROWS))
        return ChunkSizes(rows, rows)
    grad_rows = _whole_steps((head_bytes - LOGITS_ROWS * logits_bytes) // max(grad_bytes, 1))
    grad_rows = _even(num_rows, grad_rows)
    return ChunkSizes(min(grad_rows, LOGITS_ROWS), grad_rows)


def _whole_steps(rows: int) -> int:
    return max(ROW_STEP, rows // ROW_STEP * ROW_STEP)


def _even(num_rows: int, limit: int) -> int:
    """At most `limit` rows at a time, so that the last pass is not a short one."""
    passes = -(-num_rows // limit)
    rows = -(-num_rows // passes)
    return min(num_rows, limit, -(-rows // ROW_STEP) * ROW_STEP)
