"""Rows stacked into micro-batches."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from safereg_dist.data.sampler import RowOrder
from safereg_dist.types import MicroBatch, Row


def collate(rows: Sequence[Row | None], *, pad_id: int, in_first_epoch: bool = True) -> MicroBatch:
    """Rows stacked and right-padded; None (past the end of the data) becomes one inert token."""
    filled = tuple(row if row is not None else _filler(pad_id) for row in rows)
    width = max(len(row.input_ids) for row in filled)
    input_ids = np.full((len(filled), width), pad_id, dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    response = np.zeros_like(input_ids)
    for index, row in enumerate(filled):
        length = len(row.input_ids)
        input_ids[index, :length] = row.input_ids
        attention_mask[index, :length] = 1
        response[index, 1:length] = row.loss_mask[1:]
    row_of_token, position = response.nonzero()
    pairs = [(i, end) for i, row in enumerate(filled) for end in row.prompt_ends]
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        # The hidden state at t - 1 predicts token t.
        response_index=torch.from_numpy(row_of_token * width + position - 1),
        labels=torch.from_numpy(input_ids[row_of_token, position]),
        row_of_token=torch.from_numpy(row_of_token),
        tokens_of_row=tuple(response.sum(axis=1).tolist()),
        prompt_rows=tuple(i for i, _ in pairs),
        prompt_ends=tuple(end for _, end in pairs),
        rows=filled,
        pad_id=pad_id,
        in_first_epoch=in_first_epoch,
    )


def _filler(pad_id: int) -> Row:
    return Row(id="", input_ids=[pad_id], loss_mask=[0], prompt_ends=[], risk=None, content_key="")


def collate_window(stream: RowOrder, *, start: int, count: int, pad_id: int) -> MicroBatch:
    """The `count` rows from stream position `start`: a rank's share of one optimizer step."""
    rows = [stream.row(position) for position in range(start, start + count)]
    return collate(rows, pad_id=pad_id, in_first_epoch=stream.in_first_epoch(start))


def split(window: MicroBatch, order: Sequence[int], size: int) -> Iterator[MicroBatch]:
    """The rows of a window in this order, as micro-batches of `size` rows on its device."""
    if size == len(order) and list(order) == list(range(size)):
        yield window
        return
    for begin in range(0, len(order), size):
        rows = [window.rows[place] for place in order[begin : begin + size]]
        batch = collate(rows, pad_id=window.pad_id, in_first_epoch=window.in_first_epoch)
        yield batch.to(window.input_ids.device)
