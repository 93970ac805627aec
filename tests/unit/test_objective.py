"""Claimed: a micro-batch's loss is that of the equations, each row with its own weights.

Judge: `oracles.step_loss` in float64 NumPy, and torch's cross-entropy where heads have caps and
scales. Rounds: float32 (1e-5 of values, 1e-4 of gradients).
"""

import numpy as np
import pytest
import torch
from support import oracles

from safereg_dist.config import RegularizerConfig
from safereg_dist.data import collate, filler, row_of
from safereg_dist.objective import Objective, token_betas
from safereg_dist.types import NO_HEAD, Head, Row

TOKENS_OF_ROW, VOCAB, HIDDEN = (3, 1, 7, 2), 23, 6
IS_ANCHOR = (False, True, False, False)
KL_COEF = [0.0, 1.0, 0.25, 1.0]
DIRECTIONS = {"kl_forward": "forward", "kl_reverse": "reverse", "l2_logits": "l2"}


def micro_batch():
    rows = [
        Row(
            id=f"r{i}",
            input_ids=[1, 2, *(5 + 3 * i + t for t in range(count))],
            loss_mask=[0, 0, *[1] * count],
            prompt_ends=[2],
            risk=None,
            prompt_key="",
            is_anchor=IS_ANCHOR[i],
        )
        for i, count in enumerate(TOKENS_OF_ROW)
    ]
    return collate(rows, pad_id=0)


def inputs():
    generator = torch.Generator().manual_seed(5)
    hidden, reference = torch.randn(2, sum(TOKENS_OF_ROW), HIDDEN, generator=generator)
    weight, frozen = torch.randn(2, VOCAB, HIDDEN, generator=generator)
    parameters = [torch.nn.Parameter(weight), torch.nn.Parameter(frozen, requires_grad=False)]
    return hidden.requires_grad_(), reference, *parameters


def objective(**changes):
    return Objective(RegularizerConfig(**changes), chunk_tokens=3, head_bytes=None)


@pytest.mark.parametrize("divergence", DIRECTIONS)
@pytest.mark.parametrize("name", ["convex", "additive", "static", "token_wise"])
def test_the_loss_is_the_equation(name, divergence):
    hidden, reference, weight, frozen = inputs()
    batch = micro_batch()
    got = objective(objective=name, divergence=divergence)(
        hidden,
        Head(weight, None, None, 1.0),
        batch,
        KL_COEF,
        num_tokens=torch.tensor(17),
        reference_hidden=reference,
        reference_head=Head(frozen, None, None, 1.0),
    )
    got.loss.backward()
    want = oracles.step_loss(
        hidden.detach().numpy(),
        weight.detach().numpy(),
        batch.labels.numpy(),
        np.repeat(np.arange(4), TOKENS_OF_ROW),
        np.array(KL_COEF),
        np.array(IS_ANCHOR),
        reference.numpy(),
        frozen.numpy(),
        objective=name,
        direction=DIRECTIONS[divergence],
        num_tokens=17,
    )
    assert got.loss.item() == pytest.approx(want["loss"], rel=1e-5)
    np.testing.assert_allclose(got.ce.numpy(), want["ce"], rtol=1e-5)
    np.testing.assert_allclose(got.divergence.numpy(), want["div"], rtol=1e-5, atol=1e-7)
    for mine, name_of in ((hidden.grad, "grad_hidden"), (weight.grad, "grad_head")):
        np.testing.assert_allclose(mine.numpy(), want[name_of], rtol=1e-4, atol=1e-6)


def test_each_model_has_its_own_bias_cap_and_scale():
    hidden, reference, weight, frozen = inputs()
    biases = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(6))
    own, other = (torch.nn.Parameter(bias, requires_grad=False) for bias in biases)
    heads = Head(weight, own, 3.0, 0.5), Head(frozen, other, 5.0, 2.0)
    x, y = (
        head.softcap * torch.tanh(head.scale * (h @ head.weight.T + head.bias) / head.softcap)
        for h, head in zip((hidden, reference), heads, strict=True)
    )
    q, log_q = y.softmax(-1), y.log_softmax(-1)
    batch = micro_batch()
    want_ce = torch.nn.functional.cross_entropy(x, batch.labels, reduction="none")
    want = (q * (log_q - x.log_softmax(-1))).sum(-1)
    got = objective()(
        hidden,
        heads[0],
        batch,
        KL_COEF,
        num_tokens=torch.tensor(10),
        reference_hidden=reference,
        reference_head=heads[1],
    )
    of_row = torch.repeat_interleave(torch.arange(4), torch.tensor(TOKENS_OF_ROW))
    is_task = ~torch.tensor(IS_ANCHOR)[of_row]
    is_active = torch.tensor(KL_COEF)[of_row] > 0
    torch.testing.assert_close(got.ce, torch.where(is_task, want_ce, 0.0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        got.divergence, torch.where(is_active, want, 0.0), rtol=1e-5, atol=1e-6
    )


def test_betas_begin_anew_at_each_response():
    """Two turns of the assistant, of 7 and 2 tokens; a row that begins with its response."""
    late = row_of("b", [1, 2, 3], [1, 1, 1])
    rows = [row_of("a", range(13), [0, 0, *[1] * 7, 0, 0, 1, 1]), late]
    want = [0.5, 2.0, 2.0, 2.0, 2.0, 0.1, 0.1, 0.5, 2.0, 2.0, 2.0]
    assert token_betas(rows).tolist() == pytest.approx(want)


def test_the_constraint_reads_each_model_through_its_own_head():
    """By autograd in float64, from logits with biases, caps and scales."""
    hidden, reference, weight, frozen = inputs()
    biases = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(6))
    own, other = (torch.nn.Parameter(bias, requires_grad=False) for bias in biases)
    heads = Head(weight, own, 3.0, 0.5), Head(frozen, other, 5.0, 2.0)
    batch = micro_batch()
    states = hidden.detach().double().requires_grad_()
    own_ce, other_ce = (
        torch.nn.functional.cross_entropy(
            head.softcap
            * torch.tanh(head.scale * (h @ head.weight.double().T + head.bias) / head.softcap),
            batch.labels,
            reduction="none",
        )
        for h, head in zip((states, reference.double()), heads, strict=True)
    )
    beta = torch.tensor([0.5, 2, 2, 0.5, 0.5, 2, 2, 2, 2, 0.1, 0.1, 0.5, 2], dtype=torch.float64)
    of_row = torch.repeat_interleave(torch.arange(4), torch.tensor(TOKENS_OF_ROW))
    is_task = ~torch.tensor(IS_ANCHOR)[of_row]
    terms = 2 / beta * torch.log1p(torch.exp(beta * (own_ce - other_ce)))
    want = terms[is_task].sum() / 10
    want.backward()
    none = [0.0] * 4  # no anchor is active, so that the loss is the constraint's alone
    got = objective(objective="token_wise")(
        hidden,
        heads[0],
        batch,
        none,
        num_tokens=torch.tensor(10),
        reference_hidden=reference,
        reference_head=heads[1],
    )
    got.loss.backward()
    assert got.loss.item() == pytest.approx(want.item(), rel=1e-5)
    np.testing.assert_allclose(hidden.grad.numpy(), states.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_token_wise_without_a_reference_is_cross_entropy():
    """As in validation, and on a rank whose rows have no response."""
    hidden, _, weight, _ = inputs()
    head, batch = Head(weight, None, None, 1.0), micro_batch()
    losses = [
        objective(objective=name)(hidden, head, batch, [0.0] * 4, num_tokens=torch.tensor(10)).loss
        for name in ("token_wise", "none")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("broken", ["policy", "reference"])
def test_a_constraint_that_is_not_finite_spoils_the_loss(broken):
    hidden, reference, weight, frozen = inputs()
    batch, bias = micro_batch(), torch.zeros(VOCAB)
    bias[batch.labels[0]] = -torch.inf
    biases = [torch.nn.Parameter(bias, requires_grad=False), None]
    own, other = biases if broken == "policy" else biases[::-1]
    got = objective(objective="token_wise")(
        hidden,
        Head(weight, own, None, 1.0),
        batch,
        [1.0] * 4,
        num_tokens=torch.tensor(10),
        reference_hidden=reference,
        reference_head=Head(frozen, other, None, 1.0),
    )
    got.loss.backward()
    if broken == "policy":
        assert got.loss.isnan()
        assert weight.grad.isnan().any(dim=1).all()
    else:  # the reference gives the token 0: its constraint is met, whatever the policy gives it
        assert got.loss.isfinite()
        assert weight.grad.isfinite().all()


def test_a_loss_that_is_not_finite_spoils_every_gradient():
    """A -inf logit of the label: the loss is inf, and without a guard most gradients are finite."""
    hidden, _, weight, _ = inputs()
    bias = torch.zeros(VOCAB)
    batch = micro_batch()
    bias[batch.labels[0]] = -torch.inf
    head = Head(weight, torch.nn.Parameter(bias, requires_grad=False), None, 1.0)
    got = objective(objective="none")(hidden, head, batch, [0.0] * 4, num_tokens=torch.tensor(10))
    got.loss.backward()
    assert got.loss.isnan()
    assert weight.grad.isnan().any(dim=1).all()


def test_a_step_without_tokens_is_zero_not_nan():
    hidden, _, weight, _ = inputs()
    batch = collate([filler(0), filler(0)], pad_id=0)
    got = objective()(
        hidden[:0],
        Head(weight, None, None, 1.0),
        batch,
        [0.0, 0.0],
        num_tokens=torch.tensor(0),
        reference_head=NO_HEAD,
    )
    assert got.loss.item() == 0.0
