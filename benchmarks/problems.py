"""What the losses are measured on, and what they should give: float64 on the same inputs.

The loss is that of all rows; its gradients are those of some rows of the hidden states (or logits)
and of some rows of the head, labels and the last tokens of the vocabulary among them. Everything is
written from the definitions and shares no code with the losses. A gap is the norm of a difference
over the norm of what is expected; that of a loss is the largest of its parts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

AGREES_WITHIN = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Gap up to which an implementation computes the same thing: those that round logits to bfloat16,
or sum the head's gradient in it, are some percent off."""
OURS_WITHIN = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""The same of ours: a bfloat16 gradient is rounded to 8 bits, which is 0.2 to 0.3 %."""
_SAMPLED_ROWS, _SAMPLED_TOKENS = 64, 256
_ROWS_AT_A_TIME = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsProblem:
    """Sum over rows of the divergence between two sets of logits, times 1 / N."""

    policy: Tensor
    """[N, V], differentiable."""
    reference: Tensor
    weights: Tensor
    """[N], all 1 / N."""
    direction: str

    @property
    def leaves(self) -> list[Tensor]:
        """What a gradient is wanted of."""
        return [self.policy]

    @classmethod
    def random(
        cls, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, direction: str
    ) -> "LogitsProblem":
        """Logits of standard deviation 2 of two unlike models."""
        policy, reference = (
            torch.randn(shape, device=device, dtype=dtype).mul_(2) for _ in range(2)
        )
        return cls(
            policy=policy.requires_grad_(),
            reference=reference,
            weights=torch.full(shape[:1], 1 / shape[0], device=device),
            direction=direction,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearProblem:
    """1 / N times the sum of the cross-entropy of all rows and of KL(q||p) of the active rows."""

    hidden: Tensor
    """[N, H], differentiable."""
    head: Tensor
    """[V, H], differentiable where it is trained."""
    reference_hidden: Tensor
    reference_head: Tensor
    labels: Tensor
    ce_weights: Tensor
    """[N] on the CPU, so that counting rows does not wait for the device."""
    kl_weights: Tensor
    """The same, 0 where a row is not active."""
    active: Tensor
    """Numbers of the active rows, for peers that know no weights."""
    chunk_tokens: int | None
    """Tokens a chunk for those that work in chunks; None = each one's default."""

    @property
    def leaves(self) -> list[Tensor]:
        """What a gradient is wanted of."""
        return [tensor for tensor in (self.hidden, self.head) if tensor.requires_grad]

    @property
    def is_dense(self) -> bool:
        """True where every row is active."""
        return len(self.active) == len(self.labels)

    @property
    def num_products(self) -> float:
        """Products of N x V x H that no implementation can do without."""
        return 2 + self.head.requires_grad + len(self.active) / len(self.labels)

    @classmethod
    def random(
        cls,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        num_active: int,
        is_trained: bool,
        chunk_tokens: int | None,
    ) -> "LinearProblem":
        """A problem of (N, V, H): logits of two unlike models, of standard deviation 2."""
        tokens, vocab, width = shape

        def normal(rows: int, std: float) -> Tensor:
            return torch.randn(rows, width, device=device, dtype=dtype).mul_(std)

        active = torch.randperm(tokens)[:num_active].sort().values
        weights = torch.full((tokens,), 1 / tokens)
        return cls(
            hidden=normal(tokens, 1).requires_grad_(),
            head=normal(vocab, 2 / width**0.5).requires_grad_(is_trained),
            reference_hidden=normal(tokens, 1),
            reference_head=normal(vocab, 2 / width**0.5),
            labels=torch.randint(vocab, (tokens,), device=device),
            ce_weights=weights,
            kl_weights=torch.zeros(tokens).index_copy_(0, active, weights[active]),
            active=active.to(device),
            chunk_tokens=chunk_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """Loss and sampled gradients of a problem, in float64."""

    loss: Tensor
    parts: list[tuple[int, Tensor, Tensor]]
    """(which leaf, numbers of its rows, their gradients)."""

    def gap(self, loss: Tensor, gradients: Sequence[Tensor]) -> float:
        """The largest gap of loss and gradients; nan or inf where one is not finite."""
        gaps = [relative_gap(loss, self.loss)]
        gaps += [relative_gap(gradients[leaf][at], grad) for leaf, at, grad in self.parts]
        return float(torch.tensor(gaps).max())  # which is nan where one is


def relative_gap(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference by the norm of what is expected."""
    gap, size = (torch.linalg.vector_norm(t.double()) for t in (found - expected, expected))
    return float(gap / size)


def divergence_of(x: Tensor, y: Tensor, direction: str) -> Tensor:
    """Divergence of each row between softmax(x) and softmax(y), by its definition."""
    a, b = x.log_softmax(-1), y.log_softmax(-1)

    def kl(u: Tensor, w: Tensor) -> Tensor:
        return (u.exp() * (u - w)).sum(-1)

    if direction == "jsd":
        m = ((a.exp() + b.exp()) / 2).log()
        return (kl(a, m) + kl(b, m)) / 2
    return kl(b, a) if direction == "forward" else kl(a, b)


def truth_of(problem: LogitsProblem | LinearProblem) -> Truth:
    """Of either problem, a few rows at a time."""
    if isinstance(problem, LogitsProblem):
        return _truth_of_logits(problem)
    return _truth_of_linear(problem)


def _truth_of_logits(problem: LogitsProblem) -> Truth:
    count = len(problem.policy)
    loss = problem.policy.new_zeros((), dtype=torch.float64)
    for rows in _blocks(count):
        x, y = problem.policy.detach()[rows].double(), problem.reference[rows].double()
        loss += divergence_of(x, y, problem.direction).sum() / count
    sample = _spread(count, _SAMPLED_ROWS, problem.policy.device)
    x = problem.policy.detach()[sample].double().requires_grad_()
    value = divergence_of(x, problem.reference[sample].double(), problem.direction).sum() / count
    (grad,) = torch.autograd.grad(value, x)
    return Truth(loss=loss, parts=[(0, sample, grad)])


@torch.no_grad()
def _truth_of_linear(problem: LinearProblem) -> Truth:
    device = problem.hidden.device
    hidden, head = problem.hidden.double(), problem.head.double()
    theirs = problem.reference_hidden.double(), problem.reference_head.double()
    weights = problem.ce_weights.to(device).double(), problem.kl_weights.to(device).double()
    sample = _spread(len(hidden), _SAMPLED_ROWS, device)
    is_sampled = torch.zeros(len(hidden), dtype=torch.bool, device=device).index_fill_(0, sample, 1)
    labelled = problem.labels[_spread(len(hidden), _SAMPLED_TOKENS, device)].unique()
    others = _spread(len(head), _SAMPLED_TOKENS, device)
    tokens = torch.cat([labelled, others])
    loss, of_head = hidden.new_zeros(()), hidden.new_zeros(len(tokens), hidden.shape[1])
    of_hidden = []
    for rows in _blocks(len(hidden)):
        share, grad = _ce_and_kl(
            hidden[rows] @ head.T,
            theirs[0][rows] @ theirs[1].T,
            problem.labels[rows],
            weights[0][rows, None],
            weights[1][rows, None],
        )
        loss += share
        of_hidden.append(grad[is_sampled[rows]] @ head)
        of_head += grad[:, tokens].T @ hidden[rows]
    parts = [(0, sample, torch.cat(of_hidden))]
    if problem.head.requires_grad:
        # Rows of labels are larger by far: apart, so that they do not hide what the others lack.
        parts += [
            (1, labelled, of_head[: len(labelled)]),
            (1, others, of_head[len(labelled) :]),
        ]
    return Truth(loss=loss, parts=parts)


def _ce_and_kl(
    x: Tensor, y: Tensor, labels: Tensor, ce_weights: Tensor, kl_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Share of the loss, and its gradient in the logits x."""
    a, b = x.log_softmax(-1), y.log_softmax(-1)
    p, q = a.exp(), b.exp()
    chosen = a.gather(1, labels[:, None])
    loss = (kl_weights * (q * (b - a))).sum() - (ce_weights * chosen).sum()
    grad = (ce_weights + kl_weights) * p - kl_weights * q
    return loss, grad.scatter_add_(1, labels[:, None], -ce_weights)


def _blocks(count: int) -> Iterator[slice]:
    yield from (slice(i, min(i + _ROWS_AT_A_TIME, count)) for i in range(0, count, _ROWS_AT_A_TIME))


def _spread(count: int, wanted: int, device: torch.device) -> Tensor:
    """So many numbers below `count`, evenly spread, the first and the last among them."""
    return torch.linspace(0, count - 1, min(wanted, count), device=device).round().long().unique()
