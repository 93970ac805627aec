"""Micro-batches in Megatron's form: `tokens`, `labels` and `loss_mask`, already shifted.

The state at position t predicts `labels[t]`, the token after `tokens[t]`, where `loss_mask[t]` is
not 0. A line is one row, or several documents, at whose begins `position_ids` start again at 0.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safereg_dist.data.stacked import RowColumns, Span, facts_of_rows, flat_batch, known_row
from safereg_dist.errors import DataError
from safereg_dist.types import MicroBatch

KEYS = ("tokens", "labels", "loss_mask")


def batch_of_stream(item: Mapping[str, Any]) -> MicroBatch:
    """The micro-batch of one item of Megatron's data iterator, on the host.

    >>> import torch
    >>> item = {"tokens": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[6, 7, 8, 9]]),
    ...         "loss_mask": torch.tensor([[0., 1., 1., 0.]]), "risk": torch.tensor([0.9])}
    >>> batch = batch_of_stream(item)
    >>> [(row.input_ids, row.loss_mask, row.risk) for row in batch.rows]
    [([5, 6, 7, 8], [0, 0, 1, 1], 0.9)]
    >>> batch.response_index.tolist(), batch.labels.tolist()
    ([1, 2], [7, 8])

    Args:
        item: `tokens`, `labels` and `loss_mask` [B, S]; `position_ids` where lines hold several
            documents; `risk` and `is_anchor` of each row, or of each token; `id` of each row.
    Raises:
        DataError: tensors that are missing or do not fit each other; columns that do not fit rows.
    """
    missing = [key for key in KEYS if not isinstance(item.get(key), Tensor)]
    if missing:
        raise DataError(
            f"expected the tensors {', '.join(KEYS)} in an item of the data iterator, got the keys "
            f"{sorted(map(str, item))}: give `read_item`, which maps your items to such"
        )
    tokens, labels, mask = (item[key].detach().cpu().numpy() for key in KEYS)
    if tokens.ndim != 2 or not tokens.shape == labels.shape == mask.shape:
        raise DataError(
            f"expected tokens, labels and loss_mask of one shape [B, S], got {tokens.shape}, "
            f"{labels.shape} and {mask.shape}"
        )
    if not np.isin(mask, (0, 1)).all():
        raise DataError(
            "loss_mask holds other values than 0 and 1: weights of single tokens are the "
            "regulariser's, give the mask alone"
        )
    spans = _spans(tokens, mask, item.get("position_ids"))
    real = np.ones(tokens.shape, bool)
    columns = RowColumns(item.get("risk"), item.get("id"), item.get("is_anchor"))
    rows, places = [], []
    for (line, first, last), fact in zip(spans, facts_of_rows(columns, spans, real), strict=True):
        predicted = np.flatnonzero(mask[line, first:last])
        end = int(predicted[-1]) + 1 if predicted.size else last - first  # no padding after it
        ids = [*tokens[line, first : first + end].tolist(), int(labels[line, first + end - 1])]
        own_mask = [0, *(mask[line, first : first + end] != 0).astype(int).tolist()]
        rows.append(known_row(ids, own_mask, *fact))
        places.append(line * tokens.shape[1] + first + predicted)
    flat = np.concatenate(places) if places else np.empty(0, np.int64)
    return flat_batch(torch.from_numpy(tokens), rows, places, labels.reshape(-1)[flat], spans)


def _spans(tokens: np.ndarray, mask: np.ndarray, position_ids: Any) -> list[Span]:
    """(line, first, last) of every document, without what fills a line of several up."""
    starts = np.zeros(tokens.shape, bool)
    starts[:, 0] = True
    if isinstance(position_ids, Tensor):
        starts |= position_ids.detach().cpu().numpy() == 0
    found = []
    for line, own in enumerate(starts):
        firsts = np.flatnonzero(own).tolist()
        for a, b in zip(firsts, [*firsts[1:], own.size], strict=True):
            # One token again and again that nobody is to predict; a line keeps its first.
            is_fill = not mask[line, a:b].any() and (tokens[line, a:b] == tokens[line, a]).all()
            if a == 0 or not is_fill:
                found.append((line, a, b))
    return found
