"""Every option of the public functions against the float64 oracle, values and gradients.

Claimed: mixtures, temperature, soft caps, logit scales, z-loss, metrics, stored references, batches
of sequences, shifts, ignored labels and reductions do what their equations say, alone and together,
on both paths. Exact: what no row asks for is 0; an invalid label is NaN. May round: arithmetic is
float32 (1e-5 for values, 4e-5 for gradients); under autocast the operands are bfloat16 (2^-8).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import cases
import head_oracle as oracle
import numpy as np
import pytest
import torch
from cases import (
    DIRECTIONS,
    GRADIENT,
    HIDDEN,
    VOCAB,
    as_truth,
    assert_close,
    assert_head_matches,
    grad_of,
    head_truth,
    kl_truth,
    with_biases,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from safereg_kernels import (
    LinearCEKL,
    ShapeError,
    TopK,
    linear_ce_kl,
    linear_cross_entropy,
    masked_kl,
)

pytestmark = pytest.mark.usefixtures("path")

TOKENS = 13
"""Three rows of each kind and one more: the interpreter is slow."""
METRICS = {"return_lse": True, "return_entropy": True, "return_accuracy": True}


head_inputs = partial(cases.head_inputs, tokens=TOKENS)
logits_pair = partial(cases.logits_pair, tokens=TOKENS)


def reference_logits(given: dict[str, Any]) -> np.ndarray:
    """The reference's logits in float64, transformed."""
    raw = as_truth(given["reference_hidden"]) @ as_truth(given["reference_head"]).T
    if given.get("reference_bias") is not None:
        raw = raw + as_truth(given["reference_bias"])
    scale, cap = given.get("reference_logit_scale", 1.0), given.get("reference_softcap")
    return oracle.transformed(raw, scale, cap)


def in_batches(given: dict[str, Any], sequences: int = 2) -> dict[str, Any]:
    """The first tokens as [B, S, ...]; `reference_topk` is left out."""
    length = TOKENS // sequences
    heads = ("policy_head", "reference_head", "policy_bias", "reference_bias")
    batched = dict(given)
    for name, value in given.items():
        if isinstance(value, Tensor) and name not in heads:
            rows = value.detach()[: sequences * length]
            batched[name] = rows.reshape(sequences, length, *value.shape[1:]).clone()
            batched[name].requires_grad_(value.requires_grad)
    return batched


# ---- the divergence ------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_mixtures(beta: float) -> None:
    options = {"direction": "jsd", "beta": beta, "temperature": 0.7, "chunk_tokens": 6}
    assert_head_matches({**head_inputs(), **options})
    x, y, weights = logits_pair()
    loss, div = masked_kl(x, y, weights, direction="jsd", beta=beta)
    (loss * 3).backward()
    want, want_div, want_grad = kl_truth(x, y, weights, "jsd", beta=beta)
    assert_close(loss, want)
    assert_close(div, want_div)
    assert_close(grad_of(x), want_grad * 3, relative=GRADIENT)


@pytest.mark.parametrize("temperature", [0.7, 2.5])
@DIRECTIONS
def test_temperature_is_the_divergences_alone(direction: str, temperature: float) -> None:
    options = {"direction": direction, "temperature": temperature, "chunk_tokens": 6}
    assert_head_matches({**head_inputs(), **options, **METRICS})


@pytest.mark.parametrize("caps", [(None, None), (4.0, 3.0)])
@DIRECTIONS
def test_logit_scales(direction: str, caps: tuple[float | None, float | None]) -> None:
    options = {
        "direction": direction,
        "policy_logit_scale": 0.3,
        "reference_logit_scale": 1.7,
        "policy_softcap": caps[0],
        "reference_softcap": caps[1],
        "temperature": 0.9,
    }
    assert_head_matches({**head_inputs(), **options, **METRICS})


@pytest.mark.parametrize(
    ("direction", "options"),
    [
        ("forward", {"policy_softcap": 5.0, "reference_softcap": 3.0}),
        ("reverse", {"policy_logit_scale": 0.4, "reference_logit_scale": 1.5}),
        ("l2", {"policy_softcap": 5.0, "policy_logit_scale": 1.5, "vocab_size": 500}),
        ("jsd", {"policy_softcap": 5.0, "reference_logit_scale": 0.5, "beta": 0.2}),
    ],
)
def test_masked_kl_transforms_logits(direction: str, options: dict[str, Any]) -> None:
    x, y, weights = logits_pair()
    loss, div = masked_kl(x, y, weights, direction=direction, temperature=1.3, **options)
    (loss * 3).backward()
    columns = options.get("vocab_size", VOCAB)
    want, want_div, want_grad = kl_truth(
        x[:, :columns],
        y[:, :columns],
        weights,
        direction,
        1.3,
        options.get("beta", 0.5),
        (options.get("policy_logit_scale", 1.0), options.get("policy_softcap")),
        (options.get("reference_logit_scale", 1.0), options.get("reference_softcap")),
    )
    assert_close(loss, want)
    assert_close(div, want_div)
    assert_close(grad_of(x)[:, :columns], want_grad * 3, relative=GRADIENT)
    assert (grad_of(x)[:, columns:] == 0).all()


def test_masked_kl_of_batches() -> None:
    flat_x, flat_y, flat_weights = (tensor.detach()[:12] for tensor in logits_pair())
    x, y = flat_x.reshape(3, 4, VOCAB).requires_grad_(), flat_y.reshape(3, 4, VOCAB)
    weights = flat_weights.reshape(3, 4)
    loss, div = masked_kl(x, y, weights, temperature=2.0)
    loss.backward()
    want, want_div, want_grad = kl_truth(x, y, weights, "forward", 2.0)
    assert div.shape == (3, 4)
    assert_close(loss, want)
    assert_close(div, want_div)
    assert_close(grad_of(x), want_grad, relative=GRADIENT)


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_a_stored_reference_lse_changes_nothing(direction: str) -> None:
    """log sum exp(y / T) of an earlier run; it saves work, and is unread in rows without KL.

    As float32 it is off by up to 5e-7, and so is every log q: p times that in a gradient, which is
    a difference of larger terms.
    """
    options = {"direction": direction, "temperature": 0.7, "reference_softcap": 6.0}
    inputs = {**head_inputs(), **options}
    y = reference_logits(inputs) / 0.7
    inputs["reference_lse"] = torch.from_numpy(oracle.log_sum_exp(y)).float()
    assert torch.isnan(inputs["reference_lse"][inputs["kl_weights"] == 0]).all()
    assert_head_matches(inputs, grad_relative=10 * GRADIENT)
    x, y, weights = logits_pair()
    lse = torch.from_numpy(oracle.log_sum_exp(as_truth(y) / 0.7)).float()
    how = {"direction": direction, "temperature": 0.7}
    loss, div = masked_kl(x, y, weights, **how, reference_lse=lse)
    loss.backward()
    want, want_div, want_grad = kl_truth(x, y, weights, direction, 0.7)
    assert_close(loss, want)
    assert_close(div, want_div)
    assert_close(grad_of(x), want_grad, relative=10 * GRADIENT)


@pytest.mark.parametrize("k", [1, 5, VOCAB])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_teachers_of_a_few_tokens(temperature: float, k: int) -> None:
    """Stored top-k logits: forward KL to the renormalised k tokens, beside a cross-entropy."""
    inputs = with_biases(head_inputs())
    logits = torch.nan_to_num(torch.from_numpy(reference_logits(inputs)).float())
    largest = logits.topk(k, dim=-1)
    for name in ("reference_hidden", "reference_head", "reference_bias"):
        del inputs[name]
    topk = TopK(ids=largest.indices, logits=largest.values)
    options = {"temperature": temperature, "chunk_tokens": 4, "policy_softcap": 7.0}
    assert_head_matches({**inputs, **options, "reference_topk": topk, **METRICS})


def test_a_teacher_of_a_few_tokens_in_a_padded_vocabulary() -> None:
    inputs = head_inputs()
    del inputs["reference_hidden"], inputs["reference_head"]
    inputs["labels"] = torch.where(inputs["labels"] >= 0, inputs["labels"] % 500, -100)
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(500, generator=generator)[:4] for _ in range(TOKENS)])
    topk = TopK(ids=ids, logits=torch.randn(TOKENS, 4, generator=generator))
    assert_head_matches({**inputs, "reference_topk": topk, "vocab_size": 500, "z_loss": 0.01})
    assert (grad_of(inputs["policy_head"])[500:] == 0).all()


# ---- the cross-entropy ---------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_z_loss(softcap: float | None) -> None:
    """In the loss and its gradient, never in the `ce` that is reported."""
    options = {"z_loss": 0.03, "policy_softcap": softcap, "temperature": 0.7}
    assert_head_matches({**head_inputs(), **options})


def test_metrics_of_the_rows_that_are_there() -> None:
    inputs = head_inputs()
    with torch.no_grad():
        best = (inputs["policy_hidden"] @ inputs["policy_head"].T).argmax(-1)
    wanted = inputs["ce_weights"] != 0
    inputs["labels"] = torch.where(wanted & (torch.arange(TOKENS) < 5), best, inputs["labels"])
    metrics = assert_head_matches({**inputs, **METRICS, "temperature": 2.0, "chunk_tokens": 4})
    assert metrics is not None
    assert set(metrics.accuracy[wanted].tolist()) == {0.0, 1.0}
    skipped = ~wanted & (inputs["kl_weights"] == 0)
    assert (metrics.accuracy[~wanted] == 0).all()
    assert (metrics.lse[skipped] == 0).all()
    assert (metrics.entropy[skipped] == 0).all()


def test_metrics_of_reported_rows() -> None:
    """A row that only the log wants has a cross-entropy, so it has metrics too."""
    inputs = head_inputs()
    inputs["policy_hidden"] = torch.nan_to_num(inputs["policy_hidden"].detach()).requires_grad_()
    inputs["labels"] = inputs["labels"].clamp(min=0)
    report = torch.arange(TOKENS) % 4 >= 2
    assert_head_matches({**inputs, **METRICS, "ce_report": report})


@pytest.mark.parametrize("asked", list(METRICS))
def test_only_the_metrics_asked_for(asked: str) -> None:
    metrics = assert_head_matches({**head_inputs(), asked: True})
    assert metrics is not None
    for name in ("lse", "entropy", "accuracy"):
        assert (getattr(metrics, name) is None) == (f"return_{name}" != asked)


def test_weights_default_to_the_labels() -> None:
    """Every label that is not ignored counts once, and nothing has a divergence."""
    inputs = head_inputs()
    given = {name: inputs[name] for name in ("policy_hidden", "policy_head", "labels")}
    given["policy_hidden"] = torch.nan_to_num(given["policy_hidden"].detach()).requires_grad_()
    _, ce, div = linear_ce_kl(**given)
    assert ((ce != 0) == (inputs["labels"] >= 0)).all()
    assert (div == 0).all()
    assert_head_matches(given)


@pytest.mark.parametrize("ignore_index", [-100, 7])
def test_ignored_labels_carry_no_weight(ignore_index: int) -> None:
    """Also where the caller gives weights, and where the index is a token's; KL stays."""
    inputs = head_inputs()
    inputs["labels"] = torch.where(inputs["labels"] >= 0, inputs["labels"], 1)
    inputs["labels"][[0, 1, 4, 5]] = ignore_index
    given = {**inputs, "ignore_index": ignore_index, "z_loss": 0.01}
    _, ce, div = linear_ce_kl(**given)
    assert (ce[[0, 1, 4, 5]] == 0).all()
    assert (div[[0, 4]] != 0).all()
    assert_head_matches(given)


# ---- shapes --------------------------------------------------------------------------------------


@DIRECTIONS
def test_batches_of_sequences(direction: str) -> None:
    given = {**in_batches(head_inputs()), **METRICS, "direction": direction, "chunk_tokens": 4}
    metrics = assert_head_matches(given)
    assert metrics is not None
    assert metrics.lse.shape == metrics.entropy.shape == metrics.accuracy.shape == (2, 6)


def test_batches_need_not_be_contiguous() -> None:
    """Sequence first in memory, as Megatron keeps it."""
    inputs = in_batches(head_inputs())
    for name in ("policy_hidden", "reference_hidden"):
        moved = inputs[name].detach().transpose(0, 1).contiguous().transpose(0, 1)
        inputs[name] = moved.requires_grad_(name == "policy_hidden")
    assert_head_matches(inputs)


def test_shifted_labels() -> None:
    """Position s predicts label s + 1; the last one has no label, and here no KL weight either."""
    inputs = in_batches(head_inputs())
    generator = torch.Generator().manual_seed(4)
    inputs["labels"] = torch.randint(0, VOCAB, (2, 6), generator=generator)
    inputs["labels"][0, 3] = -100
    inputs["kl_weights"][:, -1] = 0.0
    inputs["policy_hidden"] = torch.nan_to_num(inputs["policy_hidden"].detach()).requires_grad_()
    assert_head_matches({**inputs, **METRICS, "shift": True, "chunk_tokens": 4})
    alone = {name: inputs[name] for name in ("policy_hidden", "policy_head", "labels")}
    alone["policy_hidden"] = alone["policy_hidden"].detach().clone().requires_grad_()
    alone["policy_head"] = alone["policy_head"].detach().clone().requires_grad_()
    given = {**alone, "shift": True, "reduction": "mean"}
    assert_head_matches(given)
    assert (grad_of(alone["policy_hidden"])[:, -1] == 0).all()
    assert (grad_of(alone["policy_hidden"])[0, 2] == 0).all()


# ---- reductions ----------------------------------------------------------------------------------


def test_mean() -> None:
    assert_head_matches({**head_inputs(), "reduction": "mean", "chunk_tokens": 4})


def test_the_mean_of_nothing_is_zero() -> None:
    inputs = {**head_inputs(), "ce_weights": torch.zeros(TOKENS), "kl_weights": torch.zeros(TOKENS)}
    loss, _, _ = linear_ce_kl(**inputs, reduction="mean")
    loss.backward()
    assert loss.item() == 0
    assert (grad_of(inputs["policy_hidden"]) == 0).all()


@pytest.mark.parametrize("is_batched", [False, True])
@DIRECTIONS
def test_no_reduction(direction: str, is_batched: bool) -> None:
    """Each token's loss, differentiable under any upstream vector."""
    inputs = with_biases(head_inputs())
    inputs = in_batches(inputs) if is_batched else inputs
    upstream = torch.randn(inputs["labels"].shape, generator=torch.Generator().manual_seed(8))
    upstream[..., ::5] = 0.0
    assert (upstream < 0).any()
    options = {"direction": direction, "reduction": "none", "chunk_tokens": 4, "z_loss": 0.01}
    assert linear_ce_kl(**inputs, **options)[0].shape == inputs["labels"].shape
    assert_head_matches({**inputs, **options}, upstream=upstream)


def test_no_reduction_and_the_sum_have_one_gradient() -> None:
    grads = []
    for reduction in ("none", "sum"):
        inputs = head_inputs()
        loss, _, _ = linear_ce_kl(**inputs, reduction=reduction, chunk_tokens=4)
        loss.sum().backward()
        grads.append([grad_of(inputs[name]) for name in ("policy_hidden", "policy_head")])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_no_reduction_survives_a_second_backward() -> None:
    inputs = head_inputs()
    loss, _, _ = linear_ce_kl(**inputs, reduction="none")
    upstream = torch.rand(TOKENS, generator=torch.Generator().manual_seed(9))
    first = torch.autograd.grad(loss, inputs["policy_head"], upstream, retain_graph=True)[0]
    second = torch.autograd.grad(loss, inputs["policy_head"], 2 * upstream)[0]
    torch.testing.assert_close(second, 2 * first, rtol=1e-6, atol=0)


def test_no_reduction_of_skipped_rows_under_an_infinite_upstream() -> None:
    """0 * inf: a row without weight never reaches a product, whatever comes down to it."""
    inputs = head_inputs()
    loss, _, _ = linear_ce_kl(**inputs, reduction="none")
    skipped = (inputs["ce_weights"] == 0) & (inputs["kl_weights"] == 0)
    assert (loss[skipped] == 0).all()
    loss.backward(torch.where(skipped, torch.inf, 1.0))
    assert (grad_of(inputs["policy_hidden"])[skipped] == 0).all()
    want = head_truth(inputs)
    assert_close(grad_of(inputs["policy_head"]), want.grad_head, relative=GRADIENT)


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_heads_memory_changes_nothing(reduction: str) -> None:
    """Few and many tokens' gradients collected before a product with the head."""
    results = []
    for head_bytes in (1, 5 * VOCAB * 4, 1 << 30):
        inputs = head_inputs()
        given = {**inputs, "head_bytes": head_bytes, "chunk_tokens": 3, "reduction": reduction}
        assert_head_matches(given)
        results.append([grad_of(inputs[name]) for name in ("policy_hidden", "policy_head")])
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)


# ---- the other doors -----------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_is_torchs(reduction: str) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, requires_grad=True)
    head = (torch.randn(VOCAB, HIDDEN, generator=generator) * 0.5).requires_grad_()
    bias = torch.randn(VOCAB, generator=generator, requires_grad=True)
    labels = torch.randint(0, 500, (TOKENS,), generator=generator)
    labels[::4] = -100
    options = {"softcap": 6.0, "logit_scale": 0.7, "vocab_size": 500, "z_loss": 1e-3}
    upstream = torch.randn(TOKENS if reduction == "none" else (), generator=generator)
    loss = linear_cross_entropy(
        hidden, head, labels, bias=bias, reduction=reduction, **options, chunk_tokens=4
    )
    (loss * upstream).sum().backward()
    got = [loss, grad_of(hidden), grad_of(head), grad_of(bias)]
    doubles = [tensor.detach().double().requires_grad_() for tensor in (hidden, head, bias)]
    logits = functional.linear(doubles[0], doubles[1], doubles[2])[:, :500] * 0.7
    logits = 6.0 * torch.tanh(logits / 6.0)
    each = functional.cross_entropy(logits, labels, reduction="none")
    each = each + 1e-3 * logits.logsumexp(-1) ** 2 * (labels != -100)
    want = {"mean": each.sum() / (labels != -100).sum(), "sum": each.sum(), "none": each}[reduction]
    (want * upstream.double()).sum().backward()
    assert_close(got[0], want.detach().numpy())
    for ours, theirs in zip(got[1:], doubles, strict=True):
        assert_close(ours, grad_of(theirs).numpy(), relative=GRADIENT)


def test_linear_cross_entropy_of_shifted_batches() -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 9, HIDDEN, generator=generator, requires_grad=True)
    head = torch.randn(VOCAB, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCAB, (2, 9), generator=generator)
    labels[1, 3] = -100
    loss, metrics = linear_cross_entropy(hidden, head, labels, shift=True, **METRICS)
    loss.backward()
    double = hidden.detach().double().requires_grad_()
    logits = (double @ head.double().T)[:, :-1].reshape(-1, VOCAB)
    want = functional.cross_entropy(logits, labels[:, 1:].reshape(-1))
    want.backward()
    assert_close(loss, want.item())
    assert_close(grad_of(hidden), grad_of(double).numpy(), relative=GRADIENT)
    given = {"policy_hidden": hidden, "policy_head": head, "labels": labels, "shift": True}
    truth = head_truth(given)
    for name in ("lse", "entropy", "accuracy"):
        assert_close(getattr(metrics, name), getattr(truth, name), what=name)


def test_module_holds_the_options() -> None:
    inputs = with_biases(head_inputs())
    options = {
        "direction": "jsd",
        "beta": 0.3,
        "temperature": 2.0,
        "z_loss": 0.01,
        "policy_softcap": 8.0,
        "chunk_tokens": 4,
        "reduction": "mean",
        **METRICS,
    }
    module = LinearCEKL(**options)
    assert not list(module.parameters())
    tensors = dict(inputs)
    positional = [tensors.pop(name) for name in ("policy_hidden", "policy_head", "labels")]
    loss, ce, div, metrics = module(*positional, **tensors)
    loss.backward()
    want = head_truth({**inputs, **options})
    assert_close(loss, want.loss)
    assert_close(ce, want.ce)
    assert_close(div, want.divergence)
    assert_close(metrics.entropy, want.entropy)
    assert_close(grad_of(inputs["policy_hidden"]), want.grad_hidden, relative=GRADIENT)
    assert_close(grad_of(inputs["policy_bias"]), want.grad_bias, relative=GRADIENT)
    assert "jsd" in repr(module)


# ---- together ------------------------------------------------------------------------------------


@DIRECTIONS
def test_everything_at_once(direction: str) -> None:
    inputs = with_biases(head_inputs())
    inputs["labels"] = torch.where(inputs["labels"] >= 0, inputs["labels"] % 500, -100)
    options = {
        "direction": direction,
        "beta": 0.3,
        "temperature": 0.7,
        "policy_softcap": 6.0,
        "reference_softcap": 9.0,
        "policy_logit_scale": 0.8,
        "reference_logit_scale": 1.2,
        "z_loss": 0.02,
        "vocab_size": 500,
        "chunk_tokens": 3,
        "head_bytes": 16 * VOCAB * 4,
        "reduction": "mean",
        **METRICS,
    }
    assert_head_matches({**inputs, **options})
    assert (grad_of(inputs["policy_head"])[500:] == 0).all()
    assert (grad_of(inputs["policy_bias"])[500:] == 0).all()


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `linear_ce_kl`: any options, at sizes that an interpreter can afford."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    vocab, width = draw(st.integers(2, 300)), draw(st.integers(1, 6))
    shape = draw(st.sampled_from([(1,), (5,), (1, 4), (2, 3)]))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator) * 1.5

    def weights() -> Tensor:
        kept = torch.rand(shape, generator=generator) < 0.7
        return torch.where(kept, torch.rand(shape, generator=generator) + 0.1, 0.0)

    def optional(strategy: st.SearchStrategy[Any]) -> Any:
        return draw(st.none() | strategy)

    vocab_size = optional(st.integers(1, vocab))
    tokens = vocab_size or vocab
    labels = torch.randint(0, tokens, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.2] = -100
    kl_weights = weights()
    shift = len(shape) == 2 and draw(st.booleans())
    if shift:
        kl_weights[:, -1] = 0.0
    given: dict[str, Any] = {
        "policy_hidden": normal(*shape, width).requires_grad_(),
        "policy_head": normal(vocab, width).requires_grad_(),
        "policy_bias": normal(vocab).requires_grad_() if draw(st.booleans()) else None,
        "labels": labels,
        "ce_weights": optional(st.just(weights())),
        "policy_softcap": optional(st.floats(1.0, 10.0)),
        "policy_logit_scale": draw(st.sampled_from([1.0, 0.3, 2.0])),
        "temperature": draw(st.sampled_from([1.0, 0.7, 2.5])),
        "z_loss": draw(st.sampled_from([0.0, 0.05])),
        "vocab_size": vocab_size,
        "chunk_tokens": optional(st.integers(1, 4)),
        "head_bytes": optional(st.sampled_from([1, 4000])),
        "reduction": draw(st.sampled_from(["sum", "mean", "none"])),
        "shift": shift,
        **{name: draw(st.booleans()) for name in METRICS},
    }
    teacher = draw(st.sampled_from(["none", "hidden", "topk"]))
    if teacher != "none":
        given["kl_weights"] = kl_weights
    if teacher == "hidden":
        given |= {
            "direction": draw(st.sampled_from(oracle.DIRECTIONS)),
            "beta": draw(st.floats(0.05, 0.95)),
            "reference_hidden": normal(*shape, 3),
            "reference_head": normal(vocab, 3),
            "reference_bias": normal(vocab) if draw(st.booleans()) else None,
            "reference_softcap": optional(st.floats(1.0, 10.0)),
            "reference_logit_scale": draw(st.sampled_from([1.0, 1.5])),
        }
    elif teacher == "topk":
        k = draw(st.integers(1, min(tokens, 6)))
        order = torch.rand(*shape, tokens, generator=generator).argsort(-1)
        given["reference_topk"] = TopK(ids=order[..., :k], logits=normal(*shape, k))
    return given


@settings(max_examples=20, deadline=None)
@given(call=calls())
def test_any_options_together(call: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    is_vector = call["reduction"] == "none"
    upstream = torch.randn(call["labels"].shape if is_vector else (), generator=generator)
    # Differences of terms near 10 in a loss near 0: float32 leaves them 1e-6 of the terms.
    assert_head_matches(call, upstream=upstream, grad_relative=2 * GRADIENT)


# ---- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_hidden_low", [False, True])
def test_autocast_takes_operands_in_its_dtype(is_hidden_low: bool) -> None:
    """Float32 parameters under bfloat16 autocast: products of bfloat16, all results in float32.

    Without it every product of the head would be a float32 one, which is ten times slower on a GPU.
    """
    inputs = head_inputs()
    explicit = {
        name: value.detach().bfloat16()
        for name, value in inputs.items()
        if name.endswith(("hidden", "head"))
    }
    for name in ("policy_hidden", "policy_head"):
        explicit[name].requires_grad_()
    if is_hidden_low:  # as a layer before the head, run under autocast, gives them
        for name in ("policy_hidden", "reference_hidden"):
            low = inputs[name].detach().bfloat16()
            inputs[name] = low.requires_grad_(name == "policy_hidden")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, ce, div = linear_ce_kl(**inputs, chunk_tokens=3)
    (loss * 3).backward()
    want_loss, want_ce, want_div = linear_ce_kl(**{**inputs, **explicit}, chunk_tokens=3)
    (want_loss * 3).backward()
    assert loss.dtype == ce.dtype == div.dtype == torch.float32
    assert_close(loss, want_loss.item())
    assert_close(ce, as_truth(want_ce))
    assert_close(div, as_truth(want_div))
    exact = head_truth(inputs)
    assert np.abs(as_truth(ce) - exact.ce).max() > 1e-4  # the operands were rounded
    for name in ("policy_hidden", "policy_head"):
        assert grad_of(inputs[name]).dtype == inputs[name].dtype
        want = torch.nan_to_num(grad_of(explicit[name]).double())
        got = torch.nan_to_num(grad_of(inputs[name]).double())
        assert torch.linalg.norm(got - want) < 2**-8 * torch.linalg.norm(want)


def test_autocast_of_masked_kl_stays_in_float32() -> None:
    x, y, weights = logits_pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, div = masked_kl(x, y, weights)
    loss.backward()
    want, want_div, want_grad = kl_truth(x, y, weights, "forward")
    assert loss.dtype == div.dtype == grad_of(x).dtype == torch.float32
    assert_close(loss, want)
    assert_close(div, want_div)
    assert_close(grad_of(x), want_grad, relative=GRADIENT)


# ---- graphs --------------------------------------------------------------------------------------


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at inputs
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_head_inside_a_full_graph(reduction: str) -> None:
    inputs = head_inputs()
    hidden, head = inputs.pop("policy_hidden"), inputs.pop("policy_head")
    options = {"reduction": reduction, "direction": "jsd", "policy_softcap": 8.0, **METRICS}

    def caller(hidden: Tensor, head: Tensor, **tensors: Tensor) -> Any:
        loss, ce, div, metrics = linear_ce_kl(hidden * 2, head, **tensors, **options)
        return loss * 3, ce, div, metrics.lse

    results = []
    for call in (caller, compiled(caller)):
        outputs = call(hidden, head, **inputs)
        outputs[0].sum().backward()
        grads = [grad_of(hidden).clone(), grad_of(head).clone()]
        results.append([tensor.detach() for tensor in outputs] + grads)
        hidden.grad = head.grad = None
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_masked_kl_inside_a_full_graph() -> None:
    x, y, weights = logits_pair()

    def caller(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        loss, div = masked_kl(x * 0.5, y, weights, direction="reverse", temperature=0.7)
        return loss * 3, div

    results = []
    for call in (caller, compiled(caller)):
        loss, div = call(x, y, weights)
        loss.backward()
        results.append([loss.detach(), div, grad_of(x).clone()])
        x.grad = None
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)


# ---- what crosses to the device ------------------------------------------------------------------


def test_host_data_crosses_in_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sketch on the CPU: weights, report and order go through `selection.to_device`, once.

    The copies themselves are counted on a GPU, in gpu/test_host_copies.py.
    """
    from safereg_kernels import selection

    if not hasattr(selection, "to_device"):
        pytest.skip("selection.to_device is not there yet")
    copies: list[Any] = []
    original = selection.to_device

    def counted(*arguments: Any, **options: Any) -> Any:
        copies.append(arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(selection, "to_device", counted)
    report = torch.arange(TOKENS) % 4 == 2
    inputs = head_inputs()
    inputs["labels"] = inputs["labels"].clamp(min=0)
    linear_ce_kl(**inputs, ce_report=report, chunk_tokens=4)[0].backward()
    assert len(copies) <= 1


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_an_invalid_label_is_never_a_plausible_number(
    reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where values are not looked at (CUDA): a NaN loss, and no finite gradient of that row."""
    monkeypatch.setattr("safereg_kernels.checks._looks_at_values", lambda tensor: False)
    inputs = head_inputs()
    inputs["labels"][0], inputs["labels"][4] = VOCAB, -7
    loss, ce, _ = linear_ce_kl(**inputs, reduction=reduction)
    loss.sum().backward()
    bad = torch.zeros(TOKENS, dtype=torch.bool)
    bad[[0, 4]] = True
    assert torch.isnan(loss.sum())
    if reduction == "none":
        assert (torch.isnan(loss) == bad).all()
    assert (torch.isnan(ce) == bad).all()
    rows = grad_of(inputs["policy_hidden"])
    assert torch.isnan(rows[bad]).all()
    assert torch.isfinite(rows[~bad]).all()
    assert torch.isnan(grad_of(inputs["policy_head"])).all()


TOPK = TopK(ids=torch.zeros(TOKENS, 2, dtype=torch.int64), logits=torch.zeros(TOKENS, 2))
NO_REFERENCE = {"reference_hidden": None, "reference_head": None}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"direction": "jsd", "beta": 0.0}, ValueError, "beta"),
        ({"direction": "jsd", "beta": 1.0}, ValueError, "beta"),
        ({"direction": "jsd", "beta": float("nan")}, ValueError, "beta"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"policy_logit_scale": 0.0}, ValueError, "policy_logit_scale"),
        ({"reference_logit_scale": float("inf")}, ValueError, "reference_logit_scale"),
        ({"reference_softcap": -1.0}, ValueError, "reference_softcap"),
        ({"z_loss": -0.1}, ValueError, "z_loss"),
        ({"head_bytes": 0}, ValueError, "head_bytes"),
        ({"reduction": "average"}, ValueError, "reduction"),
        ({"shift": True}, ShapeError, "shift"),
        ({"reference_topk": TOPK}, ValueError, "reference_topk"),  # two references
        ({"reference_topk": TOPK, "direction": "reverse", **NO_REFERENCE}, ValueError, "forward"),
        (
            {"reference_topk": TopK(TOPK.ids[:3], TOPK.logits[:3]), **NO_REFERENCE},
            ShapeError,
            "reference_topk",
        ),
        (
            {"reference_topk": TopK(TOPK.ids, TOPK.logits[:, :1]), **NO_REFERENCE},
            ShapeError,
            "reference_topk",
        ),
        (
            {"reference_topk": TopK(TOPK.ids + VOCAB, TOPK.logits), **NO_REFERENCE},
            ValueError,
            "reference_topk",
        ),
        ({"reference_lse": torch.zeros(TOKENS + 1)}, ShapeError, "reference_lse"),
        ({"ce_report": torch.zeros(1, TOKENS, dtype=torch.bool)}, ShapeError, "ce_report"),
        (NO_REFERENCE, ShapeError, "reference_hidden"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_options_that_are_refused(change: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message) as refusal:
        linear_ce_kl(**{**head_inputs(), **change})
    assert len(str(refusal.value)) > 40, "a refusal says what to do"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"direction": "jsd", "beta": 1.5}, ValueError, "beta"),
        ({"policy_softcap": 0.0}, ValueError, "policy_softcap"),
        ({"policy_logit_scale": -1.0}, ValueError, "policy_logit_scale"),
        ({"reference_lse": torch.zeros(3)}, ShapeError, "reference_lse"),
        ({"weights": torch.ones(1, TOKENS)}, ShapeError, "weights"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_options_of_masked_kl_that_are_refused(
    change: dict[str, Any], error: type, message: str
) -> None:
    x, y, weights = logits_pair()
    with pytest.raises(error, match=message):
        masked_kl(**{"policy_logits": x, "reference_logits": y, "weights": weights, **change})
