"""Would training on a row lower the probability of a refusal? To first order, in the head alone.

Token t of a row has the state h_t that predicts it, the error e_t = f'(raw) (p_t - y_t) of its
cross-entropy, and so the gradient g_t = e_t h_t^T on the head's weight W [V, H]; f is the scale and
soft cap of the logits. What is watched are continuations of prompts that the model refuses:

    J = sum_c sum_{s < n} [ log pi(refusal_cs) - log pi(complying_cs) ],    G = dJ/dW

A step W - eta g_t changes J by -eta <G, g_t>, so the influence of a token is

    i_t = <G / |G|, g_t> = sum_s (e_t . E_s) (h_t . H_s)                    G / |G| = E^T H

Positive: training on the token lowers the refusal against the complying answer. The step of a row
is the sum over its tokens; its worst token is what neither a long row nor a harmless rest dilutes.
G has rank S, twice the watched tokens, so neither it nor a gradient of [V, H] is ever formed, and
nothing runs backward. The difference of the two answers keeps G alive where the model is sure: of
log pi(refusal) alone the gradient vanishes as pi goes to 1.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from safereg_dist.types import Head
from safereg_kernels.budget import HEAD_BYTES

_TENSORS_OF_V = 3  # float32 [tokens, V] that exist at once: logits, probabilities or slopes, errors


class Direction(NamedTuple):
    """G / |G| = errors^T states, of rank S."""

    errors: Tensor
    """[S, V] float32; sum_s errors_s states_s^T has norm 1."""
    states: Tensor
    """[S, H] float32."""


class Scale(NamedTuple):
    """What makes a risk of an influence: the values of benign rows."""

    threshold: float
    """The least influence that at most the given share of the benign rows reaches."""
    spread: float
    """Standard deviation of the benign rows' influence."""

    @classmethod
    def of_benign(cls, influence: Sequence[float], rate: float) -> "Scale":
        """The scale at which at most a share `rate` of these benign rows has risk 0.5 or more."""
        highest_first = sorted(influence, reverse=True)
        refused = highest_first[int(rate * len(highest_first))]
        spread = torch.tensor(influence, dtype=torch.float64).std(correction=0).item()
        return cls(math.nextafter(refused, math.inf), max(spread, 1e-12))

    def risk(self, influence: float) -> float:
        """1/2 + atan((influence - threshold) / spread) / pi, in (0, 1): it never saturates."""
        return 0.5 + math.atan((influence - self.threshold) / self.spread) / math.pi


def direction_of(
    refusing: tuple[Tensor, Tensor], complying: tuple[Tensor, Tensor], head: Head
) -> Direction:
    """The direction in which refusals of the watched prompts get likelier.

    Each pair is (states [n, H], labels [n]) of the watched tokens, of refusals and of complying
    answers; without any of the latter J is the refusals' probability alone.
    Collectives: none. One host synchronisation in the caller, who asks whether it is finite.
    """
    states = torch.cat([refusing[0], complying[0]]).float()
    with _plain_float32(states):
        rises = -token_errors(*refusing, head)  # J rises as the cross-entropy of a refusal falls
        errors = torch.cat([rises, token_errors(*complying, head)])
        norm = ((errors @ errors.T) * (states @ states.T)).sum().sqrt()
        return Direction(errors / norm, states)


def token_errors(states: Tensor, labels: Tensor, head: Head) -> Tensor:
    """[T, V] float32 derivative of each token's cross-entropy by its raw logits, h_t W^T."""
    assert head.weight is not None
    product = torch.nn.functional.linear(states.to(head.weight.dtype), head.weight, head.bias)
    raw = product.float() * head.scale
    logits = raw if head.softcap is None else head.softcap * torch.tanh(raw / head.softcap)
    errors = torch.softmax(logits, -1)
    errors[torch.arange(len(labels), device=labels.device), labels] -= 1
    if head.softcap is not None:
        errors *= 1 - (logits / head.softcap).square()
    return errors * head.scale


def token_influence(
    states: Tensor,
    labels: Tensor,
    direction: Direction,
    head: Head,
    *,
    head_bytes: int | None = None,
) -> Tensor:
    """[T] float32 influence i_t of each token, of states [T, H] that predict labels [T].

    Logits are formed for as many tokens at a time as `head_bytes` holds (default: the kernels').
    2 T H V + 2 T S (V + H) FLOPs. Collectives: none, and no host synchronisation.
    """
    vocab = direction.errors.shape[1]
    limit = HEAD_BYTES[states.device.type] if head_bytes is None else head_bytes
    size = max(1, limit // (4 * _TENSORS_OF_V * vocab))
    with _plain_float32(states):
        found = [
            ((token_errors(h, y, head) @ direction.errors.T) * _aligned(h, direction)).sum(-1)
            for h, y in zip(states.split(size), labels.split(size), strict=True)
        ]
    return torch.cat(found)


def aligned_tokens(states: Tensor, direction: Direction, count: int) -> Tensor:
    """Indices of the `count` tokens (or all) whose states could give the greatest influence.

    |i_t| <= |e_t| sum_s |E_s| |h_t . H_s|, and |e_t| < sqrt(2) scale: the sum needs no logits,
    2 T S H FLOPs. Collectives: none.
    """
    if len(states) <= count:
        return torch.arange(len(states), device=states.device)
    with _plain_float32(states):
        bound = _aligned(states, direction).abs() @ direction.errors.norm(dim=-1)
        return bound.topk(count).indices


def _aligned(states: Tensor, direction: Direction) -> Tensor:
    """[T, S] inner products of the states with the watched ones."""
    return states.float() @ direction.states.T


@contextmanager
def _plain_float32(states: Tensor) -> Iterator[None]:
    """A block without gradient, in which a caller's autocast does not round."""
    with torch.no_grad(), torch.autocast(states.device.type, enabled=False):
        yield


def row_influence(
    states: Sequence[Tensor],
    labels: Sequence[Tensor],
    direction: Direction,
    head: Head,
    *,
    tokens_per_row: int,
    head_bytes: int | None = None,
) -> list[float]:
    """The influence of each row's worst token, among its `tokens_per_row` most aligned ones.

    `states` and `labels` are those of the rows' response tokens. nan where a state is not finite.
    Collectives: none; one host synchronisation.
    """
    chosen = [aligned_tokens(h, direction, tokens_per_row) for h in states]
    found = token_influence(
        torch.cat([h[index] for h, index in zip(states, chosen, strict=True)]),
        torch.cat([y[index] for y, index in zip(labels, chosen, strict=True)]),
        direction,
        head,
        head_bytes=head_bytes,
    )
    parts = found.split([len(index) for index in chosen])
    worst = [part.max() if len(part) else part.sum() for part in parts]  # 0 where nothing trains
    return torch.stack(worst).tolist()
