"""Claimed: the realignment is the optimal-transport map between two Gaussians, it undoes an affine
drift, ranks together find what one process finds, and the monitor counts what NumPy counts.

The judge is scipy's matrix square root in float64. Rounds: float32 sums, 1e-3 relative.
"""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from safereg_dist.parallel.comm import Ranks
from safereg_dist.risk.realign import Moments

ALONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), dp_group=None)
H = 7


def samples(count, *, seed):
    draw = np.random.default_rng(seed)
    mixing = draw.normal(size=(H, H))
    return draw.normal(size=(count, H)) @ mixing + draw.normal(size=H)


def shrunk_covariance(states):
    covariance = np.cov(states.T, bias=True)
    a = H / (H + len(states))
    return (1 - a) * covariance + a * np.trace(covariance) / H * np.eye(H)


def oracle(policy, reference, x):
    p, r = shrunk_covariance(policy), shrunk_covariance(reference)
    root = sqrtm(p).real
    inverse = np.linalg.inv(root)
    matrix = inverse @ sqrtm(root @ r @ root).real @ inverse
    return reference.mean(0) + (x - policy.mean(0)) @ matrix


def moments_of(policy, reference, pieces=1):
    moments = Moments(torch.zeros(H))
    for p, r in zip(np.array_split(policy, pieces), np.array_split(reference, pieces), strict=True):
        moments.add(torch.tensor(p), torch.tensor(r))
    return moments


@pytest.mark.parametrize("count", [3, 41, 500])
def test_the_map_is_the_equation(count):
    policy, reference = samples(count, seed=0), samples(count, seed=1)
    realign = moments_of(policy, reference, pieces=3).realignment(ALONE)
    x = samples(19, seed=0)
    expected = oracle(policy, reference, x)
    got = realign(torch.tensor(x)).numpy()
    assert got == pytest.approx(expected, rel=2e-3, abs=2e-3 * np.abs(expected).max())


def test_a_feature_with_a_large_mean_keeps_its_variance():
    states = samples(4000, seed=2)
    far = np.zeros(H)
    far[3] = 3000.0  # as the massive activations of large models
    moments = Moments(torch.tensor(far))
    moments.add(torch.tensor(1.3 * states + far), torch.tensor(states + far))
    back = moments.realignment(ALONE)(torch.tensor(1.3 * states + far)).numpy()
    assert np.abs(back - (states + far)).max() < 0.01


def test_it_undoes_an_affine_drift():
    reference = samples(20_000, seed=2)
    draw = np.random.default_rng(3)
    half = draw.normal(size=(H, H)) / 3
    stretch = np.eye(H) + half @ half.T  # symmetric: what a transport map can undo
    policy = reference @ stretch + draw.normal(size=H)
    realign = moments_of(policy, reference).realignment(ALONE)
    back = realign(torch.tensor(policy)).numpy()
    scale = reference.std()
    assert np.abs(policy - reference).mean() > 0.2 * scale
    assert np.abs(back - reference).mean() < 0.01 * scale


def test_equal_sides_stay_where_they_are():
    states = samples(60, seed=4)
    realign = moments_of(states, states).realignment(ALONE)
    got = realign(torch.tensor(states)).numpy()
    assert got == pytest.approx(states, rel=1e-3, abs=1e-3 * np.abs(states).max())


def test_rows_that_are_not_finite_are_left_out():
    policy, reference = samples(50, seed=5), samples(50, seed=6)
    spoilt, other_side = policy.copy(), reference.copy()
    spoilt[3, 2] = np.nan
    spoilt[9] = np.inf
    other_side[20, 1] = np.nan
    keep = np.setdiff1d(np.arange(50), [3, 9, 20])
    a = moments_of(spoilt, other_side).realignment(ALONE)
    b = moments_of(policy[keep], reference[keep]).realignment(ALONE)
    for mine, other in zip(a, b, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)


def test_old_states_are_forgotten():
    old, new, reference = samples(200, seed=7), samples(200, seed=8), samples(200, seed=9)
    moments = moments_of(old, reference)
    moments.realignment(ALONE)
    for _ in range(40):
        moments.add(torch.tensor(new), torch.tensor(reference))
        realign = moments.realignment(ALONE)
    assert realign.policy_mean.numpy() == pytest.approx(new.mean(0), rel=1e-3, abs=1e-3)


def test_state_goes_through_a_checkpoint():
    before = moments_of(samples(30, seed=1), samples(30, seed=2))
    first = before.realignment(ALONE)
    after = Moments(torch.zeros(H))
    assert after.map() is None
    after.load_state(before.state())
    for mine, other in zip(first, after.map(), strict=True):
        assert torch.equal(mine, other)
