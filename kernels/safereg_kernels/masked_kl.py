"""`masked_kl`: weighted divergence between two sets of logits.

Forward reads both logits once and keeps six numbers per row; backward reads them once more and
writes the gradient, the upstream scalar already in it: 10 bytes of traffic per bfloat16 element.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from safereg_kernels.block import Block, Formula
from safereg_kernels.checks import check_formula, check_logits, check_vocab_size
from safereg_kernels.path import path_for
from safereg_kernels.results import divergence_of, weighted_sum
from safereg_kernels.shard import VocabShard, local_columns


@torch.compiler.disable(reason="launches kernels for the rows that are active")
def masked_kl(
    policy_logits: Tensor,
    reference_logits: Tensor,
    weights: Tensor,
    *,
    direction: str = "forward",
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of per-token divergences (float32 scalar) and the divergences [tokens].

    loss = sum_t weights_t D_t, with D in nats (see `eager` for the three directions). Rows of
    weight 0 are skipped, not multiplied: they are never read, so NaN there does no harm.

    Args:
        policy_logits: [tokens, vocab], any float dtype and row stride; reduced in float32;
            differentiable.
        reference_logits: [tokens, vocab], of the same dtype; no gradient flows here.
        weights: [tokens], finite and >= 0; 0 = the row is skipped.
        direction: `forward` KL(q||p), `reverse` KL(p||q), or `l2` of centred logits.
        temperature: divides both logits; no T^2 factor.
        vocab_size: number of tokens; columns from there on are padding, with gradient exactly 0.
    Returns:
        (loss, divergence): `loss` is differentiable in `policy_logits` under one upstream scalar of
        any value; `divergence` is float32 [tokens], detached, 0 on skipped rows. A row whose policy
        has a token that the reference suppresses has a `reverse` divergence of +inf.
    Raises:
        ShapeError, ValueError: see `checks`.
    Collectives: none. Host synchronisations: none with Triton kernels. Under `torch.compile` the
    call is a break of the graph.
    """
    check_vocab_size(vocab_size, policy_logits.shape[-1])
    return run_masked_kl(
        policy_logits,
        reference_logits,
        weights,
        direction=direction,
        temperature=temperature,
        vocab_size=vocab_size,
        shard=None,
    )


def run_masked_kl(
    policy_logits: Tensor,
    reference_logits: Tensor,
    weights: Tensor,
    *,
    direction: str,
    temperature: float,
    vocab_size: int | None,
    shard: VocabShard | None,
) -> tuple[Tensor, Tensor]:
    """`masked_kl` of a whole vocabulary (`shard` None) or of a rank's part of it."""
    check_formula(direction, temperature=temperature)
    check_logits(policy_logits, reference_logits, weights)
    inputs = _Inputs(
        reference_logits=reference_logits.detach(),
        weights=weights.detach().float(),
        formula=Formula(
            direction=direction,
            temperature=float(temperature),
            num_columns=local_columns(policy_logits.shape[1], vocab_size, shard),
        ),
        shard=shard,
    )
    return _MaskedKL.apply(policy_logits, inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """The arguments through which no gradient flows."""

    reference_logits: Tensor
    weights: Tensor
    formula: Formula
    shard: VocabShard | None


class _MaskedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, policy_logits: Tensor, inputs: _Inputs) -> tuple[Tensor, Tensor]:
        path = path_for(policy_logits.device)
        block = Block(
            policy=policy_logits,
            reference=inputs.reference_logits,
            labels=None,
            ce_weights=None,
            kl_weights=inputs.weights,
        )
        statistics = path.row_statistics(block, inputs.formula)
        if inputs.shard is not None:
            statistics = inputs.shard.merged(statistics, path, inputs.formula.direction)
        divergence = divergence_of(statistics, inputs.weights, inputs.formula.direction)
        ctx.save_for_backward(policy_logits, inputs.reference_logits, inputs.weights, statistics)
        ctx.formula = inputs.formula
        ctx.mark_non_differentiable(divergence)
        return weighted_sum(inputs.weights, divergence), divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        policy_logits, reference_logits, weights, statistics = ctx.saved_tensors
        block = Block(
            policy=policy_logits,
            reference=reference_logits,
            labels=None,
            ce_weights=None,
            kl_weights=torch.where(weights != 0, weights * upstream[0], 0.0),
        )
        grad = policy_logits.new_empty(policy_logits.shape)
        path_for(grad.device).write_gradient(grad, block, ctx.formula, statistics)
        return grad, None
