"""Stage 1: rows of a data file, tokenised once, dealt to ranks, stacked into micro-batches."""

from safereg_dist.batch.collate import collate, collate_window, split
from safereg_dist.batch.order import RowOrder, RowStream, steps_for
from safereg_dist.batch.rows import RowStore, load_rows, load_tokenizer, tokenize_row

__all__ = [
    "RowOrder",
    "RowStore",
    "RowStream",
    "collate",
    "collate_window",
    "load_rows",
    "load_tokenizer",
    "split",
    "steps_for",
    "tokenize_row",
]
