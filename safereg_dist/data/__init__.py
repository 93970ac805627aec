"""The data of a run: rows read, tokenised once, dealt to ranks, stacked into micro-batches."""

from safereg_dist.data.collate import collate, filler, pack, row_of
from safereg_dist.data.sampler import Sampler, steps_for
from safereg_dist.data.stacked import RowColumns, batch_of
from safereg_dist.data.streaming import StreamedRows
from safereg_dist.data.tokenized import (
    TokenizedDataset,
    joined,
    load_rows,
    load_tokenizer,
    tokenize_row,
)

__all__ = [
    "RowColumns",
    "Sampler",
    "StreamedRows",
    "TokenizedDataset",
    "batch_of",
    "collate",
    "filler",
    "joined",
    "load_rows",
    "load_tokenizer",
    "pack",
    "row_of",
    "steps_for",
    "tokenize_row",
]
