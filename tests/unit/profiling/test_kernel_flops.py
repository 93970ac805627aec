"""Claimed: the formula that the fused operators register is what their matrix products cost.

Two judges: the products that torch's own counter sees, and a count written out in NumPy from the
weights. All are integers and must be equal; nothing rounds, nothing is timed.
"""

from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from safereg_dist.profiling.operators import UNKNOWN_TO_TORCH
from safereg_kernels import flops, fused, linear_ce_kl, linear_ce_kl_flops, masked_kl

VOCAB, H, H_REF = 101, 24, 16


@pytest.fixture(params=["eager", "triton"])
def path(request, monkeypatch):
    monkeypatch.setenv("SAFEREG_KERNELS", request.param)
    monkeypatch.setattr(fused, "BLOCK_COLUMNS", 256)
    return request.param


class Heard:
    """A listener that keeps what operators say, and counts the products for the divergence."""

    def __init__(self):
        self.costs = []
        self.divergence_products = 0

    @contextmanager
    def operator(self, cost):
        self.costs.append(cost)
        yield

    @contextmanager
    def divergence(self):
        with counter() as inner:
            yield
        self.divergence_products += inner.get_total_flops()


def counter():
    return FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_TORCH)


def draw(num_tokens, *, silent=0.3, dtype=torch.float32, shared=False, seed=0):
    """Arguments of `linear_ce_kl`: about `silent` of each weight is 0, independently."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    def weights():
        keep = torch.rand(num_tokens, generator=generator) >= silent
        return torch.rand(num_tokens, generator=generator).add(0.1) * keep

    head = normal(VOCAB, H)
    return {
        "policy_hidden": normal(num_tokens, H),
        "policy_head": head,
        "labels": torch.randint(VOCAB, (num_tokens,), generator=generator),
        "ce_weights": weights(),
        "kl_weights": weights(),
        "reference_hidden": normal(num_tokens, H if shared else H_REF),
        "reference_head": head.detach() if shared else normal(VOCAB, H_REF),
    }


def written_out(arguments, *, hidden_grad=True, weight_grad=True):
    """FLOPs of (cross-entropy, divergence), from the equation: a product of [a, b] by [b, c] is
    a * c dot products of b multiplications and b additions."""
    ce = arguments["ce_weights"].numpy() != 0
    kl = arguments["kl_weights"].numpy() != 0
    report = arguments.get("ce_report")
    active = ce | kl | (np.zeros_like(ce) if report is None else report.numpy())
    vocab, hidden = arguments["policy_head"].shape
    per_row = 2 * vocab * hidden  # logits; as many for each of the two gradients
    reference = arguments["reference_head"]
    reference_row = 0 if reference is None else 2 * vocab * reference.shape[1]
    rows = int(active.sum())
    ce_flops = rows * per_row * (1 + int(hidden_grad) + int(weight_grad))
    return ce_flops, int(kl.sum()) * reference_row


def check(arguments, *, hidden_grad=True, weight_grad=True, no_grad=False):
    """Forward and backward, counted, against the formula and the count written out."""
    arguments["policy_hidden"].requires_grad_(hidden_grad)
    arguments["policy_head"].requires_grad_(weight_grad)
    heard = Heard()
    with counter() as total, flops.listening(heard), torch.no_grad() if no_grad else nullcontext():
        loss, _, _ = linear_ce_kl(**arguments)
        if loss.requires_grad:
            (loss * 0.5).backward()
    (cost,) = heard.costs
    needed = {
        "hidden_grad": hidden_grad and not no_grad,
        "weight_grad": weight_grad and not no_grad,
    }
    assert tuple(cost) == written_out(arguments, **needed)
    assert cost.total == total.get_total_flops()
    assert cost.divergence == heard.divergence_products
    return cost


@pytest.mark.parametrize("num_tokens", [1, 7, 37])
@pytest.mark.parametrize("direction", ["forward", "reverse", "l2"])
def test_products_of_every_direction(path, direction, num_tokens):
    check({**draw(num_tokens), "direction": direction, "chunk_tokens": 5})


@pytest.mark.parametrize(
    "options",
    [
        {"policy_bias": torch.ones(VOCAB, requires_grad=True), "reference_bias": torch.ones(VOCAB)},
        {"policy_softcap": 3.0, "reference_softcap": 5.0},
        {"vocab_size": 99},
        {"chunk_tokens": 1},
        {"chunk_tokens": 1000},
        {"ce_report": torch.arange(37) % 3 == 0},
    ],
    ids=lambda o: "-".join(o),
)
def test_options_leave_the_formula_as_it_is(options):
    arguments = {**draw(37), **options}
    arguments["labels"].clamp_(max=98)
    check(arguments)


@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize(("hidden", "weight"), [(True, True), (True, False), (False, True)])
def test_gradients_that_nobody_needs_cost_nothing(hidden, weight, no_grad):
    costs = check(draw(37), hidden_grad=hidden, weight_grad=weight, no_grad=no_grad)
    assert costs.divergence > 0


def test_a_shared_head_in_the_difference_form():
    check({**draw(37, shared=True), "is_difference": True})


def test_operands_of_lower_precision():
    check(draw(37, dtype=torch.bfloat16))


def test_without_a_reference():
    arguments = draw(37)
    arguments["kl_weights"].zero_()
    arguments["reference_hidden"] = arguments["reference_head"] = None
    assert check(arguments).divergence == 0


def test_no_row_reaches_a_product():
    assert check(draw(7, silent=1.1)).total == 0


def test_the_formula_in_numbers():
    cost = linear_ce_kl_flops(
        num_active=3, num_kl=2, columns=5, hidden_size=7, reference_hidden_size=11
    )
    assert cost == (6 * 3 * 5 * 7, 2 * 2 * 5 * 11)


def test_masked_kl_has_no_product():
    policy = torch.randn(7, VOCAB, requires_grad=True)
    with counter() as total:
        loss, _ = masked_kl(policy, torch.randn(7, VOCAB), torch.ones(7))
        loss.backward()
    assert total.get_total_flops() == 0
