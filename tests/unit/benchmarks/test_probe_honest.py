"""Claimed: the honest benchmark fits what it says, out of fold, and chooses by our own pairs alone.

The judges solve the same problems in the features instead of the kernel (float64 NumPy). Rounds:
1e-8. No real prompt and no public set is in here.
"""

import bench_probe_honest
import numpy as np
import pytest
from bench_probe_honest import OWN, TESTS, mark, measured, rows_of
from honest_attempts import (
    FOLDS,
    Rows,
    Scores,
    best,
    least_squares,
    least_squares_of,
    out_of_fold,
    pair_direction,
)

from safereg_dist.data.files import LabelledPrompt

PAIRS, ALONE, TESTED, H = 30, 40, 25, 6


@pytest.fixture
def rows():
    sets = np.repeat(["pairs", "refused", "xstest-safe"], [2 * PAIRS, ALONE, TESTED])
    fold = np.repeat(np.arange(PAIRS) % FOLDS, 2).tolist() + [n % FOLDS for n in range(ALONE)]
    harmful = np.arange(len(sets)) % 2 == 0
    return Rows(
        texts=[f"text {n}" for n in range(len(sets))],
        sets=sets,
        harmful=harmful,
        fold=np.array(fold + [-1] * TESTED),
        alike=np.arange(len(sets)),
        states={},
    )


@pytest.fixture
def features(rows):
    draw = np.random.default_rng(0)
    return draw.normal(size=(len(rows.texts), H)) + 0.8 * rows.harmful[:, None]


def ridge(x, harmful, penalty):
    """(w, b) of least sum of weighted squares + penalty |w|^2, in the features."""
    weight = np.where(harmful, 0.5 / harmful.mean(), 0.5 / (1 - harmful.mean()))
    target = np.where(harmful, 1.0, -1.0)
    one = np.column_stack([x, np.ones(len(x))])
    shrink = penalty * np.diag([1.0] * x.shape[1] + [0.0])
    solved = np.linalg.solve(one.T * weight @ one + shrink, one.T * weight @ target)
    return solved[:-1], solved[-1]


def test_least_squares_in_the_kernel_are_those_in_the_features(rows, features):
    inside, asked = np.arange(71), np.arange(60, 125)
    got = least_squares(features @ features.T, rows, 0.7)(inside, asked)
    weight, bias = ridge(features[inside], rows.harmful[inside], 0.7)
    np.testing.assert_allclose(got, features[asked] @ weight + bias, rtol=1e-8)
    again = least_squares_of(features, rows, 0.7 / H)(inside, asked)
    np.testing.assert_allclose(again, features[asked] @ weight + bias, rtol=1e-8)


@pytest.mark.parametrize("penalty", [None, 0.5])
def test_directions_of_pairs(rows, features, penalty):
    apart = features[: 2 * PAIRS : 2] - features[1 : 2 * PAIRS : 2]
    weight = apart.mean(0)
    if penalty is not None:
        inner = apart.T @ apart + penalty * np.eye(H)
        weight = np.linalg.solve(inner, apart.sum(0))
    got = pair_direction(features @ features.T, rows, penalty)(rows.pairs, np.arange(90, 125))
    np.testing.assert_allclose(got, features[90:125] @ weight, rtol=1e-8)


def test_no_fit_sees_the_fold_that_it_is_asked_about(rows):
    asked_of = []

    def fit(inside, asked):
        asked_of.append((set(inside.tolist()), set(asked.tolist())))
        return np.full(len(asked), float(len(asked_of)))

    fitted = np.flatnonzero(rows.fold >= 0)
    scores = out_of_fold(rows, fitted, fit)
    tested = set(np.flatnonzero(rows.fold < 0).tolist())
    for inside, _ in asked_of:
        assert not inside & tested
    for inside, asked in asked_of[1:]:
        assert not inside & asked
    assert set(scores[rows.fold < 0]) == {1.0}
    assert (scores[rows.fold >= 0] > 1).all()


def test_the_choice_hangs_on_our_pairs_alone(rows):
    good_on_pairs = np.where(rows.sets == "pairs", rows.harmful, ~rows.harmful).astype(float)
    good_elsewhere = 1 - good_on_pairs
    tried = iter([("elsewhere", good_elsewhere), ("pairs", good_on_pairs)])
    assert best(rows, tried).chosen == "pairs"


def test_what_is_picked_and_what_is_best_on_a_test():
    test, other = TESTS
    rows = [
        {"attempt": a, "test": t, "auroc": area, "recall_at_fpr_5": recall}
        for a, own, figures in (("a", 0.9, (0.2, 0.3)), ("b", 0.8, (0.6, 0.1)))
        for t, area, recall in ((OWN, own, 0.5), (test, 0.1, figures[0]), (other, 0.1, figures[1]))
    ]
    mark(rows)
    assert {row["attempt"] for row in rows if row["is_picked"]} == {"a"}
    top = {row["test"]: row["attempt"] for row in rows if row.get("is_best_on_test")}
    assert top == {test: "b", other: "a"}


def test_figures_are_those_of_the_scores(rows):
    scores = np.random.default_rng(2).normal(size=len(rows.texts)) * 50
    found = measured(rows, scores, OWN, rows.pairs)
    harmful, benign = scores[: 2 * PAIRS : 2], scores[1 : 2 * PAIRS : 2]
    assert found["auroc"] == pytest.approx(np.mean(harmful[:, None] > benign))
    assert found["pair_accuracy"] == pytest.approx(np.mean(harmful > benign))
    bar = np.sort(benign)[-2]  # one of 30 is under 5 %
    assert found["recall_at_fpr_5"] == pytest.approx(np.mean(harmful > bar))
    assert found["auroc_low"] < found["auroc"] < found["auroc_high"]


def test_pairs_share_a_fold_and_the_tests_have_none():
    def some(name, count, label, pair=None):
        return [
            LabelledPrompt(
                id=f"{name}{n}",
                messages=[{"role": "user", "content": f"{name} {n * n} about number {n}"}],
                label=label(n),
                response=None,
                pair=pair and str(n // 2),
            )
            for n in range(count)
        ]

    def either(n):
        return "benign" if n % 2 else "harmful"

    sets = {
        "pairs": some("pair", 40, either, pair=True),
        "refused": some("bad", 20, lambda n: "harmful"),
        "benign": some("good", 20, lambda n: "benign"),
        **{name: some(name, 10, either) for pair in TESTS.values() for name in pair},
    }
    prompts, rows = rows_of(sets)
    assert len(prompts) == len(rows.fold) == 120
    assert (rows.fold[:40:2] == rows.fold[1:40:2]).all()
    assert set(rows.fold[:80]) == set(range(FOLDS))
    assert (rows.fold[80:] == -1).all()
    assert not set(rows.sets[:80]) & {name for pair in TESTS.values() for name in pair}


def test_each_attempt_has_rows_of_both_tests(monkeypatch, rows):
    monkeypatch.setattr(bench_probe_honest, "TESTS", {"one": ("xstest-safe",), "two": ("pairs",)})
    scores = Scores(np.random.default_rng(0).normal(size=len(rows.texts)), "")
    found = list(bench_probe_honest.rows_of_tests(rows, scores.out_of_fold))
    assert [row["test"] for row in found] == ["one", "two"]
    assert [row["harmful"] + row["benign"] for row in found] == [TESTED, 2 * PAIRS]
