"""The loop over chunks of tokens: logits, statistics, gradient, and the products around them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from safereg_kernels import flops
from safereg_kernels.block import NUM_STATISTICS, Block, Formula
from safereg_kernels.path import path_for
from safereg_kernels.products import is_same_tensor, multiply_into, operand_dtype, project_into
from safereg_kernels.selection import Selection
from safereg_kernels.shard import VocabShard

CHUNK_BYTES = 1 << 30
"""Memory for one chunk of logits where the caller gives no size: with a vocabulary of 128256 that
is 832 tokens, enough for the products to be bound by arithmetic, not by reading the head."""
_BYTES_PER_LOGIT = 10  # policy and reference in float32, and a gradient of the head's dtype


class Head(NamedTuple):
    """logits = hidden @ weight.T + bias."""

    weight: Tensor
    """[vocab, H]."""
    bias: Tensor | None
    """[vocab], or None."""


class Reference(NamedTuple):
    """The frozen model's last hidden states and head."""

    hidden: Tensor
    """[tokens, H_ref], unread where the KL weight is 0."""
    head: Head


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The arguments through which no gradient flows, on the device of the hidden states."""

    labels: Tensor
    """[tokens] columns here, see `shard.local_labels`."""
    ce_weights: Tensor
    ce_is_wanted: Tensor
    kl_weights: Tensor
    grad_scale: Tensor | None
    """Gradients are formed divided by this power of two, or None = 1."""
    selection: Selection
    reference: Reference | None
    formula: Formula
    chunk_tokens: int
    logits_dtype: torch.dtype
    shard: VocabShard | None
    is_grad_enabled: bool
    """The caller's grad mode: `needs_input_grad` is true under `no_grad` as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """Float32 gradients for an upstream scalar of 1; None where none is needed."""

    hidden: Tensor | None
    """[num_active, H], in the order of the selection."""
    weight: Tensor | None
    """[vocab, H]."""
    bias: Tensor | None
    """[vocab]."""

    @staticmethod
    def zeros(
        hidden: Tensor, head: Head, num_active: int, is_needed: Sequence[bool]
    ) -> "Gradients":
        """Zeros for (hidden, weight, bias), where needed."""
        shapes = ((num_active, hidden.shape[1]), head.weight.shape, head.weight.shape[:1])
        of_hidden, of_weight, of_bias = (
            torch.zeros(shape, dtype=torch.float32, device=hidden.device) if needed else None
            for shape, needed in zip(shapes, is_needed, strict=True)
        )
        return Gradients(hidden=of_hidden, weight=of_weight, bias=of_bias)

    @property
    def is_any(self) -> bool:
        """True where some gradient is needed."""
        return any(grad is not None for grad in (self.hidden, self.weight, self.bias))

    def add(self, grad: Tensor, begin: int, hidden: Tensor, weight: Tensor) -> None:
        """Adds what the gradient in a chunk's raw logits [rows, vocab] gives."""
        if self.hidden is not None:
            multiply_into(self.hidden[begin : begin + len(grad)], grad, weight)
        if self.weight is not None:
            multiply_into(self.weight, grad.T, hidden, accumulate=True)
        if self.bias is not None:
            self.bias.add_(grad.sum(0, dtype=torch.float32))


def default_chunk_tokens(columns: int) -> int:
    """As many tokens as CHUNK_BYTES hold, a multiple of 64."""
    return max(64, CHUNK_BYTES // (_BYTES_PER_LOGIT * max(columns, 1)) // 64 * 64)


def grad_scale_for(dtype: torch.dtype, *weights: Tensor) -> Tensor | None:
    """Power of two near the largest weight, a scalar on the device; None where not needed.

    In float16 a probability times a weight of one over the number of tokens would underflow.
    """
    if dtype != torch.float16:
        return None
    largest = torch.stack([w.amax() if w.numel() else w.new_zeros(()) for w in weights]).amax()
    _, exponent = torch.frexp(largest)
    return torch.ldexp(torch.ones_like(largest), exponent)


def run_chunks(hidden: Tensor, head: Head, inputs: Inputs, grads: Gradients) -> Tensor:
    """Statistics of the active rows [num_active, 6]; their gradients are added to `grads`."""
    path = path_for(hidden.device)
    selection, formula = inputs.selection, inputs.formula
    head, reference = _with_operands(head, inputs)
    buffers = _Buffers.allocate(head, reference, inputs, is_grad_needed=grads.is_any)
    statistics = hidden.new_empty(selection.num_active, NUM_STATISTICS, dtype=torch.float32)
    for begin, end, num_kl in selection.chunks(inputs.chunk_tokens):
        rows = selection.order[begin:end]
        chunk_hidden = hidden[rows].to(head.weight.dtype)
        policy_logits = buffers.policy[: end - begin]
        reference_logits = buffers.reference[:num_kl]
        _project(policy_logits, reference_logits, chunk_hidden, head, reference, rows, formula)
        block = Block(
            policy=policy_logits,
            reference=reference_logits if num_kl > 0 else None,
            labels=inputs.labels[rows],
            ce_weights=_divided(inputs.ce_weights[rows], inputs.grad_scale),
            kl_weights=_divided(inputs.kl_weights[rows], inputs.grad_scale),
        )
        chunk_statistics = path.row_statistics(block, formula)
        if inputs.shard is not None:
            chunk_statistics = inputs.shard.merged(chunk_statistics, path, formula.direction)
        statistics[begin:end] = chunk_statistics
        if grads.is_any:
            grad = buffers.grad[: end - begin]
            path.write_gradient(grad, block, formula, chunk_statistics)
            grads.add(grad, begin, chunk_hidden, head.weight)
    return statistics


@dataclass(frozen=True, slots=True, kw_only=True)
class _Buffers:
    """One chunk's logits and their gradient, used again by every chunk."""

    policy: Tensor
    reference: Tensor
    grad: Tensor
    """The policy's logits themselves where the dtypes agree: the gradient overwrites them."""

    @staticmethod
    def allocate(
        head: Head, reference: Reference | None, inputs: Inputs, *, is_grad_needed: bool
    ) -> "_Buffers":
        columns, dtype = head.weight.shape[0], head.weight.dtype
        rows = min(inputs.chunk_tokens, inputs.selection.num_active)
        kl_rows = min(rows, inputs.selection.num_kl)

        def logits(rows: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(rows, columns, dtype=dtype, device=head.weight.device)

        policy = logits(rows, inputs.logits_dtype)
        own_dtype = torch.float32 if reference is None else reference.head.weight.dtype
        return _Buffers(
            policy=policy,
            reference=logits(
                kl_rows,
                inputs.logits_dtype if own_dtype == inputs.logits_dtype else torch.float32,
            ),
            grad=logits(rows, dtype) if is_grad_needed and dtype != policy.dtype else policy,
        )


def _with_operands(head: Head, inputs: Inputs) -> tuple[Head, Reference | None]:
    """Both heads in the dtype of their products, a shared one converted once."""
    dtype = operand_dtype(head.weight, inputs.logits_dtype)
    own = Head(head.weight.detach().to(dtype), head.bias)
    reference = inputs.reference
    if reference is None:
        return own, None
    theirs = reference.head.weight
    if is_same_tensor(theirs, head.weight):
        weight = own.weight
    else:
        weight = theirs.to(operand_dtype(theirs, inputs.logits_dtype))
    return own, reference._replace(head=reference.head._replace(weight=weight))


def _project(
    policy_logits: Tensor,
    reference_logits: Tensor,
    hidden: Tensor,
    head: Head,
    reference: Reference | None,
    rows: Tensor,
    formula: Formula,
) -> None:
    """Fills both buffers with the chunk's raw logits; the first rows have a reference."""
    num_kl = len(reference_logits)
    if reference is None or num_kl == 0:
        project_into(policy_logits, hidden, head.weight, head.bias)
        return
    reference_hidden = reference.hidden[rows[:num_kl]].to(reference.head.weight.dtype)
    with flops.divergence():
        project_into(reference_logits, reference_hidden, *reference.head)
    if not formula.is_difference:
        project_into(policy_logits, hidden, head.weight, head.bias)
        return
    # The bias is in the reference's logits, to which the kernel adds this.
    project_into(policy_logits[:num_kl], hidden[:num_kl] - reference_hidden, head.weight, None)
    project_into(policy_logits[num_kl:], hidden[num_kl:], head.weight, head.bias)


def _divided(weights: Tensor, scale: Tensor | None) -> Tensor:
    return weights if scale is None else weights / scale
