"""Claimed: where no row is active a loop's loss is the model's own; every other loss is ours.

The judge is cross-entropy over whole logits in float64. Exact: which of the two runs.
"""

import pytest
import torch
from support.builders import tiny_model
from torch.nn import functional

from safereg_dist import RowColumns, batch_of, prepare

IDS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
LABELS = torch.tensor([[-100, -100, 7, 8], [-100, 8, 7, 6]])


class Watched:
    """A model that notes whether it was asked for a loss of its own."""

    def __init__(self, model):
        self.model, self.gave_loss = model, []

    def __call__(self, **inputs):
        outputs = self.model(**inputs)
        self.gave_loss.append(outputs.loss is not None)
        return outputs


def one_step(*, settings=None, labels=LABELS, **columns):
    """(loss, whether it was the model's, metrics) of a step of one micro-batch."""
    model = tiny_model(seed=3)
    given = {"risk": {"estimator": "column"}} | (settings or {})
    regularizer = prepare(model, given, reference=tiny_model(seed=4))
    batch = batch_of({"input_ids": IDS, "labels": labels}, RowColumns(**columns))
    plan = regularizer.open([batch], step=0)
    watched = Watched(model)
    inputs = {"input_ids": IDS, "labels": labels}
    loss = regularizer.loss(watched, inputs, plan.micro_batches[0], batch, plan)
    loss.backward()
    return float(loss.detach()), watched.gave_loss[0], regularizer.close(plan).sums


@torch.no_grad()
def exact_ce(rows):
    """The sum of CE of these rows over the tokens of all."""
    logits = tiny_model(seed=3).double()(input_ids=IDS).logits[:, :-1].log_softmax(-1)
    ce = functional.nll_loss(logits.transpose(1, 2), LABELS[:, 1:], reduction="none")
    return float(ce[rows].sum()) / int((LABELS[:, 1:] != -100).sum())


@pytest.mark.parametrize(
    ("settings", "risk", "is_own"),
    [
        ({}, [0.0, 0.4], True),
        ({}, [0.0, 0.9], False),
        ({"train": {"stack_loss": False}}, [0.0, 0.4], False),
        ({"regularizer": {"objective": "none"}}, [0.0, 0.9], True),
    ],
)
def test_whose_loss_it_is(settings, risk, is_own):
    loss, found, sums = one_step(settings=settings, risk=risk)
    assert found == is_own
    assert sums["loss"] == pytest.approx(loss)
    assert sums["ce_sum"] == pytest.approx(exact_ce([0, 1]) * sums["task_tokens"], rel=1e-5)
    if sums["active_rows"] == 0:
        assert loss == pytest.approx(exact_ce([0, 1]), rel=1e-5)


def test_anchors_without_a_reference_are_not_trained():
    settings = {"regularizer": {"objective": "none"}}
    loss, found, _ = one_step(settings=settings, risk=[0.0, None], is_anchor=[False, True])
    assert not found
    assert loss == pytest.approx(exact_ce([0]), rel=1e-5)


def test_rows_without_any_response_token():
    loss, found, sums = one_step(labels=torch.full_like(LABELS, -100), risk=[0.0, 0.0])
    assert found
    assert loss == sums["loss"] == sums["ce_sum"] == 0
