"""Micro-batches that a training stack has formed: their rows, found again.

Stacks hand their models `input_ids` and `labels` of [B, S], padded on either side, or packed: rows
one after the other, where position ids start again at 0. Labels are aligned with the tokens, -100
where nothing is predicted; the model shifts them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from safereg_dist.data.collation import row_of
from safereg_dist.errors import DataError
from safereg_dist.models.fingerprint import row_key
from safereg_dist.types import NAMED_BY_CONTENT, MicroBatch, Row

IGNORED = -100
"""The label of a token that is not predicted."""


class RowColumns(NamedTuple):
    """What a stack's data says of the rows of a micro-batch besides their tokens; None: nothing."""

    risk: Sequence[Any] | Tensor | None = None
    """Risk in [0, 1] of each row; of packed rows a value for each token, in lists or [B, S]."""
    ids: Sequence[str | None] | None = None
    """Names of the rows in the ledger; by default they are named after their content."""
    is_anchor: Sequence[bool] | Tensor | None = None
    """True on rows that carry only the divergence."""


NO_COLUMNS = RowColumns()
Span = tuple[int, int, int]
"""(line, first, last): a row's tokens lie in line at first .. last - 1."""


def batch_of(inputs: Mapping[str, Any], columns: RowColumns = NO_COLUMNS) -> MicroBatch:
    """The micro-batch that a stack's collator has made of rows, which are found in it.

    >>> import torch
    >>> batch = batch_of({"input_ids": torch.tensor([[5, 6, 7, 8, 9]]),
    ...                   "labels": torch.tensor([[-100, 6, 7, -100, 9]]),
    ...                   "position_ids": torch.tensor([[0, 1, 2, 0, 1]])},
    ...                  RowColumns(risk=[0.1, 0.9]))
    >>> [(row.input_ids, row.risk) for row in batch.rows], batch.response_index.tolist()
    ([([5, 6, 7], 0.1), ([8, 9], 0.9)], [0, 1, 3])

    The tensors of the result lie where those of `inputs` do. Tensors on a GPU are fetched: call it
    where the batch is collated, on the host. Collectives: none.

    Args:
        inputs: `input_ids` and `labels` [B, S]; `attention_mask` [B, S], not 0 on real tokens
            (None: all are real); `position_ids` [B, S] where rows are packed.
    Raises:
        DataError: tensors that do not fit each other, or columns that do not fit the rows.
    """
    ids, labels = _host(inputs, "input_ids"), _host(inputs, "labels")
    mask = inputs.get("attention_mask")
    if ids.ndim != 2 or any(t is not None and t.shape != ids.shape for t in (labels, mask)):
        raise DataError(
            f"expected input_ids, labels and attention_mask of one shape [B, S], got input_ids "
            f"{ids.shape}, labels {labels.shape}"
            + ("" if mask is None else f", attention_mask {tuple(mask.shape)}")
            + ": leave out a mask of other dimensions, and give labels as transformers does"
        )
    real = np.ones(ids.shape, bool) if mask is None else _host(inputs, "attention_mask") != 0
    spans = _spans(ids, labels, real, inputs.get("position_ids"))
    masks = [labels[line, first:last] != IGNORED for line, first, last in spans]
    facts = facts_of_rows(columns, spans, real)
    rows = [
        known_row(ids[line, first:last].tolist(), mask.tolist(), *fact)
        for (line, first, last), mask, fact in zip(spans, masks, facts, strict=True)
    ]
    width = ids.shape[1]
    # A row's first token is predicted by nothing; the state at t - 1 predicts token t.
    places = [
        line * width + first + 1 + np.flatnonzero(mask[1:])
        for (line, first, _), mask in zip(spans, masks, strict=True)
    ]
    flat = np.concatenate(places) if places else np.empty(0, np.int64)
    return flat_batch(
        inputs["input_ids"],
        rows,
        [own - 1 for own in places],
        labels.reshape(-1)[flat],
        spans,
        position_ids=inputs["position_ids"] if len(spans) > len(ids) else None,
    )


def flat_batch(
    input_ids: Tensor,
    rows: Sequence[Row],
    places: Sequence[np.ndarray],
    labels: np.ndarray,
    spans: Sequence[Span],
    *,
    position_ids: Tensor | None = None,
) -> MicroBatch:
    """The micro-batch of rows found at `spans`; its tensors lie where `input_ids` does.

    `places` are, of each row, the flat indices of the states that predict its response tokens;
    `labels` [T] these tokens.
    """
    width, device = input_ids.shape[1], input_ids.device
    counts = [len(own) for own in places]
    flat = np.concatenate(places) if places else np.empty(0, np.int64)
    return MicroBatch(
        input_ids=input_ids,
        response_index=torch.from_numpy(flat).to(device),
        labels=torch.from_numpy(labels.astype(np.int64)).to(device),
        row_of_token=torch.from_numpy(np.repeat(np.arange(len(rows)), counts)).to(device),
        tokens_of_row=tuple(counts),
        row_begins=tuple(line * width + first for line, first, _ in spans),
        rows=tuple(rows),
        position_ids=position_ids,
    )


def _host(inputs: Mapping[str, Any], name: str) -> np.ndarray:
    tensor = inputs.get(name)
    if not isinstance(tensor, Tensor):
        raise DataError(
            f"expected a tensor `{name}` in the batch, got the keys {sorted(inputs)}: the collator "
            "must give input_ids and labels"
        )
    return tensor.detach().cpu().numpy()


def _spans(
    ids: np.ndarray, labels: np.ndarray, real: np.ndarray, position_ids: Tensor | None
) -> list[Span]:
    """The rows of each line, in order."""
    starts = real & ~np.pad(real, ((0, 0), (1, 0)))[:, :-1]
    if position_ids is not None:
        if position_ids.shape not in (real.shape, (1, real.shape[1])):
            raise DataError(
                f"expected position_ids of the shape of input_ids, {real.shape}, got "
                f"{tuple(position_ids.shape)}: where rows are packed they start again at each row"
            )
        starts |= real & (position_ids.cpu().numpy() == 0)
    spans: list[Span] = []
    for line, own in enumerate(real):
        firsts = np.flatnonzero(starts[line])
        if not firsts.size:
            continue
        end = int(np.flatnonzero(own)[-1]) + 1
        lasts = [*firsts[1:].tolist(), end]
        for first, last in zip(firsts.tolist(), lasts, strict=True):
            # What fills a packed line up is one token again and again, without a label.
            own_ids, own_labels = ids[line, first:last], labels[line, first:last]
            is_fill = (own_labels == IGNORED).all() and (own_ids == own_ids[0]).all()
            if len(firsts) == 1 or not is_fill:
                spans.append((line, first, last))
    return spans


def facts_of_rows(
    columns: RowColumns, spans: list[Span], real: np.ndarray
) -> list[tuple[Any, str | None, bool]]:
    """(risk, id, is_anchor) of every row, as the columns give them.

    Raises:
        DataError: columns that do not fit the rows.
    """
    anchors = _per_row("is_anchor", columns.is_anchor, spans, real, default=False)
    return list(
        zip(
            _per_row("risk", columns.risk, spans, real, default=None),
            _per_row("id", columns.ids, spans, real, default=None),
            [bool(anchor) for anchor in anchors],
            strict=True,
        )
    )


def _per_row(name: str, values: Any, spans: list[Span], real: np.ndarray, default: Any) -> list:
    """A value for each row from values of rows, of tokens, or of lines whose rows share one."""
    if values is None:
        return [default] * len(spans)
    if isinstance(values, Tensor):
        values = values.tolist()
    if any(isinstance(value, list) for value in values):
        return _of_tokens(name, values, spans, real)
    if len(values) == len(spans):
        return list(values)
    raise DataError(
        f"expected a value of `{name}` for each of the {len(spans)} rows of a batch, got "
        f"{len(values)}: where rows are packed give it as a list with one value for each token"
    )


def _of_tokens(name: str, lists: Sequence[Any], spans: list[Span], real: np.ndarray) -> list:
    """The first token's value of each row; lists hold real tokens, in order, or whole lines.

    Without a mask what fills a line up looks real, and may have no values.
    """
    width = real.shape[1]
    flat = [value for values in lists for value in values]
    own = [flat] if len(real) == 1 else lists
    if real.all() and len(own) == len(real) and len(flat) < real.size:
        if all(last <= len(own[line]) <= width for line, _, last in spans):
            return [own[line][first] for line, first, _ in spans]
    if len(flat) == real.size:
        index = np.arange(real.size)
    elif len(flat) == int(real.sum()):
        index = np.cumsum(real.reshape(-1)) - 1
    else:
        raise DataError(
            f"expected a value of `{name}` for each of the {int(real.sum())} tokens of a batch, "
            f"got {len(flat)}: the column and input_ids of a row must have the same length"
        )
    return [flat[index[line * width + first]] for line, first, _ in spans]


def known_row(
    input_ids: list[int],
    loss_mask: list[int],
    risk: Any,
    name: str | None,
    is_anchor: bool,
) -> Row:
    """The row with the facts of `facts_of_rows`; without a name it is named after its content.

    Raises:
        DataError: as `row_of`.
    """
    mask = [int(is_predicted) for is_predicted in loss_mask]
    if name is None:
        name = NAMED_BY_CONTENT + row_key(input_ids, mask)[:16]
    if risk != risk:  # a table that has none says nan
        risk = None
    return row_of(str(name), input_ids, mask, risk=risk, is_anchor=is_anchor)
