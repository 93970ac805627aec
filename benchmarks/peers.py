"""Other implementations of the same losses, from PyPI, behind one interface.

Each is a function from a `Problem` to a scalar loss whose gradients autograd takes; packages are
imported when asked for. One that cannot run gets a status in words, never a number:
`not installed`, `out of memory`, what it cannot express, or the class of its error.

Settings are each package's defaults. So the gradient of a bfloat16 head is summed over chunks in
float32 by ours and in bfloat16 by Liger, and Liger's chunked loss rounds logits to bfloat16.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from safereg_kernels import linear_ce_kl, masked_kl

OURS = "ours"


class CannotRunError(Exception):
    """The peer has no way to compute this; the message says why."""


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

    @property
    def is_dense(self) -> bool:
        """True where every row is active."""
        return len(self.active) == len(self.labels)


LogitsLoss = Callable[[LogitsProblem], Tensor]
LinearLoss = Callable[[LinearProblem], Tensor]


def status_of(error: Exception) -> str:
    """Why a peer has no figure, in a few words."""
    if isinstance(error, CannotRunError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name == "liger_kernel":
        return "not installed"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return type(error).__name__


def _ours_masked_kl(problem: LogitsProblem) -> Tensor:
    return masked_kl(
        problem.policy, problem.reference, problem.weights, direction=problem.direction
    )[0]


def _full_logits_kl(policy: Tensor, reference: Tensor, direction: str) -> Tensor:
    return _kl_sum(policy, reference, direction) / len(policy)


def _of_logits(function: Callable[[Tensor, Tensor, str], Tensor]) -> LogitsLoss:
    return lambda problem: function(problem.policy, problem.reference, problem.direction)


def _kl_sum(x: Tensor, y: Tensor, direction: str = "forward") -> Tensor:
    """Full log-probabilities in float32."""
    a, b = (log_softmax(logits, dim=-1, dtype=torch.float32) for logits in (x, y))
    first, second = (a, b) if direction == "forward" else (b, a)
    return kl_div(first, second, reduction="sum", log_target=True)


def _liger_kl_div() -> LogitsLoss:
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    loss = LigerKLDIVLoss(reduction="sum", log_target=True)

    def run(problem: LogitsProblem) -> Tensor:
        _need_cuda(problem.policy)
        if problem.direction != "forward":
            raise CannotRunError("gradient of the first argument only")
        a, b = (
            log_softmax(logits, dim=-1, dtype=torch.float32)
            for logits in (problem.policy, problem.reference)
        )
        return loss(a, b) / len(a)

    return run


def _ours_linear(problem: LinearProblem) -> Tensor:
    return linear_ce_kl(
        problem.hidden,
        problem.head,
        problem.labels,
        ce_weights=problem.ce_weights,
        kl_weights=problem.kl_weights,
        reference_hidden=problem.reference_hidden,
        reference_head=problem.reference_head,
        chunk_tokens=problem.chunk_tokens,
    )[0]


def _full_logits_linear(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    reference_hidden: Tensor,
    reference_head: Tensor,
    active: Tensor,
) -> Tensor:
    """Full logits; the reference's of active rows only."""
    logits = hidden @ head.T
    loss = cross_entropy(logits.float(), labels)
    if len(active) == 0:
        return loss
    if len(active) < len(labels):
        logits, reference_hidden = logits[active], reference_hidden[active]
    return loss + _kl_sum(logits, reference_hidden @ reference_head.T) / len(labels)


def _of_hidden(function: Callable[..., Tensor]) -> LinearLoss:
    return lambda problem: function(
        problem.hidden,
        problem.head,
        problem.labels,
        problem.reference_hidden,
        problem.reference_head,
        problem.active,
    )


def _torch_linear_cross_entropy() -> LinearLoss:
    if not hasattr(nn.functional, "linear_cross_entropy"):
        raise CannotRunError("not in this torch")
    options = nn.LinearCrossEntropyOptions()  # in chunks; without options it forms full logits

    def run(problem: LinearProblem) -> Tensor:
        if len(problem.active) > 0:
            raise CannotRunError("no divergence")
        return nn.functional.linear_cross_entropy(
            problem.hidden, problem.head, problem.labels, options=options
        )

    return run


def _liger_chunked() -> LinearLoss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def run(problem: LinearProblem) -> Tensor:
        if not problem.is_dense:
            raise CannotRunError("one mask for both terms")
        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=1.0,
            weight_soft_loss=1.0,
            beta=0.0,
            chunk_size=problem.chunk_tokens or 1024,
        )
        return loss(
            problem.hidden,
            problem.head,
            problem.reference_hidden,
            problem.reference_head,
            problem.labels,
        )

    return run


def _liger_triton() -> LinearLoss:
    """Liger's two fused losses, one after the other; the second on the active rows, gathered."""
    from liger_kernel.transformers.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyLoss,
    )
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    linear_ce, divergence = LigerFusedLinearCrossEntropyLoss(), LigerFusedLinearJSD(0.0)

    def run(problem: LinearProblem) -> Tensor:
        _need_cuda(problem.hidden)
        loss = linear_ce(problem.head, problem.hidden, problem.labels)
        if len(problem.active) == 0:
            return loss
        hidden, reference = problem.hidden, problem.reference_hidden
        if not problem.is_dense:
            hidden, reference = hidden[problem.active], reference[problem.active]
        kl = divergence(hidden, problem.head, reference, problem.reference_head, None)
        return loss + kl * (len(problem.active) / len(problem.labels))

    return run


def _need_cuda(tensor: Tensor) -> None:
    if not tensor.is_cuda:
        raise CannotRunError("needs CUDA")


LOGITS_LOSSES: dict[str, Callable[[], LogitsLoss]] = {
    OURS: lambda: _ours_masked_kl,
    "torch eager": lambda: _of_logits(_full_logits_kl),
    "torch compile": lambda: _of_logits(torch.compile(_full_logits_kl, dynamic=False)),
    "Liger KLDIVLoss": _liger_kl_div,
}
LINEAR_LOSSES: dict[str, Callable[[], LinearLoss]] = {
    OURS: lambda: _ours_linear,
    "torch eager": lambda: _of_hidden(_full_logits_linear),
    "torch compile": lambda: _of_hidden(torch.compile(_full_logits_linear, dynamic=False)),
    "torch linear_cross_entropy": _torch_linear_cross_entropy,
    "Liger chunked JSDLoss": _liger_chunked,
    "Liger FLCE + FLJSD": _liger_triton,
}
"""What makes each loss, by the name under which it is listed; may raise what `status_of` names."""
