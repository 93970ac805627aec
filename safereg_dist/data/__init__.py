"""Stage 1: rows of a data file, tokenised once, dealt to ranks, stacked into micro-batches."""

from safereg_dist.data.collate import collate, collate_window, split
from safereg_dist.data.sampler import RowOrder, Sampler, steps_for
from safereg_dist.data.tokenized import TokenizedDataset, load_rows, load_tokenizer, tokenize_row

__all__ = [
    "RowOrder",
    "Sampler",
    "TokenizedDataset",
    "collate",
    "collate_window",
    "load_rows",
    "load_tokenizer",
    "split",
    "steps_for",
    "tokenize_row",
]
