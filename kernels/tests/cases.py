"""Inputs of the tests, what the oracle says of them, and how close is close enough."""

import os
from typing import Any

import head_oracle as oracle
import numpy as np
import pytest
import torch
from torch import Tensor

from safereg_kernels import TokenMetrics, linear_ce_kl

FULL = os.environ.get("SAFEREG_TESTS") == "full"
"""Every combination of what is varied; else each value in a few of them."""
TOKENS, VOCAB, HIDDEN, REFERENCE_HIDDEN = 13, 509, 24, 17
GRADIENT = 4e-5
"""Relative error of a float32 gradient: a logit of magnitude 20 is itself off by 1e-6, and
p (a - b - KL) is a difference of numbers as large."""
DIRECTIONS = pytest.mark.parametrize("direction", oracle.DIRECTIONS)

_RENAMED = {
    "policy_hidden": "hidden",
    "policy_head": "head",
    "policy_bias": "bias",
    "policy_softcap": "softcap",
    "policy_logit_scale": "logit_scale",
}
_WITHOUT_MEANING = {"chunk_tokens", "head_bytes", "logits_dtype", "is_difference", "reference_lse"}
"""Arguments of `linear_ce_kl` that never change what is computed."""


def as_truth(tensor: Tensor) -> np.ndarray:
    """The same numbers in float64 NumPy."""
    return tensor.detach().double().numpy()


def grad_of(tensor: Tensor) -> Tensor:
    """The gradient, which must be there."""
    assert tensor.grad is not None
    return tensor.grad


def assert_close(
    got: Tensor, want: Any, *, relative: float = 1e-5, absolute: float = 1e-9, what: str = ""
) -> None:
    """Elementwise within `relative` of the element plus `relative` of 10 % of the largest one.

    The second part: an element that is a difference of larger terms is no more exact than they are.
    """
    want = np.asarray(want)
    scale = np.abs(want[np.isfinite(want)]).max(initial=0.0)
    np.testing.assert_allclose(
        as_truth(got), want, rtol=relative, atol=relative * 0.1 * scale + absolute, err_msg=what
    )


# ---- masked_kl ---------------------------------------------------------------------------------


def logits_pair(
    dtype: torch.dtype = torch.float32, seed: int = 0, tokens: int = TOKENS
) -> tuple[Tensor, Tensor, Tensor]:
    """Policy and reference logits with NaN in skipped rows, and weights with zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(2, tokens, VOCAB, generator=generator) * 4).to(dtype)
    weights = torch.rand(tokens, generator=generator) + 0.1
    weights[::3] = 0.0
    x[weights == 0] = float("nan")
    y[weights == 0] = float("nan")
    return x.requires_grad_(), y, weights


def kl_truth(
    x: Tensor,
    y: Tensor,
    weights: Tensor,
    direction: str,
    temperature: float = 1.0,
    beta: float = 0.5,
    policy_transform: tuple[float, float | None] = (1.0, None),
    reference_transform: tuple[float, float | None] = (1.0, None),
) -> tuple[float, np.ndarray, np.ndarray]:
    """(loss, divergence of each token, gradient); a transform is (logit scale, soft cap)."""
    w, rows = as_truth(weights), as_truth(weights) != 0
    div, grad = np.zeros(w.shape), np.zeros(x.shape)
    raw = as_truth(x)[rows]
    policy = oracle.transformed(raw, *policy_transform)
    reference = oracle.transformed(as_truth(y)[rows], *reference_transform)
    how = (direction, temperature, beta)
    div[rows] = oracle.divergence(policy, reference, *how)
    grad[rows] = oracle.divergence_grad(policy, reference, *how)
    grad[rows] *= oracle.transformed_grad(raw, *policy_transform)
    return float((w * div).sum()), div, grad * w[..., None]


# ---- linear_ce_kl ------------------------------------------------------------------------------


def head_inputs(
    dtype: torch.dtype = torch.float32, seed: int = 0, tokens: int = TOKENS
) -> dict[str, Any]:
    """Arguments with rows of every kind: CE only, KL only, both, skipped; NaN where unread."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    ce_weights = torch.rand(tokens, generator=generator) + 0.1
    kl_weights = torch.rand(tokens, generator=generator) + 0.1
    ce_weights[torch.arange(tokens) % 4 >= 2] = 0.0
    kl_weights[torch.arange(tokens) % 4 % 2 == 1] = 0.0
    hidden, reference_hidden = normal(tokens, HIDDEN), normal(tokens, REFERENCE_HIDDEN)
    labels = torch.randint(0, VOCAB, (tokens,), generator=generator)
    labels[ce_weights == 0] = -100
    hidden[(ce_weights == 0) & (kl_weights == 0)] = torch.nan
    reference_hidden[kl_weights == 0] = torch.nan
    return {
        "policy_hidden": hidden.requires_grad_(),
        "policy_head": normal(VOCAB, HIDDEN, scale=0.5).requires_grad_(),
        "labels": labels,
        "ce_weights": ce_weights,
        "kl_weights": kl_weights,
        "reference_hidden": reference_hidden,
        "reference_head": normal(VOCAB, REFERENCE_HIDDEN, scale=0.5),
    }


def with_biases(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same with a bias of each head, the policy's trained."""
    generator = torch.Generator().manual_seed(5)
    return {
        **inputs,
        "policy_bias": torch.randn(VOCAB, generator=generator).requires_grad_(),
        "reference_bias": torch.randn(VOCAB, generator=generator),
    }


def head_truth(given: dict[str, Any], upstream: Tensor | float = 1.0) -> oracle.HeadResult:
    """What the arguments of a call of `linear_ce_kl` should yield."""
    arrays: dict[str, Any] = {}
    for name, value in given.items():
        if name in _WITHOUT_MEANING or name.startswith("return_") or value is None:
            continue
        if name == "reference_topk":
            value = (value.ids.numpy(), as_truth(value.logits))
        elif isinstance(value, Tensor):
            value = as_truth(value) if value.is_floating_point() else value.numpy()
        arrays[_RENAMED.get(name, name)] = value
    if isinstance(upstream, Tensor):
        upstream = as_truth(upstream)
    hidden, head, labels = (arrays.pop(name) for name in ("hidden", "head", "labels"))
    return oracle.linear_ce_kl(hidden, head, labels, **arrays, upstream=upstream)


def assert_head_matches(
    given: dict[str, Any],
    *,
    upstream: Tensor | float = 3.0,
    grad_relative: float = GRADIENT,
    absolute: float = 1e-9,
) -> TokenMetrics | None:
    """One call of `linear_ce_kl`, values and every gradient, against the oracle; its metrics."""

    def close(got: Tensor, want: np.ndarray, what: str, relative: float = 1e-5) -> None:
        assert_close(got, want, relative=relative, absolute=absolute, what=what)

    loss, ce, div, *metrics = linear_ce_kl(**given)
    (loss * upstream).sum().backward()
    want = head_truth(given, upstream)
    for name, got in (("loss", loss), ("ce", ce), ("divergence", div)):
        assert got.dtype == torch.float32, name
        assert got.requires_grad == (name == "loss"), name
        close(got, getattr(want, name), name)
    assert ce.shape == div.shape == given["labels"].shape
    for name, truth in (
        ("policy_hidden", want.grad_hidden),
        ("policy_head", want.grad_head),
        ("policy_bias", want.grad_bias),
    ):
        tensor = given.get(name)
        if tensor is None or not tensor.requires_grad:
            continue
        assert grad_of(tensor).dtype == tensor.dtype
        close(grad_of(tensor), truth, f"gradient of {name}", grad_relative)
    for got in metrics:
        for name in ("lse", "entropy", "accuracy"):
            if getattr(got, name) is not None:
                assert not getattr(got, name).requires_grad
                close(getattr(got, name), getattr(want, name), name)
    return metrics[0] if metrics else None
