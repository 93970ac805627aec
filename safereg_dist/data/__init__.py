"""The data of a run: rows read, tokenised once, dealt to ranks, stacked into micro-batches.

Names are loaded on first use: what reads files alone (`files`, `indexed`) needs no torch.
"""

from typing import TYPE_CHECKING

from safereg_dist import loader

if TYPE_CHECKING:
    from safereg_dist.data.collation import collate as collate
    from safereg_dist.data.collation import filler as filler
    from safereg_dist.data.collation import pack as pack
    from safereg_dist.data.collation import row_of as row_of
    from safereg_dist.data.sampler import Sampler as Sampler
    from safereg_dist.data.sampler import steps_for as steps_for
    from safereg_dist.data.stacked import RowColumns as RowColumns
    from safereg_dist.data.stacked import batch_of as batch_of
    from safereg_dist.data.streaming import StreamedRows as StreamedRows
    from safereg_dist.data.tokenized import TokenizedDataset as TokenizedDataset
    from safereg_dist.data.tokenized import joined as joined
    from safereg_dist.data.tokenized import load_rows as load_rows
    from safereg_dist.data.tokenized import load_tokenizer as load_tokenizer
    from safereg_dist.data.tokenized import tokenize_row as tokenize_row

_HOMES = {
    "RowColumns": "stacked",
    "Sampler": "sampler",
    "StreamedRows": "streaming",
    "TokenizedDataset": "tokenized",
    "batch_of": "stacked",
    "collate": "collation",
    "filler": "collation",
    "joined": "tokenized",
    "load_rows": "tokenized",
    "load_tokenizer": "tokenized",
    "pack": "collation",
    "row_of": "collation",
    "steps_for": "sampler",
    "tokenize_row": "tokenized",
}

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


__getattr__ = loader(__name__, _HOMES)
