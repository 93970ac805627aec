"""Claimed: `batch_of` finds the rows that a stack's collator has put into its tensors.

Exact: rows, places of the states that predict, labels and counts equal those of loops over the
tokens, for lines padded on either side, packed lines, padding-free lines with a filled end, and
random layouts of all of these; risk, ids and anchors come with the right rows; what does not fit is
a DataError that says so.
"""

import random

import pytest
import torch

from safereg_dist.data.stacked import RowColumns, batch_of
from safereg_dist.errors import DataError

PAD, IGNORED = 0, -100


def tensors(lines):
    """`input_ids`, `labels`, `attention_mask` of lines of (ids, labels, mask)."""
    keys = ("input_ids", "labels", "attention_mask")
    return {key: torch.tensor([line[i] for line in lines]) for i, key in enumerate(keys)}


def random_row(draw):
    length = draw.randint(1, 6)
    ids = [draw.randint(1, 90) for _ in range(length)]
    return ids, [i if draw.random() < 0.6 else IGNORED for i in ids]


def padded(rows, side):
    """A line a row, filled up on one side."""
    width = max(len(ids) for ids, _ in rows) + 1
    lines = []
    for ids, labels in rows:
        extra = width - len(ids)
        real = [ids, labels, [1] * len(ids)]
        filled = [[fill] * extra for fill in (PAD, IGNORED, 0)]
        pairs = zip(real, filled, strict=True)
        lines.append([r + f if side == "right" else f + r for r, f in pairs])
    return tensors(lines)


def packed(rows, lines, fill):
    """Rows one after the other in some lines, each filled up with position 0 to one width."""
    share = [rows[i::lines] for i in range(lines)]
    width = max(sum(len(ids) for ids, _ in own) for own in share) + fill
    found, positions = [], []
    for own in share:
        ids = [i for row, _ in own for i in row]
        labels = [i for _, row in own for i in row]
        place = [p for row, _ in own for p in range(len(row))]
        extra = width - len(ids)
        found.append([ids + [PAD] * extra, labels + [IGNORED] * extra, None])
        positions.append(place + [0] * extra)
    inputs = tensors([[ids, labels, [1] * width] for ids, labels, _ in found])
    del inputs["attention_mask"]
    return inputs | {"position_ids": torch.tensor(positions)}, [r for own in share for r in own]


def check(inputs, rows):
    """Holds the batch of `inputs` against a loop over the tokens of `rows`."""
    batch = batch_of(inputs)
    assert [row.input_ids for row in batch.rows] == [ids for ids, _ in rows]
    flat = inputs["input_ids"].flatten().tolist()
    states, labels, owners, counts = [], [], [], []
    for number, (ids, own) in enumerate(rows):
        begin = batch.row_begins[number]
        assert flat[begin : begin + len(ids)] == ids
        counts.append(0)
        for t in range(1, len(ids)):
            if own[t] != IGNORED:
                states.append(begin + t - 1)
                labels.append(ids[t])
                owners.append(number)
                counts[-1] += 1
    assert batch.response_index.tolist() == states
    assert batch.labels.tolist() == labels
    assert batch.row_of_token.tolist() == owners
    assert list(batch.tokens_of_row) == counts == [r.num_response_tokens for r in batch.rows]
    assert [r.loss_mask for r in batch.rows] == [
        [int(x != IGNORED) for x in own] for _, own in rows
    ]
    return batch


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_on_either_side(side, seed):
    draw = random.Random(seed)
    rows = [random_row(draw) for _ in range(draw.randint(1, 5))]
    batch = check(padded(rows, side), rows)
    assert batch.position_ids is None


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("fill", [0, 3])
def test_packed_rows_and_a_filled_end(fill, seed):
    draw = random.Random(seed)
    # A filler cannot be told from a row of one token without a label: those are left out of packs.
    rows = [r for r in (random_row(draw) for _ in range(12)) if len(r[0]) > 1]
    inputs, order = packed(rows, draw.randint(1, 2), fill)
    batch = check(inputs, order)
    assert batch.position_ids is inputs["position_ids"]


def test_a_mask_that_is_none_or_of_other_numbers():
    inputs = tensors([[[5, 6, 7], [IGNORED, 6, 7], [3, 2, 1]]])
    assert batch_of(inputs).labels.tolist() == [6, 7]
    del inputs["attention_mask"]
    assert batch_of(inputs).labels.tolist() == [6, 7]


def test_a_line_of_padding_has_no_row():
    lines = [[[PAD] * 2, [IGNORED] * 2, [0, 0]], [[5, 6], [5, 6], [1, 1]]]
    batch = batch_of(tensors(lines))
    assert [row.input_ids for row in batch.rows] == [[5, 6]]
    assert batch.row_begins == (2,)


def test_rows_and_lines_without_a_label():
    rows = [([5, 6], [IGNORED] * 2), ([7], [7]), ([8, 9], [IGNORED, 9])]
    assert check(padded(rows, "right"), rows).tokens_of_row == (0, 0, 1)


def test_risk_ids_and_anchors_of_rows():
    rows = [([5, 6], [5, 6]), ([7, 8, 9], [7, 8, 9])]
    columns = RowColumns(
        risk=torch.tensor([0.25, float("nan")]),
        ids=[None, "mine"],
        is_anchor=torch.tensor([False, True]),
    )
    first, second = batch_of(padded(rows, "left"), columns).rows
    assert (first.risk, second.risk) == (0.25, None)
    assert (first.is_anchor, second.is_anchor) == (False, True)
    assert second.id == "mine"
    assert first.id.startswith("sha256:")
    assert first.id == batch_of(padded(rows[:1], "right")).rows[0].id  # of its content alone


@pytest.mark.parametrize("has_mask", [True, False])
@pytest.mark.parametrize("form", ["flat", "lines", "tensor"])
def test_risk_of_tokens(form, has_mask):
    """Lists of real tokens however they are cut up, or whole lines; what fills up has none."""
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, PAD]]),
        "labels": torch.tensor([[5, 6, 7, 8, 9, IGNORED]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]]),
    }
    if not has_mask:
        del inputs["attention_mask"]
    risk = {
        "flat": [[0.1] * 3, [0.9] * 2],
        "lines": [[0.1] * 3 + [0.9] * 2 + [0.0]],
        "tensor": torch.tensor([[0.125] * 3 + [0.875] * 2 + [0.0]]),
    }[form]
    rows = batch_of(inputs, RowColumns(risk=risk)).rows
    assert [row.risk for row in rows] == ([0.125, 0.875] if form == "tensor" else [0.1, 0.9])
    assert [row.input_ids for row in rows] == [[5, 6, 7], [8, 9]]


def test_risk_of_tokens_of_filled_lines():
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [9, 5, PAD, PAD]]),
        "labels": torch.tensor([[5, 6, 7, 8], [9, 5, IGNORED, IGNORED]]),
        "position_ids": torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0]]),
    }
    batch = batch_of(inputs, RowColumns(risk=[[0.1, 0.1, 0.2, 0.2], [0.3, 0.3]]))
    assert [row.risk for row in batch.rows] == [0.1, 0.2, 0.3]
    with pytest.raises(DataError, match="each of the 8 tokens"):
        batch_of(inputs, RowColumns(risk=[[0.1, 0.1, 0.2], [0.3, 0.3]]))


GOOD = tensors([[[5, 6, 7], [5, 6, 7], [1, 1, 1]]])
BAD = {
    "no labels": ({"input_ids": GOOD["input_ids"]}, {}, "expected a tensor `labels`"),
    "labels of another shape": (GOOD | {"labels": torch.ones(1, 2)}, {}, "of one shape"),
    "a mask of four dimensions": (
        GOOD | {"attention_mask": torch.ones(1, 1, 3, 3)},
        {},
        "leave out a mask of other dimensions",
    ),
    "a mask of another width": (GOOD | {"attention_mask": torch.ones(1, 2)}, {}, "of one shape"),
    "positions of another shape": (
        GOOD | {"position_ids": torch.zeros(1, 2)},
        {},
        "position_ids",
    ),
    "flat tokens": ({key: value[0] for key, value in GOOD.items()}, {}, r"\[B, S\]"),
    "too many risks": (GOOD, {"risk": [0.1, 0.2]}, "each of the 1 rows of a batch, got 2"),
    "too few risks of tokens": (GOOD, {"risk": [[0.1, 0.2]]}, "each of the 3 tokens"),
    "risk above 1": (GOOD, {"risk": [1.5]}, "has risk 1.5"),
    "risk that is text": (GOOD, {"risk": ["high"]}, "risk"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_said(case):
    inputs, columns, message = BAD[case]
    with pytest.raises(DataError, match=message):
        batch_of(inputs, RowColumns(**columns))
