"""A classifier with one hidden layer of ReLU units, fitted in float32 by Adam."""

from typing import NamedTuple

import torch
from torch import Tensor

from safereg_dist.probe_lab.logistic import class_weights

UNITS = 32
PENALTY_GRID = (1e-3, 1e-2, 1e-1)
"""Candidates for the L2 penalty on both layers' weights, chosen by cross-validation."""
_STEPS = 300
_BATCH = 512
_RATE = 1e-2  # falls to 0 along a cosine


class Mlp(NamedTuple):
    """logit = weight . relu(hidden_weight z + hidden_bias) + bias."""

    hidden_weight: Tensor
    hidden_bias: Tensor
    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """[rows] of standardised features [rows, H]."""
        hidden = torch.relu(features.float() @ self.hidden_weight.T + self.hidden_bias)
        return hidden @ self.weight + self.bias


def fit_mlp(features: Tensor, labels: Tensor, l2: float, *, seed: int) -> Mlp:
    """The network with the least mean log loss + l2/2 |weights|^2, classes weighted equally.

    Adam over mini-batches drawn by `seed`; the minimum found is a local one.
    """
    features, labels = features.float(), labels.float()
    draw = torch.Generator().manual_seed(seed)
    size, device = features.shape[1], features.device
    start = (
        torch.randn(UNITS, size, generator=draw) / size**0.5,
        torch.zeros(UNITS),
        torch.randn(UNITS, generator=draw) / UNITS**0.5,
        torch.zeros(()),
    )
    network = Mlp(*(part.to(device).requires_grad_() for part in start))
    optimizer = torch.optim.Adam(network, lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    row_weight = class_weights(labels)
    for _ in range(_STEPS):
        rows = torch.randint(len(labels), (min(_BATCH, len(labels)),), generator=draw).to(device)
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            network.logits(features[rows]), labels[rows], weight=row_weight[rows]
        )
        penalty = network.hidden_weight.square().sum() + network.weight.square().sum()
        (loss + 0.5 * l2 * penalty).backward()
        optimizer.step()
        schedule.step()
    return Mlp(*(part.detach() for part in network))
