"""Rows stacked into micro-batches."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from safereg_dist.models.fingerprint import prompt_key
from safereg_dist.types import MicroBatch, Row


def padded(sequences: Sequence[Sequence[int]], *, width: int, fill: int = 0) -> Tensor:
    """[len(sequences), width] int64: token ids on the left, cut at `width`, `fill` after them."""
    ids = np.full((len(sequences), width), fill, dtype=np.int64)
    for index, sequence in enumerate(sequences):
        ids[index, : min(len(sequence), width)] = sequence[:width]
    return torch.from_numpy(ids)


def collate(rows: Sequence[Row], *, pad_id: int) -> MicroBatch:
    """Rows stacked and right-padded, on the host."""
    width = max(len(row.input_ids) for row in rows)
    input_ids = padded([row.input_ids for row in rows], width=width, fill=pad_id)
    response = padded([[0, *row.loss_mask[1:]] for row in rows], width=width)
    row_of_token, position = response.nonzero(as_tuple=True)
    return MicroBatch(
        input_ids=input_ids,
        # The hidden state at t - 1 predicts token t.
        response_index=row_of_token * width + position - 1,
        labels=input_ids[row_of_token, position],
        row_of_token=row_of_token,
        tokens_of_row=tuple(response.sum(dim=1).tolist()),
        row_begins=tuple(range(0, len(rows) * width, width)),
        rows=tuple(rows),
    )


def pack(rows: Sequence[Row]) -> MicroBatch:
    """Rows in one line, one after another without padding, on the host.

    Positions start again at each row, and so does attention in transformers' models.
    """
    lengths = [len(row.input_ids) for row in rows]
    begins = [0, *np.cumsum(lengths)[:-1].tolist()]
    input_ids = torch.tensor([[t for row in rows for t in row.input_ids]], dtype=torch.int64)
    places = [
        [begin + t for t in range(1, len(row.loss_mask)) if row.loss_mask[t]]
        for begin, row in zip(begins, rows, strict=True)
    ]
    flat = torch.tensor([place for own in places for place in own], dtype=torch.int64)
    owners = [row for row, own in enumerate(places) for _ in own]
    return MicroBatch(
        input_ids=input_ids,
        response_index=flat - 1,
        labels=input_ids[0, flat],
        row_of_token=torch.tensor(owners, dtype=torch.int64),
        tokens_of_row=tuple(map(len, places)),
        row_begins=tuple(begins),
        rows=tuple(rows),
        position_ids=torch.tensor([[t for length in lengths for t in range(length)]]),
    )


def row_of(
    id: str,
    input_ids: Sequence[int],
    loss_mask: Sequence[int],
    *,
    risk: float | None = None,
    is_anchor: bool = False,
) -> Row:
    """A training row of tokens; each stretch of ones in `loss_mask` is a turn of the assistant.

    >>> row_of("a", [1, 7, 8, 9, 2], [0, 0, 0, 1, 1], risk=0.9).prompt_ends
    [3]
    """
    ids, mask = list(input_ids), [int(is_response) for is_response in loss_mask]
    ends = [t for t, is_response in enumerate(mask) if is_response and (t == 0 or not mask[t - 1])]
    return Row(
        id=id,
        input_ids=ids,
        loss_mask=mask,
        prompt_ends=ends,
        risk=risk,
        prompt_key=prompt_key(ids, ends),
        is_anchor=is_anchor,
    )


def filler(pad_id: int) -> Row:
    """A row of one inert token for a rank without rows left; it has no id and is not logged."""
    return Row(id="", input_ids=[pad_id], loss_mask=[0], prompt_ends=[], risk=None, prompt_key="")
