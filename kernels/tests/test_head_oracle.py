"""The oracle itself: its hand-derived gradients against central differences, and known values.

Claimed: every gradient in head_oracle.py is the derivative of its value, with every option, and
device_truth.py, the gate's judge, says the same. Exact: rows that take no part. May
round: central differences in float64 with a step of 1e-5 agree to about 1e-9 of the gradient's
scale.
"""

from typing import Any

import head_oracle as oracle
import numpy as np
import pytest
import torch
from device_truth import Formula, rows_of_logits
from head_oracle import central_differences

DIRECTIONS = pytest.mark.parametrize("direction", oracle.DIRECTIONS)


# ---- of logits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("beta", [0.5, 0.1])
@DIRECTIONS
def test_divergence_gradient_is_the_derivative(
    direction: str, beta: float, temperature: float
) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 3, 11)) * 3
    how = (direction, temperature, beta)
    got = oracle.divergence_grad(x, y, *how)
    want = central_differences(lambda z: oracle.divergence(z, y, *how).sum(), x)
    np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-9)


@DIRECTIONS
def test_divergence_gradient_with_suppressed_tokens(direction: str) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 2, 9))
    x[:, 4] = y[:, 4] = -np.inf
    live = np.isfinite(x[0])

    def value(z: np.ndarray) -> float:
        full = x.copy()
        full[:, live] = z
        return oracle.divergence(full, y, direction).sum()

    got = oracle.divergence_grad(x, y, direction)
    np.testing.assert_allclose(got[:, live], central_differences(value, x[:, live]), atol=1e-9)
    assert (got[:, 4] == 0).all()


@pytest.mark.parametrize(
    ("value", "grad"),
    [
        (oracle.z_loss, oracle.z_loss_grad),
        (
            lambda z: oracle.cross_entropy(z, np.array([0, 6, 3, 3])),
            lambda z: oracle.cross_entropy_grad(z, np.array([0, 6, 3, 3])),
        ),
        (lambda z: oracle.transformed(z, 0.3, 2.0), lambda z: oracle.transformed_grad(z, 0.3, 2.0)),
        (lambda z: oracle.transformed(z, 0.3), lambda z: oracle.transformed_grad(z, 0.3)),
    ],
    ids=["z_loss", "cross_entropy", "soft cap", "scale"],
)
def test_other_gradients_are_the_derivatives(value: Any, grad: Any) -> None:
    x = np.random.default_rng(2).normal(size=(4, 7)) * 2
    want = central_differences(lambda z: value(z).sum(), x)
    np.testing.assert_allclose(grad(x), want, rtol=1e-7, atol=1e-9)


def test_known_values() -> None:
    x, y = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.25, 0.5]])
    forward = 0.25 * np.log(0.5) + 0.5 * np.log(2)
    np.testing.assert_allclose(oracle.softmax(x + 7.0), [[0.5, 0.25, 0.25]])
    np.testing.assert_allclose(oracle.divergence(x, y, "forward"), [forward])
    np.testing.assert_allclose(oracle.divergence(y, x, "reverse"), [forward])
    u = np.array([np.log(2), 0.0, -np.log(2)])  # already centred
    np.testing.assert_allclose(oracle.divergence(x, y, "l2"), [(u**2).mean()])
    half = 0.5 * np.log(4 / 3) + 0.25 * np.log(2 / 3)  # KL of either to the mixture
    np.testing.assert_allclose(oracle.divergence(x, y, "jsd"), [half])
    np.testing.assert_allclose(oracle.cross_entropy(x, np.array([1])), [np.log(4)])
    np.testing.assert_allclose(oracle.entropy(x), [0.5 * np.log(2) + 0.5 * np.log(4)])
    np.testing.assert_allclose(oracle.log_sum_exp(x + 7.0), [7.0])
    np.testing.assert_allclose(oracle.transformed([10.0], 0.5, 2.0), [2.0 * np.tanh(2.5)])
    tied = np.array([[1.0, 1.0, 0.0]] * 3)
    np.testing.assert_array_equal(oracle.is_label_largest(tied, np.arange(3)), [1.0, 1.0, 0.0])


@pytest.mark.parametrize("beta", [1e-7, 1 - 1e-7])
def test_mixtures_tend_to_either_divergence(beta: float) -> None:
    """jsd / beta -> KL(q||p) for beta -> 0, and jsd / (1 - beta) -> KL(p||q) for beta -> 1."""
    x, y = np.random.default_rng(3).normal(size=(2, 4, 9))
    got = oracle.divergence(x, y, "jsd", 1.0, beta) / min(beta, 1 - beta)
    want = oracle.divergence(x, y, "forward" if beta < 0.5 else "reverse")
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_token_the_policy_forbids_makes_forward_kl_infinite() -> None:
    x, y = np.array([[0.0, -np.inf]]), np.array([[0.0, 0.0]])
    assert oracle.divergence(x, y, "forward") == np.inf
    np.testing.assert_allclose(oracle.divergence(x, y, "reverse"), [np.log(2)])
    jsd = 0.25 * np.log(2 / 3) + 0.25 * np.log(2) + 0.5 * np.log(4 / 3)  # m = (3/4, 1/4)
    np.testing.assert_allclose(oracle.divergence(x, y, "jsd"), [jsd])


@pytest.mark.parametrize("label", [-1, 3, -100])
def test_a_label_that_is_no_token_is_nan(label: int) -> None:
    x, labels = np.zeros((2, 3)), np.array([label, 0])
    assert np.isnan(oracle.cross_entropy(x, labels)).tolist() == [True, False]
    assert np.isnan(oracle.cross_entropy_grad(x, labels)).all(1).tolist() == [True, False]


# ---- of hidden states ----------------------------------------------------------------------------


def head_case(seed: int = 4) -> dict[str, Any]:
    """Rows of every kind: both, CE only, KL only, neither, and both again."""
    rng = np.random.default_rng(seed)
    return {
        "hidden": rng.normal(size=(5, 3)),
        "head": rng.normal(size=(7, 3)),
        "labels": rng.integers(0, 5, 5),
        "ce_weights": np.array([0.7, 1.3, 0.0, 0.0, 0.4]),
        "kl_weights": np.array([0.9, 0.0, 0.6, 0.0, 1.1]),
        "reference_hidden": rng.normal(size=(5, 2)),
        "reference_head": rng.normal(size=(7, 2)),
        "bias": rng.normal(size=7),
        "reference_bias": rng.normal(size=7),
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 2.0, "logit_scale": 0.6, "temperature": 0.7},
        {"reference_softcap": 1.5, "reference_logit_scale": 2.0, "temperature": 2.5},
        {"vocab_size": 5, "z_loss": 0.1, "reduction": "mean"},
        {"reduction": "none", "upstream": np.array([1.0, -2.0, 0.0, 3.0, 0.5]), "z_loss": 0.02},
    ],
    ids=str,
)
@DIRECTIONS
def test_head_gradients_are_the_derivatives(direction: str, options: dict[str, Any]) -> None:
    case = {**head_case(), **options, "direction": direction, "beta": 0.3}
    upstream = case.get("upstream", 1.0)
    got = oracle.linear_ce_kl(**case)
    for name, grad in (
        ("hidden", got.grad_hidden),
        ("head", got.grad_head),
        ("bias", got.grad_bias),
    ):

        def value(moved: np.ndarray, name: str = name) -> float:
            return float(np.sum(upstream * oracle.linear_ce_kl(**{**case, name: moved}).loss))

        want = central_differences(value, case[name])
        np.testing.assert_allclose(grad, want, rtol=1e-6, atol=1e-8, err_msg=name)


def test_a_teacher_of_all_tokens_is_the_reference() -> None:
    case = head_case()
    want = oracle.linear_ce_kl(**case, temperature=0.7)
    logits = case.pop("reference_hidden") @ case.pop("reference_head").T + case["reference_bias"]
    ids = np.argsort(-logits, axis=1)
    topk = (ids, np.take_along_axis(logits, ids, axis=1))
    got = oracle.linear_ce_kl(**case, reference_topk=topk, temperature=0.7)
    for name, ours, theirs in zip(got._fields, got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12, err_msg=name)


def test_a_teacher_of_one_token_is_a_label() -> None:
    """Forward KL to one token is the cross-entropy of that token: q is certain, its entropy 0."""
    case = head_case()
    topk = (case["labels"][:, None], np.full((5, 1), 3.0))
    given = {**case, "ce_weights": np.zeros(5), "reference_hidden": None, "reference_head": None}
    got = oracle.linear_ce_kl(**given, reference_topk=topk)
    want = oracle.linear_ce_kl(**{**case, "ce_weights": case["kl_weights"], "kl_weights": None})
    np.testing.assert_allclose(got.loss, want.loss)
    np.testing.assert_allclose(got.grad_hidden, want.grad_hidden, atol=1e-12)


def test_a_shift_moves_labels_alone() -> None:
    rng = np.random.default_rng(5)
    hidden, head = rng.normal(size=(2, 4, 3)), rng.normal(size=(7, 3))
    labels = rng.integers(0, 7, (2, 4))
    labels[1, 2] = -100
    weights = rng.random((2, 4)) + 0.1
    got = oracle.linear_ce_kl(hidden, head, labels, ce_weights=weights, shift=True)
    flat = oracle.linear_ce_kl(
        hidden[:, :3].reshape(6, 3), head, labels[:, 1:].ravel(), ce_weights=weights[:, :3].ravel()
    )
    np.testing.assert_allclose(got.loss, flat.loss)
    np.testing.assert_allclose(got.ce[:, :3].ravel(), flat.ce)
    np.testing.assert_allclose(got.grad_hidden[:, :3].reshape(6, 3), flat.grad_hidden)
    np.testing.assert_allclose(got.grad_head, flat.grad_head)
    assert (got.ce[:, 3] == 0).all()
    assert (got.grad_hidden[:, 3] == 0).all()
    assert got.ce[1, 1] == got.lse[1, 1] == 0


def test_reductions_differ_by_their_count_alone() -> None:
    case = head_case()
    total = oracle.linear_ce_kl(**case)
    mean = oracle.linear_ce_kl(**case, reduction="mean")
    none = oracle.linear_ce_kl(**case, reduction="none")
    np.testing.assert_allclose(mean.loss, total.loss / 4)  # one row has no weight
    np.testing.assert_allclose(mean.grad_head, total.grad_head / 4)
    np.testing.assert_allclose(np.sum(none.loss), total.loss)
    np.testing.assert_allclose(none.grad_head, total.grad_head)
    nothing = {**case, "ce_weights": np.zeros(5), "kl_weights": np.zeros(5)}
    assert oracle.linear_ce_kl(**nothing, reduction="mean").loss == 0


def test_reported_rows_show_and_do_not_count() -> None:
    case = head_case()
    got = oracle.linear_ce_kl(**case, ce_report=np.array([False, False, True, True, False]))
    want = oracle.linear_ce_kl(**case)
    assert (got.ce != 0).all()
    assert (got.lse != 0).all()
    assert (want.ce[2:4] == 0).all()
    assert want.lse[2] != 0  # it has a KL weight, so its logits are there
    assert want.lse[3] == want.entropy[3] == want.accuracy[3] == 0
    assert got.loss == want.loss
    np.testing.assert_array_equal(got.grad_hidden, want.grad_hidden)


def test_an_invalid_label_poisons_its_row() -> None:
    case = head_case()
    case["labels"][1] = 7
    got = oracle.linear_ce_kl(**case)
    assert np.isnan(got.loss)
    assert np.isnan(got.ce).tolist() == [False, True, False, False, False]
    assert np.isnan(got.grad_hidden).all(1).tolist() == [False, True, False, False, False]
    assert np.isnan(got.grad_head).all()


# ---- the gate's judge ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "z_loss": 0.1, "vocab_size": 9},
        {"policy_softcap": 2.0, "policy_logit_scale": 0.6, "reference_softcap": 3.0},
        {"reference_logit_scale": 1.7, "temperature": 2.5, "beta": 0.2},
    ],
    ids=str,
)
@DIRECTIONS
def test_the_truth_on_a_device_is_the_oracles(direction: str, options: dict[str, Any]) -> None:
    """The head is the identity, so hidden states are logits; row 3 has no weight, and is NaN."""
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(2, 5, 11)) * 2
    x[3] = np.nan
    labels, case = rng.integers(0, 9, 5), head_case()
    weights = {name: case[name] for name in ("ce_weights", "kl_weights")}
    got = rows_of_logits(
        *(torch.from_numpy(array) for array in (x, y, labels, *weights.values())),
        Formula(direction=direction, **options),
    )
    renamed = {name.removeprefix("policy_"): value for name, value in options.items()}
    want = oracle.linear_ce_kl(
        *(x, np.eye(11), labels),
        **weights,
        reference_hidden=y,
        reference_head=np.eye(11),
        direction=direction,
        reduction="none",
        **renamed,
    )
    for name in ("loss", "ce", "divergence", "lse", "entropy"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got.grad, want.grad_hidden, rtol=1e-10, atol=1e-12)
