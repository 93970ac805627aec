"""Claimed: the figures of a hold-out are scikit-learn's, weighted or not; a bootstrap draw is the
figure of the rows drawn, and draws near-duplicates together; its intervals hold what they say;
near-duplicates are what comparing all pairs finds; and isotonic calibration is scikit-learn's.

Exact up to 1e-9: figures. Statistical: coverage of the intervals (400 data sets, wide bounds).
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as judge
from sklearn.isotonic import IsotonicRegression

from safereg_dist.probe_lab.calibration import fit_isotonic
from safereg_dist.probe_lab.near_duplicates import near_duplicate_groups
from safereg_dist.probe_lab.scores import auroc, bootstrap, interval, measure, spread
from safereg_dist.risk.probe import Probe

ROWS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.05, 0.1, 0.5, 0.55, 0.9, 1.0]),
        st.booleans(),
        st.integers(1, 4),
    ),
    min_size=2,
    max_size=30,
).filter(lambda rows: 0 < sum(label for _, label, _ in rows) < len(rows))


def recall_by_hand(p, y, w, rate):
    """Best recall over all thresholds whose weighted false-positive rate stays within `rate`."""
    best = 0.0
    for threshold in {*p, 2.0}:
        flagged = p >= threshold
        if (w * (flagged & ~y)).sum() <= rate * (w * ~y).sum() + 1e-9:
            best = max(best, (w * (flagged & y)).sum() / (w * y).sum())
    return best


def calibration_by_hand(p, y, w):
    total = 0.0
    for low in range(10):
        inside = (p >= low / 10) & ((p < (low + 1) / 10) | (low == 9))
        total += abs((w * inside * (p - y)).sum())
    return total / w.sum()


@settings(deadline=None)
@given(ROWS)
def test_weighted_figures(rows):
    p, y, w = (np.array(column) for column in zip(*rows, strict=True))
    got = {k: float(v[0]) for k, v in measure(p, y, w[None].astype(float), threshold=0.5).items()}
    flagged = p >= 0.5
    expected = {
        "auroc": judge.roc_auc_score(y, p, sample_weight=w),
        "average_precision": judge.average_precision_score(y, p, sample_weight=w),
        "brier": judge.brier_score_loss(y, p, sample_weight=w),
        "recall_at_fpr_1": recall_by_hand(p, y, w, 0.01),
        "recall_at_fpr_5": recall_by_hand(p, y, w, 0.05),
        "calibration_error": calibration_by_hand(p, y, w),
        "recall": (w * (flagged & y)).sum() / (w * y).sum(),
        "false_positive_rate": (w * (flagged & ~y)).sum() / (w * ~y).sum(),
    }
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, abs=1e-9), name


def test_log_loss_is_weighted_too():
    draw = np.random.default_rng(0)
    p, y, w = draw.uniform(0.01, 0.99, 40), draw.random(40) < 0.4, draw.integers(1, 5, 40)
    got = measure(p, y, w[None].astype(float), threshold=0.5)["log_loss"][0]
    assert got == pytest.approx(judge.log_loss(y, p, sample_weight=w), abs=1e-9)


def test_a_bootstrap_draw_is_the_figure_of_the_rows_drawn():
    draw = np.random.default_rng(3)
    p, y, group = draw.random(60), draw.random(60) < 0.5, draw.integers(0, 25, 60) * 7
    got = bootstrap(p, y, group, threshold=0.4, draws=20, seed=5)
    names, inverse = np.unique(group, return_inverse=True)
    counts = np.random.default_rng(5).multinomial(
        len(names), np.full(len(names), 1 / len(names)), size=20
    )
    for number in range(20):
        rows = np.repeat(np.arange(60), counts[number][inverse])
        assert got["auroc"][number] == pytest.approx(auroc(p[rows], y[rows]), abs=1e-9)
        assert got["brier"][number] == pytest.approx(
            judge.brier_score_loss(y[rows], p[rows]), abs=1e-9
        )


def test_near_duplicates_widen_the_interval_as_they_should():
    """Each row copied nine times says no more than the rows themselves do."""
    draw = np.random.default_rng(1)
    y = draw.random(80) < 0.5
    p = np.clip(draw.normal(0.4 + 0.2 * y, 0.2), 0, 1)
    own = np.arange(80)
    once = bootstrap(p, y, own, threshold=0.5, draws=600, seed=0)["auroc"]
    copies = [np.tile(part, 9) for part in (p, y, own)]
    together = bootstrap(*copies, threshold=0.5, draws=600, seed=0)["auroc"]
    apart = bootstrap(*copies[:2], np.arange(720), threshold=0.5, draws=600, seed=0)["auroc"]
    assert spread(together) == pytest.approx(spread(once), rel=1e-9)
    assert spread(apart) == pytest.approx(spread(once) / 3, rel=0.2)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    truth = 0.5 * (1 + math.erf(1.0 / 2))  # P(N(1, 1) > N(0, 1))
    held = 0
    for seed in range(400):
        draw = np.random.default_rng(seed)
        y = np.arange(120) % 2 == 0
        scores = draw.normal(size=120) + y
        p = 1 / (1 + np.exp(-scores))  # figures take probabilities; AUROC only asks for the order
        drawn = bootstrap(p, y, np.arange(120), threshold=0.5, draws=150, seed=seed)
        low, high = interval(drawn["auroc"])
        held += low <= truth <= high
    assert 0.89 <= held / 400 <= 0.98


def test_intervals_without_an_answer():
    assert all(math.isnan(v) for v in interval(np.full(5, np.nan)))
    assert interval(np.array([0.25, np.nan, 0.25])) == (0.25, 0.25)
    assert spread(np.full(3, np.nan)) == 0.0


# Near-duplicates


def by_comparing_all(texts):
    """Connected parts of the graph of pairs with Jaccard >= 0.8 over word triples."""

    def parts(text):
        words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        return frozenset(tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2)))

    sets = [parts(text) for text in texts]
    group = list(range(len(texts)))
    for a, b in itertools.combinations(range(len(texts)), 2):
        if len(sets[a] & sets[b]) >= 0.8 * len(sets[a] | sets[b]):
            old, new = sorted((group[a], group[b]))[::-1]
            group = [new if g == old else g for g in group]
    return group


def test_near_duplicates_are_those_that_comparing_all_pairs_finds():
    draw = np.random.default_rng(7)
    words = [f"word{i}" for i in range(400)]
    texts = []
    for _ in range(60):
        base = list(draw.choice(words, size=draw.integers(1, 40)))
        for _ in range(draw.integers(1, 5)):  # a chain: each differs a little from the one before
            base = base.copy()
            if draw.random() < 0.7:
                base[draw.integers(len(base))] = str(draw.choice(words))
            texts.append(" ".join(base))
    texts += ["", "!!!", "Word1, WORD2?", "word1 word2", texts[5].upper()]
    order = draw.permutation(len(texts))
    texts = [texts[i] for i in order]
    groups = near_duplicate_groups(texts).tolist()
    assert groups == by_comparing_all(texts)
    assert len(set(groups)) < len(texts) - 10
    assert len(set(groups)) > 60


@pytest.mark.parametrize("count", [0, 1])
def test_few_texts(count):
    assert near_duplicate_groups(["one"] * count).tolist() == [0] * count


# Isotonic calibration


@pytest.mark.parametrize("kind", ["noisy", "separated", "one value"])
def test_isotonic_knots_are_the_judge_s(kind):
    draw = np.random.default_rng(2)
    logits = draw.normal(size=150)
    labels = draw.random(150) < 1 / (1 + np.exp(-3 * logits))
    if kind == "separated":
        labels = logits > 0.3
    if kind == "one value":
        logits = np.zeros(150)
    x, y = fit_isotonic(torch.from_numpy(logits), torch.from_numpy(labels).double())
    n, m = labels.sum(), (~labels).sum()
    fitted = IsotonicRegression(y_min=1 / (m + 2), y_max=(n + 1) / (n + 2), out_of_bounds="clip")
    fitted.fit(logits, labels)
    probe = Probe(
        layer=1,
        pooling="mean_prompt",
        mean=torch.zeros(1),
        scale=torch.ones(1),
        weight=torch.ones(1),
        bias=0.0,
        threshold=0.5,
        fingerprint="",
        knots_x=x,
        knots_y=y,
    )
    at = np.concatenate([logits, np.linspace(-4, 4, 101)])
    got = probe.probability(torch.from_numpy(at)[:, None]).numpy()
    # Between two steps both interpolate; a knot's own rounding may move a steep step by a row.
    assert np.quantile(np.abs(got - fitted.predict(at)), 0.95) < 1e-4
    assert (np.diff(got[150:]) >= 0).all()
    assert 0 < got.min() <= got.max() < 1
