"""Maps states of a policy back onto those of its reference, without labels.

Pooled states of the same rows have a mean and a covariance under each model. Of all maps from one
Gaussian to the other, the optimal transport map, which moves states least, is

    x' = mu_r + A (x - mu_p),    A = S_p^{-1/2} (S_p^{1/2} S_r S_p^{1/2})^{1/2} S_p^{-1/2}

(Knott and Smith 1984). With fewer rows than features the covariances are shrunk toward a multiple
of the identity, S <- (1 - a) S + a tr(S)/H I with a = H / (H + n).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from safereg_dist.parallel.comm import Ranks

_MEMORY = 0.8
"""Decay of the sums of earlier checks: the policy changes, so old states are outdated."""
_KEYS = ("count", "policy_sum", "policy_outer", "reference_sum", "reference_outer")


class Realignment(NamedTuple):
    """The affine map from policy states to reference states after one check."""

    policy_mean: Tensor
    reference_mean: Tensor
    matrix: Tensor

    def __call__(self, pooled: Tensor) -> Tensor:
        """[N, H] float32 realigned states of [N, H] of any float dtype."""
        return self.reference_mean + (pooled.float() - self.policy_mean) @ self.matrix


class Moments:
    """Decayed sums over the states of both models; the same on every rank once reduced."""

    def __init__(self, center: Tensor) -> None:
        """`center` [H] is near the means of both models' states, on their device.

        Sums are taken around it: a few features of large models have means of thousands, whose
        squares would cancel the variance in float32.
        """
        self._center = center.float()
        size, device = center.numel(), center.device
        shapes = ((1,), (size,), (size, size), (size,), (size, size))
        self._known = [torch.zeros(shape, device=device) for shape in shapes]
        self._new = [torch.zeros(shape, device=device) for shape in shapes]

    def add(self, policy: Tensor, reference: Tensor) -> None:
        """Adds this rank's [N, H] states of both models; skips rows that are not finite."""
        policy, reference = policy.float() - self._center, reference.float() - self._center
        keep = (policy.isfinite() & reference.isfinite()).all(dim=1, keepdim=True)
        policy, reference = policy.masked_fill(~keep, 0.0), reference.masked_fill(~keep, 0.0)
        self._new[0] += keep.sum()
        for at, states in ((1, policy), (3, reference)):
            self._new[at] += states.sum(0)
            self._new[at + 1] += states.T @ states

    def realignment(self, ranks: Ranks) -> Realignment | None:
        """Reduces the new sums over ranks; returns the map, or None from fewer than two rows.

        Collectives: one SUM of 2 H^2 + 2 H + 1 float32.
        """
        flat = ranks.sum_(torch.cat([part.reshape(-1) for part in self._new]))
        pieces = flat.split([part.numel() for part in self._new])
        for known, new, piece in zip(self._known, self._new, pieces, strict=True):
            known.mul_(_MEMORY).add_(piece.reshape(known.shape))
            new.zero_()
        return self.map()

    def map(self) -> Realignment | None:
        """The map computed from the sums; None from fewer than two rows. Collectives: none."""
        count = float(self._known[0])
        if count < 2:
            return None
        policy_mean, policy = self._mean_and_covariance(1, count)
        reference_mean, reference = self._mean_and_covariance(3, count)
        root = _power(policy, 0.5)
        inverse = _power(policy, -0.5)
        matrix = inverse @ _power(root @ reference @ root, 0.5) @ inverse
        center = self._center
        return Realignment(center + policy_mean, center + reference_mean, matrix.float())

    def _mean_and_covariance(self, at: int, count: float) -> tuple[Tensor, Tensor]:
        mean = self._known[at] / count
        covariance = (self._known[at + 1] / count).double() - torch.outer(mean, mean).double()
        size = mean.numel()
        shrink = size / (size + count)
        level = covariance.diagonal().mean().clamp_min(1e-12)
        identity = torch.eye(size, dtype=torch.float64, device=mean.device)
        return mean, (1 - shrink) * covariance + shrink * level * identity

    def state(self) -> dict[str, Tensor]:
        """The sums, for the checkpoint."""
        return dict(zip(_KEYS, self._known, strict=True))

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `state` gave."""
        for known, name in zip(self._known, _KEYS, strict=True):
            known.copy_(tensors[name])


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """Power of a symmetric positive semi-definite matrix, float64."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    # Smaller eigenvalues are rounding errors, which a negative power would amplify.
    values = values.clamp_min(values.max() * 1e-10)
    return (vectors * values**exponent) @ vectors.T
