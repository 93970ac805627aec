"""Other implementations of the same losses, from PyPI, behind one interface.

Each is a function from a problem to a scalar loss whose gradients autograd takes; packages are
imported when asked for. One that cannot run gets a status in words, never a number:
`not installed`, `out of memory`, what it cannot express, or the class of its error.

Settings are each package's defaults. So the gradient of a bfloat16 head is summed over chunks in
float32 by ours and in bfloat16 by Liger, and Liger's chunked loss rounds logits to bfloat16.
"""

from collections.abc import Callable
from typing import Any

import torch
from problems import LinearProblem, LogitsProblem, divergence_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from safereg_kernels import linear_ce_kl, linear_cross_entropy, masked_kl

OURS = "ours"
OPTIONAL = ("liger_kernel", "cut_cross_entropy", "quack", "cutlass")
"""Packages that a machine may lack."""


class CannotRunError(Exception):
    """The peer has no way to compute this; the message says why."""


LogitsLoss = Callable[[LogitsProblem], Tensor]
LinearLoss = Callable[[LinearProblem], Tensor]


def value_and_gradients(
    loss: Callable[[Any], Tensor], problem: Any
) -> Callable[[], tuple[Tensor, ...]]:
    """A call that gives the loss and the gradients of the problem's leaves."""

    def call() -> tuple[Tensor, ...]:
        value = loss(problem)
        return value.detach(), *torch.autograd.grad(value, problem.leaves)

    return call


def status_of(error: Exception) -> str:
    """Why a peer has no figure, in a few words."""
    if isinstance(error, CannotRunError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in OPTIONAL:
        return "not installed"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return type(error).__name__


def ours_masked_kl(problem: LogitsProblem) -> Tensor:
    """`masked_kl`."""
    return masked_kl(
        problem.policy, problem.reference, problem.weights, direction=problem.direction
    )[0]


def _full_logits_divergence(policy: Tensor, reference: Tensor, direction: str) -> Tensor:
    """Full log-probabilities in float32."""
    if direction == "jsd":
        return divergence_of(policy.float(), reference.float(), direction).sum() / len(policy)
    return _kl_sum(policy, reference, direction) / len(policy)


def _of_logits(function: Callable[[Tensor, Tensor, str], Tensor]) -> LogitsLoss:
    return lambda problem: function(problem.policy, problem.reference, problem.direction)


def _kl_sum(x: Tensor, y: Tensor, direction: str = "forward") -> Tensor:
    a, b = (log_softmax(logits, dim=-1, dtype=torch.float32) for logits in (x, y))
    first, second = (a, b) if direction == "forward" else (b, a)
    return kl_div(first, second, reduction="sum", log_target=True)


def _liger_divergence() -> LogitsLoss:
    from liger_kernel.transformers.jsd import LigerJSD
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    kl, jsd = LigerKLDIVLoss(reduction="sum", log_target=True), LigerJSD(beta=0.5)

    def run(problem: LogitsProblem) -> Tensor:
        _need_cuda(problem.policy)
        if problem.direction == "reverse":
            raise CannotRunError("gradient of the first argument only")
        a, b = (
            log_softmax(logits, dim=-1, dtype=torch.float32)
            for logits in (problem.policy, problem.reference)
        )
        return jsd(a, b) if problem.direction == "jsd" else kl(a, b) / len(a)

    return run


def ours_linear(problem: LinearProblem) -> Tensor:
    """`linear_ce_kl`."""
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


def ours_cross_entropy(problem: LinearProblem) -> Tensor:
    """`linear_cross_entropy`."""
    return linear_cross_entropy(
        problem.hidden, problem.head, problem.labels, chunk_tokens=problem.chunk_tokens
    )


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


def _liger_target() -> LinearLoss:
    """Liger's cross-entropy, and its divergence from probabilities, which are made beforehand."""
    from liger_kernel.transformers import LigerFusedLinearKLDivLoss
    from liger_kernel.transformers.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyLoss,
    )

    linear_ce, divergence = LigerFusedLinearCrossEntropyLoss(), LigerFusedLinearKLDivLoss()

    def run(problem: LinearProblem) -> Tensor:
        _need_cuda(problem.hidden)
        if len(problem.active) == 0:
            raise CannotRunError("the same as Liger FLCE + FLJSD")
        loss = linear_ce(problem.head, problem.hidden, problem.labels)
        hidden, reference = problem.hidden, problem.reference_hidden
        if not problem.is_dense:
            hidden, reference = hidden[problem.active], reference[problem.active]
        with torch.no_grad():
            target = (reference @ problem.reference_head.T).softmax(-1, dtype=torch.float32)
        kl = divergence(hidden, problem.head, target)
        return loss + kl * (len(problem.active) / len(problem.labels))

    return run


def _cut_cross_entropy() -> LinearLoss:
    from cut_cross_entropy import linear_cross_entropy as cce

    def run(problem: LinearProblem) -> Tensor:
        _need_cuda(problem.hidden)
        if len(problem.active) > 0:
            raise CannotRunError("no divergence")
        return cce(problem.hidden, problem.head, problem.labels)

    return run


def _quack() -> LinearLoss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def run(problem: LinearProblem) -> Tensor:
        _need_cuda(problem.hidden)
        if len(problem.active) > 0:
            raise CannotRunError("no divergence")
        return chunked_linear_cross_entropy(problem.hidden, problem.head, problem.labels)

    return run


def _need_cuda(tensor: Tensor) -> None:
    if not tensor.is_cuda:
        raise CannotRunError("needs CUDA")


Losses = dict[str, Callable[[], Callable[[Any], Tensor]]]
LOGITS_LOSSES: Losses = {
    OURS: lambda: ours_masked_kl,
    "torch eager": lambda: _of_logits(_full_logits_divergence),
    "Liger KLDIVLoss / JSD": _liger_divergence,
}
LINEAR_LOSSES: Losses = {
    OURS: lambda: ours_linear,
    "torch eager": lambda: _of_hidden(_full_logits_linear),
    "Liger FLCE + FLJSD": _liger_triton,
    "Liger FLCE + FLKLDiv": _liger_target,
    "torch linear_cross_entropy": _torch_linear_cross_entropy,
    "cut-cross-entropy": _cut_cross_entropy,
    "quack": _quack,
}
COMPILED_LOGITS_LOSSES: Losses = {
    OURS: lambda: ours_masked_kl,
    "torch compile": lambda: _of_logits(torch.compile(_full_logits_divergence, dynamic=False)),
}
COMPILED_LINEAR_LOSSES: Losses = {
    OURS: lambda: ours_linear,
    "torch compile": lambda: _of_hidden(torch.compile(_full_logits_linear, dynamic=False)),
    "Liger chunked JSDLoss": _liger_chunked,
}
"""What makes each loss, by the name under which it is listed; may raise what `status_of` names.
Those that compile are apart: they take long before they give their first value."""
