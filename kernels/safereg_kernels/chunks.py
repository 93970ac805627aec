"""The loop over rows: logits of a few, the gradient of many, and the products around them.

for rows whose gradient is collected:             as many as memory allows
    for rows whose logits exist at once:          about a thousand
        logits, statistics, gradient in the logits
    dX = gradient @ head,    dW += gradient.T @ hidden
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from safereg_kernels import flops
from safereg_kernels.block import NUM_STATISTICS, Block
from safereg_kernels.budget import HEAD_BYTES, ChunkSizes, chunk_sizes, padded
from safereg_kernels.call import Call
from safereg_kernels.path import path_for
from safereg_kernels.products import is_same_tensor, multiply_into, operand_dtype, project_into
from safereg_kernels.selection import Selection
from safereg_kernels.shard import local_columns
from safereg_kernels.topk import TopKRows


class Head(NamedTuple):
    """raw logits = hidden @ weight.T + bias."""

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
    """What a pass over the active rows reads, on the device of the hidden states."""

    hidden: Tensor
    """[tokens, H]."""
    head: Head
    selection: Selection
    labels: Tensor
    """[num_active] columns here in working order, see `shard.local_labels`."""
    reference: Reference | None
    reference_lse: Tensor | None
    """[num_active] float32, or None."""
    topk: TopKRows | None
    grad_scale: Tensor | None
    """Gradients are formed divided by this power of two, or None = 1."""
    call: Call

    @property
    def num_columns(self) -> int:
        """Columns here that are tokens."""
        return local_columns(self.head.weight.shape[0], self.call.vocab_size, self.call.shard)


class Gradients:
    """Gradients for an upstream scalar of 1, formed pass by pass; None where none is needed."""

    def __init__(self, inputs: Inputs, is_needed: Sequence[bool], *, num_passes: int) -> None:
        self._needs_hidden, self._needs_weight, self._needs_bias = is_needed
        self._inputs = inputs
        self.hidden: Tensor | None = None
        """[tokens, H] float32."""
        self.weight: Tensor | None = None
        """[vocab, H], float32, or bfloat16 where one pass gives all of it."""
        self.bias: Tensor | None = None
        """[vocab] float32."""
        # float16 would underflow before the upstream scale; sums of several passes want float32.
        weight = inputs.head.weight
        is_one = num_passes == 1 and not inputs.call.has_float32_head_grad
        rounds_at_once = is_one and weight.is_cuda and weight.dtype == torch.bfloat16
        self._weight_dtype = weight.dtype if rounds_at_once else torch.float32
        if num_passes == 0:
            self._fill_with_zeros()

    def add(self, grad: Tensor, hidden: Tensor, weight: Tensor, rows: Tensor | slice) -> None:
        """Adds what the gradient in the raw logits [rows, vocab] of one pass gives.

        Memory is taken here, not earlier: by now that of the logits is free again.
        """
        if self._needs_hidden:
            self._add_hidden(grad, weight, rows)
        if self._needs_weight:
            is_first = self.weight is None
            if self.weight is None:
                self.weight = hidden.new_empty(weight.shape, dtype=self._weight_dtype)
            multiply_into(self.weight, grad.T, hidden, accumulate=not is_first)
        if self._needs_bias:
            of_rows = grad.sum(0, dtype=torch.float32)
            self.bias = of_rows if self.bias is None else self.bias.add_(of_rows)

    def _add_hidden(self, grad: Tensor, weight: Tensor, rows: Tensor | slice) -> None:
        of_all = self._inputs.hidden
        if self.hidden is None:
            is_whole = self._inputs.selection.num_active == len(of_all)
            make = torch.empty if is_whole else torch.zeros
            self.hidden = make(of_all.shape, dtype=torch.float32, device=of_all.device)
        if isinstance(rows, slice):
            multiply_into(self.hidden[rows], grad, weight)
            return
        of_rows = self.hidden.new_empty(len(grad), weight.shape[1])
        multiply_into(of_rows, grad, weight)
        self.hidden.index_copy_(0, rows, of_rows)

    def _fill_with_zeros(self) -> None:
        """No row is active: everything that is needed is 0."""
        hidden, head = self._inputs.hidden, self._inputs.head
        if self._needs_hidden:
            self.hidden = torch.zeros_like(hidden, dtype=torch.float32)
        if self._needs_weight:
            self.weight = torch.zeros_like(head.weight, dtype=self._weight_dtype)
        if self._needs_bias and head.bias is not None:
            self.bias = torch.zeros_like(head.bias, dtype=torch.float32)


def grad_scale_for(dtype: torch.dtype, *weights: Tensor) -> Tensor | None:
    """Power of two near the largest weight, a scalar on the device; None where not needed.

    In float16 a probability times a weight of one over the number of tokens would underflow.
    """
    if dtype != torch.float16:
        return None
    largest = torch.stack([w.abs().amax() if w.numel() else w.new_zeros(()) for w in weights])
    _, exponent = torch.frexp(largest.amax())
    return torch.ldexp(torch.ones_like(largest[0]), exponent)


def run_chunks(inputs: Inputs, is_needed: Sequence[bool]) -> tuple[Tensor, Gradients]:
    """Statistics of the active rows [num_active, 9], and the gradients that are needed."""
    selection = inputs.selection
    head, reference = _with_operands(inputs)
    is_grad_needed = any(is_needed)
    sizes = _sizes(inputs, head, reference, is_needed)
    num_passes = len(range(0, selection.num_active, sizes.grad_rows))
    grads = Gradients(inputs, is_needed, num_passes=num_passes)
    buffers = _Buffers.allocate(inputs, head, reference, sizes, is_grad_needed=is_grad_needed)
    statistics = inputs.hidden.new_empty(selection.num_active, NUM_STATISTICS, dtype=torch.float32)
    for group in _slices(0, selection.num_active, sizes.grad_rows):
        rows = group if selection.is_in_order else selection.order[group]
        hidden = inputs.hidden[rows].to(head.weight.dtype)
        for chunk in _slices(group.start, group.stop, sizes.logits_rows):
            in_group = slice(chunk.start - group.start, chunk.stop - group.start)
            # Nothing here may hold a block: its logits' memory goes to dW in the end.
            statistics[chunk] = _run_block(
                _block(hidden[in_group], head, reference, inputs, chunk, buffers),
                inputs,
                chunk,
                buffers.grad_of(in_group) if is_grad_needed else None,
            )
        if is_grad_needed:
            if group.stop == selection.num_active and sizes.grad_rows > sizes.logits_rows:
                buffers.free_logits()  # dW takes their place
            grad = buffers.grad_of(slice(0, group.stop - group.start))
            grads.add(grad, hidden, head.weight, rows)
    return statistics, grads


def _run_block(block: Block, inputs: Inputs, chunk: slice, grad: Tensor | None) -> Tensor:
    """Statistics of a chunk's rows; their gradient is written into `grad`."""
    path, spec, shard = path_for(block.policy.device), inputs.call.spec, inputs.call.shard
    at_once = getattr(path, "statistics_and_gradient", None)
    if at_once is not None and grad is not None and shard is None and inputs.topk is None:
        return at_once(grad, block, spec)
    has_second_look = spec.direction == "jsd" or inputs.topk is not None
    statistics = path.row_statistics(block, spec)
    if shard is not None:
        statistics = shard.merged(statistics, path, spec)
    num_kl = _num_kl(inputs.selection, chunk)
    at_teacher = None
    if num_kl > 0 and has_second_look:
        if inputs.topk is None:
            path.add_mixture(block, spec, statistics)
        else:
            kl_rows = slice(chunk.start, chunk.start + num_kl)
            at_teacher = inputs.topk.look_at(block, inputs.call.spec, kl_rows, statistics)
        if shard is not None:
            shard.sum_shares(statistics)
    if grad is not None:
        path.write_gradient(grad, block, spec, statistics)
        if at_teacher is not None:
            at_teacher.overwrite(grad)
    return statistics


def _block(
    hidden: Tensor,
    head: Head,
    reference: Reference | None,
    inputs: Inputs,
    chunk: slice,
    buffers: "_Buffers",
) -> Block:
    """The raw logits of a chunk's rows, and what belongs to them."""
    selection, num_kl = inputs.selection, _num_kl(inputs.selection, chunk)
    policy_logits = buffers.policy[: len(hidden)]
    reference_logits = None
    if reference is not None and num_kl > 0:
        reference_logits = buffers.reference[:num_kl]
        in_order = selection.is_in_order
        of_kl = slice(chunk.start, chunk.start + num_kl)
        reference_hidden = reference.hidden[of_kl if in_order else selection.order[of_kl]]
        reference_hidden = reference_hidden.to(reference.head.weight.dtype)
        with flops.divergence():
            project_into(reference_logits, reference_hidden, *reference.head)
        if inputs.call.spec.is_difference:
            # The bias is in the reference's logits, to which the kernel adds this.
            project_into(policy_logits[:num_kl], hidden[:num_kl] - reference_hidden, head[0], None)
    first = num_kl if inputs.call.spec.is_difference and reference is not None else 0
    project_into(policy_logits[first:], hidden[first:], *head)
    has_labels = selection.num_ce > 0 or inputs.call.has_metrics
    lse = inputs.reference_lse
    return Block(
        policy=policy_logits,
        reference=reference_logits,
        labels=inputs.labels[chunk] if has_labels else None,
        ce_weights=_divided(selection.ce_weights[chunk], inputs) if has_labels else None,
        kl_weights=_divided(selection.kl_weights[chunk], inputs),
        reference_lse=None if lse is None or reference_logits is None else lse[chunk],
        num_columns=inputs.num_columns,
    )


def _num_kl(selection: Selection, chunk: slice) -> int:
    return max(0, min(chunk.stop, selection.num_kl) - chunk.start)


def _slices(begin: int, end: int, step: int) -> Iterator[slice]:
    for at in range(begin, end, step):
        yield slice(at, min(at + step, end))


def _divided(weights: Tensor, inputs: Inputs) -> Tensor:
    return weights if inputs.grad_scale is None else weights / inputs.grad_scale


def _with_operands(inputs: Inputs) -> tuple[Head, Reference | None]:
    """Both heads in the dtype of their products, a shared one converted once."""
    head, reference, dtype = inputs.head, inputs.reference, inputs.call.logits_dtype
    own = Head(head.weight.to(operand_dtype(head.weight, dtype)), head.bias)
    if reference is None:
        return own, None
    theirs = reference.head.weight
    if is_same_tensor(theirs, head.weight):
        weight = own.weight
    else:
        weight = theirs.to(operand_dtype(theirs, dtype))
    return own, reference._replace(head=reference.head._replace(weight=weight))


def _logits_dtypes(
    head: Head, reference: Reference | None, call: Call
) -> tuple[torch.dtype, torch.dtype]:
    """Of the policy's logits, and of the reference's, which may have a head of another dtype."""
    wanted = call.logits_dtype
    if reference is None or reference.head.weight.dtype == wanted:
        return wanted, wanted
    return wanted, torch.float32


def _sizes(
    inputs: Inputs, head: Head, reference: Reference | None, is_needed: Sequence[bool]
) -> ChunkSizes:
    stride = padded(len(head.weight))
    policy, theirs = _logits_dtypes(head, reference, inputs.call)
    has_reference = reference is not None and inputs.selection.num_kl > 0
    is_collected = head.weight.is_cuda and is_needed[1]
    # A gradient of the logits' own dtype that is used at once takes their place.
    is_apart = is_collected or head.weight.dtype != policy
    device = head.weight.device.type
    return chunk_sizes(
        inputs.selection.num_active,
        logits_bytes=stride * (policy.itemsize + has_reference * theirs.itemsize),
        grad_bytes=stride * head.weight.dtype.itemsize if any(is_needed) and is_apart else 0,
        is_collected=is_collected,
        head_bytes=inputs.call.head_bytes or HEAD_BYTES.get(device, HEAD_BYTES["cuda"]),
        chunk_tokens=inputs.call.chunk_tokens,
    )


class _Buffers:
    """Memory for logits and gradient, used again by every chunk; rows start at aligned places."""

    def __init__(self, policy: Tensor, reference: Tensor, grad: Tensor | None) -> None:
        self.policy = policy
        """[logits_rows, vocab]."""
        self.reference = reference
        """[the same or fewer, vocab]."""
        self._grad = grad

    @staticmethod
    def allocate(
        inputs: Inputs,
        head: Head,
        reference: Reference | None,
        sizes: ChunkSizes,
        *,
        is_grad_needed: bool,
    ) -> "_Buffers":
        columns, device = len(head.weight), head.weight.device
        of_policy, of_reference = _logits_dtypes(head, reference, inputs.call)

        def rows_of(rows: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(rows, padded(columns), dtype=dtype, device=device)[:, :columns]

        num_active, num_kl = inputs.selection.num_active, inputs.selection.num_kl
        rows = min(sizes.logits_rows, num_active)
        policy = rows_of(rows, of_policy)
        kl_rows = min(rows, num_kl) if reference is not None else 0
        is_apart = head.weight.dtype != of_policy or sizes.grad_rows > sizes.logits_rows
        grad = policy if is_grad_needed else None
        if is_grad_needed and is_apart:
            grad = rows_of(min(sizes.grad_rows, num_active), head.weight.dtype)
        return _Buffers(policy, rows_of(kl_rows, of_reference), grad)

    def grad_of(self, rows: slice) -> Tensor:
        """[rows, vocab]: rows of the gradient that is being collected."""
        assert self._grad is not None
        return self._grad[rows]

    def free_logits(self) -> None:
        """Gives their memory back; there are no more chunks."""
        self.policy = self.reference = self.policy.new_empty(0, 0)
