"""`linear_ce_kl`: cross-entropy and divergence straight from hidden states, in chunks of tokens.

No [tokens, vocab] tensor of the whole batch ever exists. For each chunk the policy's logits are
formed once and serve both terms; the reference's logits are formed for rows with a KL weight only;
the gradient is formed in the same pass. So the backward is one multiplication by the upstream
scalar.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safereg_kernels.eager import cross_entropy_and_grad, divergence_and_grad
from safereg_kernels.errors import ShapeError
from safereg_kernels.masked_kl import check_direction, require_eager_path

DEFAULT_CHUNK_TOKENS = 1024
"""Tokens per chunk: at a vocabulary of 128256 one float32 logits chunk is 0.5 GB."""


def linear_ce_kl(
    policy_hidden: Tensor,
    policy_head: Tensor,
    labels: Tensor,
    *,
    ce_weights: Tensor,
    kl_weights: Tensor,
    reference_hidden: Tensor | None,
    reference_head: Tensor | None,
    direction: str = "forward",
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    policy_bias: Tensor | None = None,
    reference_bias: Tensor | None = None,
    ce_report: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted cross-entropy plus divergence (float32 scalar), and both per token [tokens].

    loss = sum_t ce_weights_t CE_t + kl_weights_t D_t, with logits = hidden @ head.T + bias.

    Args:
        policy_hidden: [tokens, H]; differentiable.
        policy_head: [vocab, H]; differentiable (weight-tied heads as well).
        labels: [tokens] int64, already aligned with the hidden states (no shift here).
        ce_weights, kl_weights: [tokens] float32; a row with both 0 never reaches a matrix product.
        reference_hidden: [tokens, H_ref], unread where `kl_weights` is 0; None if none is positive.
        reference_head: [vocab, H_ref]; None like `reference_hidden`.
        direction: `forward`, `reverse` or `l2` (see `eager`).
        chunk_tokens: tokens per chunk; a bound on memory, never on the result.
        policy_bias, reference_bias: [vocab] or None.
        ce_report: [tokens] bool, rows whose CE is wanted for the log though its weight is 0; None
            = none. It changes `ce`, never the loss or a gradient.
    Returns:
        (loss, ce, divergence): `ce` and `divergence` are float32 [tokens], detached, and 0 where
        their weight is 0 (and no report is asked for). The gradient of `loss` honours one upstream
        scalar of any value.
    Raises:
        ShapeError: arguments disagree on a size.
    Collectives: none. The row counts come from device weights: one host synchronisation.
    """
    require_eager_path()
    check_direction(direction)
    _check_shapes(policy_hidden, policy_head, labels, ce_weights, kl_weights)
    _check_bias("policy_bias", policy_bias, policy_head)
    if ce_report is not None and ce_report.shape != labels.shape:
        raise ShapeError(
            f"ce_report {tuple(ce_report.shape)} must be [{len(labels)}], one per hidden state"
        )
    if reference_hidden is not None and reference_head is not None:
        _check_reference(policy_hidden, policy_head, reference_hidden, reference_head)
        _check_bias("reference_bias", reference_bias, reference_head)
    elif bool((kl_weights != 0).any()):
        raise ShapeError(
            "some kl_weights are not 0 but reference_hidden or reference_head is None: pass both"
        )
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    inputs = _Inputs(
        labels=labels,
        ce_weights=ce_weights.float(),
        ce_wanted=ce_weights != 0 if ce_report is None else (ce_weights != 0) | ce_report,
        kl_weights=kl_weights.float(),
        reference_hidden=reference_hidden,
        reference_head=reference_head,
        reference_bias=reference_bias,
        direction=direction,
        chunk_tokens=chunk_tokens,
        is_grad_enabled=torch.is_grad_enabled(),
    )
    # An autocast of the caller would turn the float32 products below into bfloat16 ones.
    with torch.autocast(policy_hidden.device.type, enabled=False):
        return _LinearCEKL.apply(policy_hidden, policy_head, policy_bias, inputs)


def _check_shapes(
    hidden: Tensor, head: Tensor, labels: Tensor, ce_weights: Tensor, kl_weights: Tensor
) -> None:
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ShapeError(
            f"policy_hidden {tuple(hidden.shape)} and policy_head {tuple(head.shape)} must be "
            "[tokens, H] and [vocab, H] with one H (an empty head is a sharded one that was not "
            "gathered: call inside the engine's forward)"
        )
    for name, tensor in (
        ("labels", labels),
        ("ce_weights", ce_weights),
        ("kl_weights", kl_weights),
    ):
        if tensor.shape != hidden.shape[:1]:
            raise ShapeError(
                f"{name} {tuple(tensor.shape)} must be [{hidden.shape[0]}], one per hidden state"
            )


def _check_bias(name: str, bias: Tensor | None, head: Tensor) -> None:
    if bias is not None and bias.shape != head.shape[:1]:
        raise ShapeError(f"{name} {tuple(bias.shape)} must be [{head.shape[0]}], one per token id")


def _check_reference(hidden: Tensor, head: Tensor, ref_hidden: Tensor, ref_head: Tensor) -> None:
    if ref_hidden.shape[0] != hidden.shape[0] or ref_hidden.shape[1:] != ref_head.shape[1:]:
        raise ShapeError(
            f"reference_hidden {tuple(ref_hidden.shape)} must be [{hidden.shape[0]}, H_ref] and "
            f"match reference_head {tuple(ref_head.shape)}"
        )
    if ref_head.shape[0] != head.shape[0]:
        raise ShapeError(
            f"reference_head has vocab {ref_head.shape[0]} but policy_head has {head.shape[0]}: "
            "both models must use the same padded vocabulary"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """The arguments through which no gradient flows."""

    labels: Tensor
    ce_weights: Tensor
    ce_wanted: Tensor
    kl_weights: Tensor
    reference_hidden: Tensor | None
    reference_head: Tensor | None
    reference_bias: Tensor | None
    direction: str
    chunk_tokens: int
    is_grad_enabled: bool
    """The caller's grad mode: `needs_input_grad` is true under `no_grad` as well."""


class _LinearCEKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, inputs: _Inputs
    ) -> tuple[Tensor, Tensor, Tensor]:
        need_hidden, need_head, need_bias = (
            inputs.is_grad_enabled and needed for needed in ctx.needs_input_grad[:3]
        )
        rows = (inputs.ce_wanted | (inputs.kl_weights != 0)).nonzero().squeeze(-1)
        ce = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        divergence = torch.zeros_like(ce)
        # All three in float32: rounded once, after the upstream scalar, else float16 underflows.
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if need_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if need_head else None
        grad_bias = None
        if bias is not None and need_bias:
            grad_bias = torch.zeros_like(bias, dtype=torch.float32)

        for chunk in rows.split(inputs.chunk_tokens):
            chunk_hidden = hidden[chunk]
            logits = _project(chunk_hidden, head, bias)
            need_grad = need_hidden or need_head or need_bias
            grad = torch.zeros_like(logits) if need_grad else None
            _add_cross_entropy(logits, chunk, inputs, ce, grad)
            _add_divergence(logits, chunk, inputs, divergence, grad)
            if grad is None:
                continue
            if grad_hidden is not None:
                grad_hidden[chunk] = grad @ head.float()
            if grad_head is not None:
                grad_head.addmm_(grad.T, chunk_hidden.float())
            if grad_bias is not None:
                grad_bias += grad.sum(0)

        task = torch.where(inputs.ce_weights != 0, inputs.ce_weights * ce, 0.0)
        loss = task.sum() + (inputs.kl_weights * divergence).sum()
        ctx.save_for_backward(grad_hidden, grad_head, grad_bias)
        ctx.dtypes = (hidden.dtype, head.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(ce, divergence)
        return loss, ce, divergence

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if grad is None else (grad * upstream[0]).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None)


def _project(hidden: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    """Logits in float32: rounding them to bfloat16 would drown a small divergence in noise."""
    logits = hidden.float() @ head.float().T
    return logits if bias is None else logits + bias.float()


def _add_cross_entropy(
    logits: Tensor, chunk: Tensor, inputs: _Inputs, ce: Tensor, grad: Tensor | None
) -> None:
    """Writes `ce` of the chunk's rows where it is wanted and adds their weighted gradient."""
    weights = inputs.ce_weights[chunk]
    local = inputs.ce_wanted[chunk].nonzero().squeeze(-1)
    if local.numel() == 0:
        return
    value, row_grad = cross_entropy_and_grad(
        logits[local], inputs.labels[chunk[local]], need_grad=grad is not None
    )
    ce[chunk[local]] = value
    if grad is not None and row_grad is not None:
        grad[local] += row_grad * weights[local, None]


def _add_divergence(
    logits: Tensor, chunk: Tensor, inputs: _Inputs, divergence: Tensor, grad: Tensor | None
) -> None:
    """Projects the reference for rows with a KL weight; adds value and weighted gradient."""
    weights = inputs.kl_weights[chunk]
    local = weights.nonzero().squeeze(-1)
    if local.numel() == 0:
        return
    assert inputs.reference_hidden is not None
    assert inputs.reference_head is not None
    reference_logits = _project(
        inputs.reference_hidden[chunk[local]], inputs.reference_head, inputs.reference_bias
    )
    value, row_grad = divergence_and_grad(
        logits[local],
        reference_logits,
        direction=inputs.direction,
        temperature=1.0,
        need_grad=grad is not None,
    )
    divergence[chunk[local]] = value
    if grad is not None and row_grad is not None:
        grad[local] += row_grad * weights[local, None]
