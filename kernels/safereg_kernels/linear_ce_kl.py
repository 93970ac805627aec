"""`linear_ce_kl`: cross-entropy and divergence straight from hidden states, in chunks of tokens.

No [tokens, vocab] tensor of the whole batch ever exists. For each chunk the policy's logits are
formed once and serve both terms; the reference's logits are formed for rows with a KL weight only;
the gradient is formed in the same pass, over the logits. So the backward is one multiplication by
the upstream scalar.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from safereg_kernels.block import Formula
from safereg_kernels.checks import (
    check_difference,
    check_formula,
    check_labels,
    check_logits_dtype,
    check_policy,
    check_reference,
    check_vocab_size,
)
from safereg_kernels.chunks import (
    Gradients,
    Head,
    Inputs,
    Reference,
    default_chunk_tokens,
    grad_scale_for,
    run_chunks,
)
from safereg_kernels.errors import ShapeError
from safereg_kernels.flops import HeadFlops, linear_ce_kl_flops, operator
from safereg_kernels.products import operand_dtype, scaled_to
from safereg_kernels.results import cross_entropy_of, divergence_of, weighted_sum
from safereg_kernels.selection import select_rows
from safereg_kernels.shard import VocabShard, local_columns, local_labels


@torch.compiler.disable(reason="launches kernels for the rows that are active")
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
    chunk_tokens: int | None = None,
    policy_bias: Tensor | None = None,
    reference_bias: Tensor | None = None,
    policy_softcap: float | None = None,
    reference_softcap: float | None = None,
    vocab_size: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    is_difference: bool = False,
    ce_report: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted cross-entropy plus divergence (float32 scalar), and both per token [tokens].

    loss = sum_t ce_weights_t CE_t + kl_weights_t D_t, with logits = hidden @ head.T + bias, and
    softcap * tanh(logits / softcap) where a soft cap is given.

    Args:
        policy_hidden: [tokens, H]; differentiable.
        policy_head: [vocab, H], of the same dtype; differentiable (weight-tied heads as well).
        labels: [tokens] int64, already aligned with the hidden states (no shift here).
        ce_weights, kl_weights: [tokens], finite and >= 0; a row with both 0 never reaches a matrix
            product. On the CPU their rows are counted without waiting for the device.
        reference_hidden: [tokens, H_ref], unread where `kl_weights` is 0; None if none is positive.
        reference_head: [vocab, H_ref]; None like `reference_hidden`.
        direction: `forward`, `reverse` or `l2` (see `eager`).
        chunk_tokens: tokens per chunk; a bound on memory, never on the result. None = as many as
            CHUNK_BYTES hold.
        policy_bias, reference_bias: [vocab] or None.
        policy_softcap, reference_softcap: soft cap of each model's logits, or None.
        vocab_size: number of tokens; columns from there on are padding, with gradient exactly 0.
        logits_dtype: dtype in which a chunk's logits are kept, float32 or the head's own. Rounded
            logits halve their memory and drown the gradient of a small divergence in noise.
        is_difference: project policy_hidden - reference_hidden where there is a divergence, for
            models that share one head (the same tensor): then the logits' difference keeps its
            digits in any `logits_dtype`.
        ce_report: [tokens] bool, rows whose CE is wanted for the log though its weight is 0; None
            = none. It changes `ce`, never the loss or a gradient.
    Returns:
        (loss, ce, divergence): `ce` and `divergence` are float32 [tokens], detached, and 0 where
        their weight is 0 (and no report is asked for). The gradient of `loss` honours one upstream
        scalar of any value.
    Raises:
        ShapeError, ValueError: see `checks`.
    Collectives: none. Host synchronisations: none where the weights and `ce_report` are on the CPU,
    else one, to count rows. Under `torch.compile` the call is a break of the graph.
    """
    check_vocab_size(vocab_size, policy_head.shape[0])
    return run_linear_ce_kl(
        policy_hidden,
        policy_head,
        labels,
        ce_weights=ce_weights,
        kl_weights=kl_weights,
        reference_hidden=reference_hidden,
        reference_head=reference_head,
        direction=direction,
        chunk_tokens=chunk_tokens,
        policy_bias=policy_bias,
        reference_bias=reference_bias,
        policy_softcap=policy_softcap,
        reference_softcap=reference_softcap,
        vocab_size=vocab_size,
        logits_dtype=logits_dtype,
        is_difference=is_difference,
        ce_report=ce_report,
        shard=None,
    )


def run_linear_ce_kl(
    policy_hidden: Tensor,
    policy_head: Tensor,
    labels: Tensor,
    *,
    ce_weights: Tensor,
    kl_weights: Tensor,
    reference_hidden: Tensor | None,
    reference_head: Tensor | None,
    direction: str,
    chunk_tokens: int | None,
    policy_bias: Tensor | None,
    reference_bias: Tensor | None,
    policy_softcap: float | None,
    reference_softcap: float | None,
    vocab_size: int | None,
    logits_dtype: torch.dtype,
    is_difference: bool,
    ce_report: Tensor | None,
    shard: VocabShard | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_ce_kl` of a whole vocabulary (`shard` None) or of a rank's part of it."""
    check_formula(
        direction,
        policy_softcap=policy_softcap,
        reference_softcap=reference_softcap,
        chunk_tokens=chunk_tokens,
    )
    check_policy(
        policy_hidden,
        policy_head,
        policy_bias,
        labels,
        ce_weights=ce_weights,
        kl_weights=kl_weights,
        ce_report=ce_report,
    )
    check_logits_dtype(logits_dtype, policy_head)
    columns, device = policy_head.shape[0], policy_hidden.device
    ce_is_wanted = ce_weights != 0
    if ce_report is not None:
        ce_is_wanted = ce_is_wanted.to(ce_report.device) | ce_report
    check_labels(labels, ce_is_wanted, columns if vocab_size is None and not shard else vocab_size)
    selection = select_rows(ce_is_wanted, kl_weights.to(ce_is_wanted.device), device)
    reference = None
    if reference_hidden is not None and reference_head is not None:
        check_reference(
            policy_hidden, policy_head, reference_hidden, reference_head, reference_bias
        )
        if is_difference:
            check_difference(policy_head, policy_bias, reference_head, reference_bias)
        reference = Reference(
            reference_hidden.detach(), Head(reference_head.detach(), reference_bias)
        )
    elif selection.num_kl > 0:
        raise ShapeError(
            f"{selection.num_kl} kl_weights are not 0 but reference_hidden or reference_head is "
            "None: pass both"
        )
    ce_weights, kl_weights = (
        weights.detach().float().to(device, non_blocking=True)
        for weights in (ce_weights, kl_weights)
    )
    inputs = Inputs(
        labels=local_labels(labels, columns, vocab_size, shard),
        ce_weights=ce_weights,
        ce_is_wanted=ce_is_wanted.to(device, non_blocking=True),
        kl_weights=kl_weights,
        grad_scale=grad_scale_for(operand_dtype(policy_head, logits_dtype), ce_weights, kl_weights),
        selection=selection,
        reference=reference,
        formula=Formula(
            direction=direction,
            policy_softcap=policy_softcap,
            reference_softcap=reference_softcap,
            is_difference=is_difference,
            num_columns=local_columns(columns, vocab_size, shard),
        ),
        chunk_tokens=chunk_tokens or default_chunk_tokens(columns),
        logits_dtype=logits_dtype,
        shard=shard,
        is_grad_enabled=torch.is_grad_enabled(),
    )
    # An autocast of the caller would turn the float32 products below into bfloat16 ones.
    with torch.autocast(device.type, enabled=False):
        return _LinearCEKL.apply(policy_hidden, policy_head, policy_bias, inputs)


class _LinearCEKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, inputs: Inputs
    ) -> tuple[Tensor, Tensor, Tensor]:
        head, order = Head(weight, bias), inputs.selection.order
        is_needed = [inputs.is_grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        grads = Gradients.zeros(hidden, head, len(order), is_needed)
        with operator(_flops(hidden, head, inputs, is_needed)):
            statistics = run_chunks(hidden, head, inputs, grads)
        if inputs.shard is not None:
            inputs.shard.sum_hidden_grad(grads.hidden)
        ce_weights, kl_weights = inputs.ce_weights[order], inputs.kl_weights[order]
        active_ce = cross_entropy_of(statistics, inputs.ce_is_wanted[order])
        active_divergence = divergence_of(statistics, kl_weights, inputs.formula.direction)
        loss = weighted_sum(ce_weights, active_ce) + weighted_sum(kl_weights, active_divergence)
        ce = statistics.new_zeros(len(hidden)).index_copy_(0, order, active_ce)
        divergence = torch.zeros_like(ce).index_copy_(0, order, active_divergence)
        ctx.save_for_backward(order, inputs.grad_scale, grads.hidden, grads.weight, grads.bias)
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        ctx.mark_non_differentiable(ce, divergence)
        return loss, ce, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        order, grad_scale, *grads = ctx.saved_tensors
        scale = upstream[0] if grad_scale is None else upstream[0] * grad_scale
        # Kept in float32 and rounded here, once: float16 would underflow before the upstream scale.
        hidden, weight, bias = (
            None if grad is None else scaled_to(ctx.dtype, grad, scale) for grad in grads
        )
        if hidden is not None:
            hidden = hidden.new_zeros(ctx.shape).index_copy_(0, order, hidden)
        return hidden, weight, bias, None


def _flops(hidden: Tensor, head: Head, inputs: Inputs, is_needed: list[bool]) -> HeadFlops:
    reference = inputs.reference
    return linear_ce_kl_flops(
        num_active=inputs.selection.num_active,
        num_kl=inputs.selection.num_kl,
        columns=head.weight.shape[0],
        hidden_size=hidden.shape[1],
        reference_hidden_size=0 if reference is None else reference.hidden.shape[1],
        is_hidden_grad_needed=is_needed[0],
        is_weight_grad_needed=is_needed[1],
    )
