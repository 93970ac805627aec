"""The oracle itself: its hand-derived gradients against central differences, and known values.

Claimed: every gradient in tests/oracles.py is the derivative of its value; the schedules and
weights give what the equations give by hand. Exact: schedules at their break points. May round:
central differences in float64 with a step of 1e-5 agree to about 1e-9 of the gradient's scale.
"""

from collections.abc import Callable

import numpy as np
import oracles
import pytest

STEP = 1e-5


def central_differences(value: Callable[[np.ndarray], float], at: np.ndarray) -> np.ndarray:
    grad = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[index] += STEP
        down[index] -= STEP
        grad[index] = (value(up) - value(down)) / (2 * STEP)
    return grad


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("direction", oracles.DIRECTIONS)
def test_divergence_gradient_is_the_derivative(direction: str, temperature: float) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 3, 11)) * 3
    got = oracles.divergence_grad(x, y, direction, temperature)
    want = central_differences(lambda z: oracles.divergence(z, y, direction, temperature).sum(), x)
    np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("direction", oracles.DIRECTIONS)
def test_divergence_gradient_with_suppressed_tokens(direction: str) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 2, 9))
    x[:, 4] = y[:, 4] = -np.inf
    live = np.isfinite(x[0])

    def value(z: np.ndarray) -> float:
        full = x.copy()
        full[:, live] = z
        return oracles.divergence(full, y, direction).sum()

    got = oracles.divergence_grad(x, y, direction)
    np.testing.assert_allclose(got[:, live], central_differences(value, x[:, live]), atol=1e-9)
    assert (got[:, 4] == 0).all()


def test_cross_entropy_gradient_is_the_derivative() -> None:
    rng = np.random.default_rng(2)
    x, labels = rng.normal(size=(4, 7)) * 2, np.array([0, 6, 3, 3])
    want = central_differences(lambda z: oracles.cross_entropy(z, labels).sum(), x)
    np.testing.assert_allclose(oracles.cross_entropy_grad(x, labels), want, rtol=1e-7, atol=1e-9)


def test_known_values() -> None:
    x, y = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.25, 0.5]])
    forward = 0.25 * np.log(0.5) + 0.5 * np.log(2)
    np.testing.assert_allclose(oracles.softmax(x + 7.0), [[0.5, 0.25, 0.25]])
    np.testing.assert_allclose(oracles.divergence(x, y, "forward"), [forward])
    np.testing.assert_allclose(oracles.divergence(y, x, "reverse"), [forward])
    u = np.array([np.log(2), 0.0, -np.log(2)])  # already centred
    np.testing.assert_allclose(oracles.divergence(x, y, "l2"), [(u**2).mean()])
    np.testing.assert_allclose(oracles.cross_entropy(x, np.array([1])), [np.log(4)])


def test_a_token_the_policy_forbids_makes_forward_kl_infinite() -> None:
    x, y = np.array([[0.0, -np.inf]]), np.array([[0.0, 0.0]])
    assert oracles.divergence(x, y, "forward") == np.inf
    np.testing.assert_allclose(oracles.divergence(x, y, "reverse"), [np.log(2)])


@pytest.mark.parametrize(
    ("schedule", "risk", "want"),
    [
        ("step", [0.0, 0.59, 0.6, 1.0], [0.1, 0.1, 0.9, 0.9]),
        ("threshold", [0.0, 0.6, 0.8, 1.0], [0.1, 0.1, 0.5, 0.9]),
        ("linear", [0.0, 0.5, 1.0], [0.1, 0.5, 0.9]),
        # Scores 1, 2.3, 3, 3.5, 4, 4.7, 5 of the official scale.
        (
            "clamp",
            [0.0, 0.325, 0.5, 0.625, 0.75, 0.925, 1.0],
            [0.1, 0.1, 1 / 3, 0.5, 2 / 3, 0.9, 0.9],
        ),
        (
            "sigmoid",
            [0.6, 0.0, 1.0],
            [0.5, 0.1 + 0.8 / (1 + np.exp(6)), 0.1 + 0.8 / (1 + np.exp(-4))],
        ),
    ],
)
def test_schedules_at_their_break_points(
    schedule: str, risk: list[float], want: list[float]
) -> None:
    got = oracles.coefficients(
        np.array(risk), schedule, threshold=0.6, floor=0.1, ceiling=0.9, slope=10.0
    )
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_a_threshold_of_one_still_reaches_the_ceiling() -> None:
    got = oracles.coefficients(np.array([0.99, 1.0]), "threshold", threshold=1.0)
    np.testing.assert_array_equal(got, [0.0, 1.0])


@pytest.mark.parametrize("direction", oracles.DIRECTIONS)
@pytest.mark.parametrize("objective", oracles.OBJECTIVES)
def test_step_loss_gradients_are_the_derivatives(objective: str, direction: str) -> None:
    rng = np.random.default_rng(3)
    hidden, head = rng.normal(size=(6, 3)), rng.normal(size=(5, 3))
    fixed = {
        "labels": rng.integers(0, 5, 6),
        "row_of_token": np.array([0, 0, 1, 2, 2, 3]),
        "kl_coef": np.array([0.0, 0.3, 1.0, 0.5]),
        "is_anchor": np.array([False, False, False, True]),
        "reference_hidden": rng.normal(size=(6, 2)),
        "reference_head": rng.normal(size=(5, 2)),
        "objective": objective,
        "direction": direction,
        "num_tokens": 9,
    }
    got = oracles.step_loss(hidden, head, **fixed)
    for name, want in (
        (
            "grad_hidden",
            central_differences(lambda h: oracles.step_loss(h, head, **fixed)["loss"], hidden),
        ),
        (
            "grad_head",
            central_differences(lambda w: oracles.step_loss(hidden, w, **fixed)["loss"], head),
        ),
    ):
        np.testing.assert_allclose(got[name], want, rtol=1e-7, atol=1e-9)


def test_step_loss_parts_by_hand() -> None:
    """One plain, one risky (b = 1) and one anchor token, N = 4 since another rank has one more."""
    hidden, head = np.eye(3), np.diag([1.0, 2.0, 3.0])
    labels, reference_head = np.array([0, 0, 0]), np.zeros((3, 3))
    rows, b = np.arange(3), np.array([0.0, 1.0, 0.2])
    anchor = np.array([False, False, True])
    got = oracles.step_loss(
        hidden, head, labels, rows, b, anchor, hidden, reference_head, num_tokens=4
    )
    ce = [np.log(np.exp([1, 0, 0]).sum()) - 1, np.log(np.exp([0, 2, 0]).sum())]
    div = [
        np.log(np.exp(v).sum()) - v[k] / 3 - np.log(3) for k, v in ((1, [0, 2, 0]), (2, [0, 0, 3]))
    ]
    assert got["task_loss"] == pytest.approx(np.mean(ce))
    assert got["divergence"] == pytest.approx(np.mean(div))
    assert got["loss"] == pytest.approx((ce[0] + div[0] + div[1]) / 4)
    np.testing.assert_array_equal(got["ce"][2], 0.0)
