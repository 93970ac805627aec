"""Rows stacked into micro-batches."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safereg_dist.errors import DataError
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
    risk: Any = None,
    is_anchor: bool = False,
) -> Row:
    """A training row of tokens; each stretch of ones in `loss_mask` is a turn of the assistant.

    >>> row_of("a", [1, 7, 8, 9, 2], [0, 0, 0, 1, 1], risk=0.9).prompt_ends
    [3]

    Args:
        risk: in [0, 1], of whatever kind of number; None = not known, nan = its source failed.
    Raises:
        DataError: another risk, or a mask of another length than the tokens.
    """
    ids, mask = list(input_ids), [int(is_response) for is_response in loss_mask]
    if len(ids) != len(mask):
        raise DataError(
            f"row {id!r} has {len(ids)} input_ids and {len(mask)} values of loss_mask: expected "
            "one for each token, 1 where the response is trained on"
        )
    ends = [t for t, is_response in enumerate(mask) if is_response and (t == 0 or not mask[t - 1])]
    return Row(
        id=id,
        input_ids=ids,
        loss_mask=mask,
        prompt_ends=ends,
        risk=_known_risk(id, risk),
        prompt_key=prompt_key(ids, ends),
        is_anchor=is_anchor,
    )


def _known_risk(id: str, risk: Any) -> float | None:
    if risk is None:
        return None
    try:
        value = float(risk)
    except (TypeError, ValueError):
        value = math.inf
    if not (math.isnan(value) or 0 <= value <= 1):
        raise DataError(
            f"row {id!r} has risk {risk!r}: expected a number in [0, 1], divide a percentage by "
            "100, and leave out what is not known"
        )
    return value


def filler(pad_id: int) -> Row:
    """A row of one inert token for a rank without rows left; it has no id and is not logged."""
    return Row(id="", input_ids=[pad_id], loss_mask=[0], prompt_ends=[], risk=None, prompt_key="")
