"""Claimed: rows are found in micro-batches of Megatron's form, whose labels are shifted already.
Exact: written out by hand.
"""

import pytest
import torch

from safereg_dist.data.stream import batch_of_stream
from safereg_dist.errors import DataError

TOKENS = torch.tensor([[5, 6, 7, 8, 0, 0], [9, 10, 11, 12, 13, 14]])
LABELS = torch.tensor([[6, 7, 8, 2, 0, 0], [10, 11, 12, 13, 14, 15]])
MASK = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1]]).float()
TWO = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]])


def item(**changes):
    return {"tokens": TOKENS, "labels": LABELS, "loss_mask": MASK, **changes}


def test_a_line_is_a_row_without_what_fills_it_up():
    batch = batch_of_stream(item(risk=torch.tensor([0.25, 0.75]), id=["a", "b"]))
    first, second = batch.rows
    assert (first.id, first.input_ids, first.loss_mask) == ("a", [5, 6, 7, 8, 2], [0, 0, 1, 1, 1])
    assert second.input_ids == [9, 10, 11, 12, 13, 14, 15]
    assert second.loss_mask == [0, 1, 1, 0, 0, 1, 1]
    assert [row.risk for row in batch.rows] == [0.25, 0.75]
    assert batch.response_index.tolist() == [1, 2, 3, 6, 7, 10, 11]
    assert batch.labels.tolist() == [7, 8, 2, 10, 11, 14, 15]
    assert batch.row_of_token.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert batch.tokens_of_row == (3, 4)
    assert [row.num_response_tokens for row in batch.rows] == [3, 4]


def test_documents_of_a_line_have_risks_of_their_own():
    risk = torch.tensor([[0.5] * 6, [0.25] * 3 + [0.75] * 3])
    batch = batch_of_stream(item(position_ids=TWO, risk=risk))
    assert [row.risk for row in batch.rows] == [0.5, 0.25, 0.75]
    # The first document's last token predicts the second one's first: here the mask leaves it out.
    assert [row.input_ids for row in batch.rows[1:]] == [[9, 10, 11], [12, 13, 14, 15]]
    assert batch.tokens_of_row == (3, 2, 2)
    assert batch.row_begins == (0, 6, 9)
    assert batch.response_index.tolist() == [1, 2, 3, 6, 7, 10, 11]


def test_what_fills_a_packed_line_up_is_no_row():
    """Stacks restart positions there once, or at every token."""
    tokens = torch.tensor([[5, 6, 7, 8, 0, 0]])
    mask = torch.tensor([[1, 0, 1, 0, 0, 0]]).float()
    for positions in ([0, 1, 0, 1, 0, 1], [0, 1, 0, 1, 0, 0]):
        given = {"labels": LABELS[:1], "loss_mask": mask, "position_ids": torch.tensor([positions])}
        batch = batch_of_stream({"tokens": tokens, **given})
        assert batch.row_begins == (0, 2)
        assert batch.tokens_of_row == (1, 1)


def test_a_row_without_tokens_that_count():
    batch = batch_of_stream(item(loss_mask=torch.zeros(2, 6)))
    assert batch.num_response_tokens == 0
    assert [row.num_response_tokens for row in batch.rows] == [0, 0]


def test_rows_without_names_are_named_after_their_content():
    again = batch_of_stream(item())
    other = batch_of_stream(item(labels=LABELS + 1))
    names = [row.id for row in batch_of_stream(item()).rows]
    assert names == [row.id for row in again.rows]
    assert not set(names) & {row.id for row in other.rows}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "expected the tensors tokens, labels, loss_mask"),
        ({"loss_mask": MASK[:, :5]}, "of one shape"),
        ({"loss_mask": MASK / 2}, "other values than 0 and 1"),
        ({"risk": torch.tensor([0.5])}, "a value of `risk` for each of the 2 rows"),
        ({"risk": torch.tensor([0.5, 1.5])}, r"expected a number in \[0, 1\]"),
    ],
)
def test_items_that_do_not_fit(changes, message):
    with pytest.raises(DataError, match=message):
        batch_of_stream(item(**changes))
