"""The oracle of a step: its hand-derived gradients against central differences, and known values.

Claimed: every gradient in tests/oracles.py is the derivative of its value; the schedules and
weights give what the equations give by hand. Exact: schedules at their break points. May round:
central differences in float64 with a step of 1e-5 agree to about 1e-9 of the gradient's scale.
"""

import numpy as np
import pytest
from head_oracle import central_differences
from support import oracles


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
