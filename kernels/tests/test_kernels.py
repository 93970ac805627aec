"""The eager path of `safereg_kernels` against the float64 oracle, value and gradient.

Claimed: both public functions compute the equations of design section 2 for every direction, ugly
shapes, any chunk size and any upstream scalar, and never read a skipped row. Exact: skipped rows
yield 0 and adding them changes no bit of the others' divergence and gradient. May round: arithmetic
is float32 (1e-5 for values, 4e-5 for gradients, chunk sizes differ as much); a bfloat16 gradient is
one or two further roundings (2^-8 of the element each) away.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import head_oracle as oracle
import numpy as np
import pytest
import torch
from cases import (
    DIRECTIONS,
    FULL,
    GRADIENT,
    HIDDEN,
    REFERENCE_HIDDEN,
    TOKENS,
    VOCAB,
    as_truth,
    assert_close,
    assert_head_matches,
    grad_of,
    head_inputs,
    head_truth,
    kl_truth,
    logits_pair,
    with_biases,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from safereg_kernels import ShapeError, eager, fused, linear_ce_kl, masked_kl

pytestmark = pytest.mark.usefixtures("path")


# ---- masked_kl ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "scale"),
    product((1.0, 0.7, 2.5), (0.25, 1.0, 3.0))
    if FULL
    else [(1.0, 1.0), (0.7, 1.0), (1.0, 3.0), (2.5, 0.25)],
)
@DIRECTIONS
def test_masked_kl_value_and_gradient(direction: str, temperature: float, scale: float) -> None:
    x, y, weights = logits_pair()
    loss, div = masked_kl(x, y, weights, direction=direction, temperature=temperature)
    (loss * scale).backward()
    want, want_div, want_grad = kl_truth(x, y, weights, direction, temperature)
    assert loss.dtype == div.dtype == torch.float32
    assert not div.requires_grad
    assert_close(loss, want)
    assert_close(div, want_div)
    # Where the models hardly overlap, log(m/p) and KL(p||m) are both near log(1/(1 - beta)), and
    # their difference has the rounding of that.
    relative = 2 * GRADIENT if direction == "jsd" else GRADIENT
    assert_close(grad_of(x), want_grad * scale, relative=relative)
    assert (grad_of(x)[weights == 0] == 0).all()
    assert (div[weights == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@DIRECTIONS
def test_masked_kl_of_other_dtypes(direction: str, dtype: torch.dtype) -> None:
    x, y, weights = logits_pair(dtype)
    loss, div = masked_kl(x, y, weights, direction=direction)
    (loss * 3).backward()
    want, want_div, want_grad = kl_truth(x, y, weights, direction)
    assert_close(loss, want)
    assert_close(div, want_div)
    assert grad_of(x).dtype == dtype
    # bfloat16 is rounded twice, when it is kept (half the memory) and after the upstream scalar.
    relative = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: GRADIENT}[dtype]
    assert_close(grad_of(x), want_grad * 3, relative=relative)


@DIRECTIONS
def test_float16_gradient_survives_a_loss_scale(direction: str) -> None:
    """Gradients of 1/N-weighted float16 rows underflow unless the loss scale is applied first."""
    x, y, _ = logits_pair(torch.float16, seed=1)
    x, y = x.detach()[1::3].clone().requires_grad_(), y[1::3]
    weights = torch.full((len(x),), 1e-6)
    loss, _ = masked_kl(x, y, weights, direction=direction)
    (loss * 2.0**16).backward()
    _, _, want = kl_truth(x, y, weights, direction)
    got, want = as_truth(grad_of(x)), want * 2.0**16
    np.testing.assert_allclose(got, want, rtol=2**-10, atol=2**-24)


@pytest.mark.parametrize("which", ["both", "reference only", "policy only"])
@DIRECTIONS
def test_suppressed_tokens(direction: str, which: str) -> None:
    """-inf logits: absent where both agree; an infinite KL is reported as such, never as NaN."""
    x, y, _ = logits_pair(seed=2)
    x, y, weights = x.detach()[1:3].clone(), y[1:3].clone(), torch.tensor([1.0, 2.0])
    if which != "reference only":
        x[:, [3, 400]] = -torch.inf
    if which != "policy only":
        y[:, [3, 400]] = -torch.inf
    x.requires_grad_()
    loss, div = masked_kl(x, y, weights, direction=direction)
    loss.backward()
    want, want_div, want_grad = kl_truth(x, y, weights, direction)
    assert_close(div, want_div)
    assert_close(loss, want)
    if np.isfinite(want):
        assert_close(grad_of(x), want_grad, relative=GRADIENT)
        if which == "both":
            assert (grad_of(x)[:, [3, 400]] == 0).all()
    else:
        assert (direction, which) in {("forward", "policy only"), ("reverse", "reference only")}


def test_all_rows_skipped() -> None:
    x = torch.full((5, 7), torch.nan, requires_grad=True)
    loss, div = masked_kl(x, torch.full((5, 7), torch.nan), torch.zeros(5))
    loss.backward()
    assert loss.item() == 0
    assert (div == 0).all()
    assert (grad_of(x) == 0).all()


@DIRECTIONS
def test_tiny_divergences_keep_one_per_cent(
    direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KL of 1e-5 nats from float32 logits: the plain sum of q (b - a) loses it to cancellation."""
    monkeypatch.setattr(fused, "BLOCK_COLUMNS", 4096)
    generator = torch.Generator().manual_seed(3)
    y = torch.randn(16, 50257, generator=generator) * 3
    x = y + 0.0045 * torch.randn(y.shape, generator=generator) + 5.0
    _, div = masked_kl(x, y, torch.ones(16), direction=direction)
    want = oracle.divergence(as_truth(x), as_truth(y), direction)
    if direction != "l2":
        assert (want < 5e-5).all()
        assert (want > 1e-6).all()
    np.testing.assert_allclose(as_truth(div), want, rtol=0.01)


# ---- linear_ce_kl ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunk_tokens", "scale"),
    product((7, 1024), (0.25, 3.0)) if FULL else [(7, 0.25), (1024, 0.25)],
)
@DIRECTIONS
def test_linear_value_and_gradient(direction: str, chunk_tokens: int, scale: float) -> None:
    given = {**head_inputs(), "direction": direction, "chunk_tokens": chunk_tokens}
    assert_head_matches(given, upstream=scale)


@DIRECTIONS
def test_linear_bfloat16(direction: str) -> None:
    """Logits stay in float32, so only the two gradients are rounded to bfloat16."""
    given = {**head_inputs(torch.bfloat16), "direction": direction, "chunk_tokens": 7}
    assert_head_matches(given, grad_relative=2**-8)


@DIRECTIONS
def test_linear_bias(direction: str) -> None:
    assert_head_matches({**with_biases(head_inputs()), "direction": direction, "chunk_tokens": 7})


@pytest.mark.parametrize("path", ["eager"], indirect=True)
@DIRECTIONS
def test_rows_are_taken_three_at_a_time(
    direction: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows than the eager path works on at once: no row is left out, nor taken twice."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(eager, "LOGITS_PER_THREAD", 3 * VOCAB)
    try:
        assert_head_matches({**head_inputs(), "direction": direction})
        x, y, weights = logits_pair()
        loss, div = masked_kl(x, y, weights, direction=direction)
        loss.backward()
    finally:
        torch.set_num_threads(threads)
    want, want_div, want_grad = kl_truth(x, y, weights, direction)
    assert_close(loss, want)
    assert_close(div, want_div)
    assert_close(grad_of(x), want_grad, relative=2 * GRADIENT)


def test_frozen_head_gets_no_gradient() -> None:
    inputs = head_inputs()
    inputs["policy_head"] = inputs["policy_head"].detach()
    loss, _, _ = linear_ce_kl(**inputs)
    loss.backward()
    assert inputs["policy_head"].grad is None
    assert_close(
        grad_of(inputs["policy_hidden"]), head_truth(inputs).grad_hidden, relative=GRADIENT
    )


def test_frozen_trunk_still_trains_the_head() -> None:
    inputs = head_inputs()
    inputs["policy_hidden"] = inputs["policy_hidden"].detach()
    loss, _, _ = linear_ce_kl(**inputs)
    loss.backward()
    assert_close(grad_of(inputs["policy_head"]), head_truth(inputs).grad_head, relative=GRADIENT)


def test_tied_head_adds_both_gradients() -> None:
    """The head is the embedding that made the hidden states; the reference may share it."""
    generator = torch.Generator().manual_seed(6)
    embedding = (torch.randn(VOCAB, HIDDEN, generator=generator) * 0.5).requires_grad_()
    ids = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    inputs = head_inputs()
    inputs["policy_hidden"] = torch.tanh(embedding[ids])
    inputs["policy_head"] = embedding
    inputs["reference_hidden"] = torch.randn(TOKENS, HIDDEN, generator=generator)
    inputs["reference_head"] = embedding
    loss, _, _ = linear_ce_kl(**inputs, chunk_tokens=5)
    loss.backward()
    want = head_truth(inputs)
    total = want.grad_head.copy()
    slope = 1 - np.tanh(as_truth(embedding)[ids.numpy()]) ** 2
    np.add.at(total, ids.numpy(), want.grad_hidden * slope)
    assert_close(grad_of(embedding), total, relative=GRADIENT)


@pytest.mark.parametrize("chunk_tokens", [5, 1024])
def test_reported_cross_entropy_changes_neither_loss_nor_gradient(chunk_tokens: int) -> None:
    """The log wants the CE of rows that learn from the reference alone, and of skipped ones."""
    inputs = head_inputs()
    inputs["labels"] = inputs["labels"].clamp(min=0)
    report = torch.arange(TOKENS) % 4 >= 2
    report[[2, 3]] = False
    inputs["policy_hidden"] = torch.nan_to_num(inputs["policy_hidden"].detach()).requires_grad_()
    loss, ce, div = linear_ce_kl(**inputs, chunk_tokens=chunk_tokens, ce_report=report)
    loss.backward()
    want = head_truth(inputs)
    logits = as_truth(inputs["policy_hidden"]) @ as_truth(inputs["policy_head"]).T
    all_ce = oracle.cross_entropy(logits, inputs["labels"].numpy())
    shown = (report | (inputs["ce_weights"] != 0)).numpy()
    assert_close(loss, want.loss)
    assert_close(ce, np.where(shown, all_ce, 0.0))
    assert_close(div, want.divergence)
    assert_close(grad_of(inputs["policy_hidden"]), want.grad_hidden, relative=GRADIENT)
    assert_close(grad_of(inputs["policy_head"]), want.grad_head, relative=GRADIENT)


def test_an_infinite_reported_cross_entropy_stays_out_of_the_loss() -> None:
    inputs = head_inputs()
    bias = torch.zeros(VOCAB)
    bias[7] = -torch.inf
    inputs |= {"policy_bias": bias, "reference_bias": bias}
    inputs["labels"] = torch.where(inputs["ce_weights"] != 0, 8, 7)
    report = (inputs["ce_weights"] == 0) & (inputs["kl_weights"] != 0)
    loss, ce, _ = linear_ce_kl(**inputs, ce_report=report)
    loss.backward()
    want = head_truth(inputs)
    assert torch.isinf(ce[report]).all()
    assert_close(loss, want.loss)
    assert_close(grad_of(inputs["policy_hidden"]), want.grad_hidden, relative=GRADIENT)


@pytest.mark.parametrize("with_reference", [True, False])
def test_no_divergence_wanted(with_reference: bool) -> None:
    inputs = head_inputs()
    inputs["kl_weights"] = torch.zeros(TOKENS)
    if with_reference:
        inputs["reference_hidden"].fill_(torch.nan)
    else:
        inputs["reference_hidden"] = inputs["reference_head"] = None
    assert_head_matches(inputs)


def test_linear_all_rows_skipped() -> None:
    inputs = head_inputs()
    inputs["ce_weights"] = inputs["kl_weights"] = torch.zeros(TOKENS)
    loss, ce, div = linear_ce_kl(**inputs)
    loss.backward()
    assert loss.item() == 0
    for zero in (ce, div, grad_of(inputs["policy_hidden"]), grad_of(inputs["policy_head"])):
        assert (zero == 0).all()


@DIRECTIONS
def test_suppressed_tokens_through_the_bias(direction: str) -> None:
    """A bias of -inf in both models takes tokens out of the vocabulary."""
    inputs = head_inputs()
    inputs["labels"] = inputs["labels"].clamp(max=VOCAB - 10)
    bias = torch.zeros(VOCAB)
    bias[-5:] = -torch.inf
    inputs |= {"policy_bias": bias, "reference_bias": bias}
    assert_head_matches({**inputs, "direction": direction, "chunk_tokens": 7})


# ---- what both promise -------------------------------------------------------------------------


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    with FlopCounterMode(display=False) as counter:
        yield counter


def test_no_grad_does_no_gradient_work() -> None:
    inputs = head_inputs()
    rows = int(((inputs["ce_weights"] != 0) | (inputs["kl_weights"] != 0)).sum())
    active = int((inputs["kl_weights"] != 0).sum())
    forward_only = 2 * VOCAB * (rows * HIDDEN + active * REFERENCE_HIDDEN)
    with torch.no_grad(), counted_flops() as counter:
        loss, ce, div = linear_ce_kl(**inputs)
    assert counter.get_total_flops() == forward_only
    want = head_truth(inputs)
    assert not loss.requires_grad
    assert_close(loss, want.loss)
    assert_close(ce, want.ce)
    assert_close(div, want.divergence)
    with counted_flops() as counter:
        linear_ce_kl(**inputs)
    # Two more products: the gradients of the hidden states and of the head.
    assert counter.get_total_flops() == forward_only + 2 * 2 * VOCAB * rows * HIDDEN


def test_no_grad_keeps_no_gradient_of_masked_kl() -> None:
    x, y, weights = logits_pair()
    with torch.no_grad():
        loss, div = masked_kl(x, y, weights)
    want, want_div, _ = kl_truth(x, y, weights, "forward")
    assert not loss.requires_grad
    assert_close(loss, want)
    assert_close(div, want_div)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@DIRECTIONS
def test_inputs_are_never_overwritten(direction: str, dtype: torch.dtype) -> None:
    inputs = head_inputs(dtype)
    copies = {name: value.detach().clone() for name, value in inputs.items()}
    loss, _, _ = linear_ce_kl(**inputs, direction=direction, chunk_tokens=7)
    loss.backward()
    for name, copy in copies.items():
        torch.testing.assert_close(inputs[name].detach(), copy, rtol=0, atol=0, equal_nan=True)
    x, y, weights = logits_pair(dtype)
    before = [t.detach().clone() for t in (x, y, weights)]
    masked_kl(x, y, weights, direction=direction)[0].backward()
    for tensor, copy in zip((x, y, weights), before, strict=True):
        torch.testing.assert_close(tensor.detach(), copy, rtol=0, atol=0, equal_nan=True)


@DIRECTIONS
def test_backward_twice_gives_the_same_gradient(direction: str) -> None:
    inputs = head_inputs()
    loss, _, _ = linear_ce_kl(**inputs, direction=direction)
    first = torch.autograd.grad(loss, inputs["policy_hidden"], retain_graph=True)[0]
    second = torch.autograd.grad(loss, inputs["policy_hidden"])[0]
    assert torch.equal(first, second)


@pytest.mark.parametrize("chunk_tokens", [1, 7])
def test_chunks_change_memory_not_results(chunk_tokens: int) -> None:
    results = []
    for size in (chunk_tokens, 1024):
        inputs = head_inputs()
        loss, ce, div = linear_ce_kl(**inputs, chunk_tokens=size)
        loss.backward()
        results.append((loss.detach(), ce, div, grad_of(inputs["policy_hidden"])))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@DIRECTIONS
def test_gradient_is_the_derivative_of_the_oracle_value(direction: str) -> None:
    """Central differences of the float64 value, along random directions of hidden and head."""
    inputs = head_inputs()
    loss, _, _ = linear_ce_kl(**inputs, direction=direction)
    loss.backward()
    generator = torch.Generator().manual_seed(7)
    for name in ("policy_hidden", "policy_head"):
        along = torch.randn(inputs[name].shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            moved = inputs | {name: inputs[name].detach().double() + sign * 1e-6 * along}
            values.append(head_truth({**moved, "direction": direction}).loss)
        slope = (values[0] - values[1]) / 2e-6
        grad = torch.nan_to_num(inputs[name].grad.double())
        assert float((grad * along).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-4)


logit_rows = st.integers(0, 2**32 - 1).flatmap(
    lambda seed: st.tuples(st.just(seed), st.integers(1, 6), st.integers(2, 40))
)


@DIRECTIONS
@settings(max_examples=25, deadline=None)
@given(shape=logit_rows, spread=st.sampled_from([1e-3, 1.0, 20.0]))
def test_divergence_is_zero_iff_equal_and_never_negative(
    direction: str, shape: tuple[int, int, int], spread: float
) -> None:
    seed, tokens, vocab = shape
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, tokens, vocab, generator=generator) * spread
    _, apart = masked_kl(x, y, torch.ones(tokens), direction=direction)
    assert (apart >= 0).all()
    x.requires_grad_()
    loss, same = masked_kl(x, x.detach().clone(), torch.ones(tokens), direction=direction)
    loss.backward()
    assert (same == 0).all()
    assert (grad_of(x) == 0).all()


@DIRECTIONS
@settings(max_examples=25, deadline=None)
@given(shape=logit_rows, shift=st.floats(-50, 50))
def test_a_constant_shift_changes_nothing(
    direction: str, shape: tuple[int, int, int], shift: float
) -> None:
    seed, tokens, vocab = shape
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, tokens, vocab, generator=generator)
    ones = torch.ones(tokens)
    _, plain = masked_kl(x, y, ones, direction=direction)
    _, shifted = masked_kl(x + shift, y - shift / 3, ones, direction=direction)
    # Adding 50 rounds each logit to 4e-6 before the function sees it.
    torch.testing.assert_close(shifted, plain, rtol=1e-4, atol=2e-5)


@DIRECTIONS
@settings(max_examples=25, deadline=None)
@given(shape=logit_rows, extra=st.integers(1, 5))
def test_skipped_rows_change_nothing(
    direction: str, shape: tuple[int, int, int], extra: int
) -> None:
    seed, tokens, vocab = shape
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, tokens, vocab, generator=generator)
    weights = torch.rand(tokens, generator=generator) + 0.1
    order = torch.randperm(tokens + extra, generator=generator)
    kept = torch.argsort(order)[:tokens]  # where the true rows land
    x_more = torch.cat([x, torch.full((extra, vocab), torch.nan)])[order].requires_grad_()
    y_more = torch.cat([y, torch.full((extra, vocab), torch.nan)])[order]
    w_more = torch.cat([weights, torch.zeros(extra)])[order]
    x = x.clone().requires_grad_()
    loss, div = masked_kl(x, y, weights, direction=direction)
    loss_more, div_more = masked_kl(x_more, y_more, w_more, direction=direction)
    loss.backward()
    loss_more.backward()
    torch.testing.assert_close(loss_more, loss, rtol=1e-6, atol=0)  # another order of the sum
    assert torch.equal(div_more[kept], div)
    assert torch.equal(grad_of(x_more)[kept], grad_of(x))


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy_hidden": torch.zeros(TOKENS, HIDDEN + 1)}, "one H"),
        ({"policy_head": torch.zeros(0)}, "gathered"),
        ({"labels": torch.zeros(TOKENS - 1, dtype=torch.int64)}, "labels .*one per token"),
        ({"ce_weights": torch.zeros(TOKENS, 1)}, "ce_weights .*one per token"),
        ({"kl_weights": torch.zeros(TOKENS + 1)}, "kl_weights .*one per token"),
        ({"reference_hidden": torch.zeros(3, REFERENCE_HIDDEN)}, "reference_hidden"),
        ({"reference_hidden": torch.zeros(TOKENS, 5)}, "reference_head .*one H"),
        ({"reference_head": torch.zeros(VOCAB + 3, REFERENCE_HIDDEN)}, "vocab 512 .*has 509"),
        ({"reference_hidden": None}, "pass both"),
        ({"reference_head": None}, "pass both"),
        ({"ce_report": torch.ones(1, dtype=torch.bool)}, "ce_report .*one per token"),
        ({"policy_bias": torch.zeros(1)}, "policy_bias .*509"),
        ({"reference_bias": torch.zeros(VOCAB - 1)}, "reference_bias .*509"),
    ],
)
def test_linear_shape_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        linear_ce_kl(**(head_inputs() | change))


@pytest.mark.parametrize(
    ("x", "y", "weights", "message"),
    [
        ((4, 5), (4, 6), (4,), "same padded vocabulary"),
        ((4, 5), (3, 5), (4,), r"\(4, 5\)"),
        ((2, 4, 5), (2, 4, 5), (4,), "one per token"),
        ((4, 5), (4, 5), (4, 1), "one per token"),
    ],
)
def test_masked_kl_shape_errors(x: tuple, y: tuple, weights: tuple, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        masked_kl(torch.zeros(x), torch.zeros(y), torch.ones(weights))


def test_unknown_options_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, weights = logits_pair()
    with pytest.raises(ValueError, match="direction must be one of"):
        masked_kl(x, y, weights, direction="sideways")
    with pytest.raises(ValueError, match="chunk_tokens"):
        linear_ce_kl(**head_inputs(), chunk_tokens=0)
    monkeypatch.setenv("SAFEREG_KERNELS", "cuda")
    with pytest.raises(ValueError, match="SAFEREG_KERNELS must be"):
        masked_kl(x, y, weights)
