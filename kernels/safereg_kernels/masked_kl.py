"""`masked_kl`: weighted divergence between two sets of logits.

Forward reads both logits once and keeps nine numbers per row; backward reads them once more and
writes the gradient, the upstream scalar already in it: 10 bytes of traffic per bfloat16 element.
"""

from typing import Any

import torch
from torch import Tensor

from safereg_kernels.block import NUM_STATISTICS, Block
from safereg_kernels.call import Call
from safereg_kernels.checks import check_logits, check_spec, check_vocab_size
from safereg_kernels.path import path_for
from safereg_kernels.results import divergence_of, weighted
from safereg_kernels.shard import local_columns
from safereg_kernels.spec import LossSpec


def masked_kl(
    policy_logits: Tensor,
    reference_logits: Tensor,
    weights: Tensor,
    *,
    direction: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    policy_softcap: float | None = None,
    reference_softcap: float | None = None,
    policy_logit_scale: float = 1.0,
    reference_logit_scale: float = 1.0,
    vocab_size: int | None = None,
    reference_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of per-token divergences (float32 scalar) and the divergences of all tokens.

    loss = sum_t weights_t D_t, with D in nats (see `LossSpec` for the four directions). Rows of
    weight 0 are skipped, not multiplied: they are never read, so NaN there does no harm.

    Args:
        policy_logits: [tokens, vocab] or [B, S, vocab], any float dtype and row stride; reduced in
            float32; differentiable.
        reference_logits: like them, of the same dtype; no gradient flows here.
        weights: [tokens] or [B, S], finite and >= 0; 0 = the row is skipped.
        direction: `forward` KL(q||p), `reverse` KL(p||q), `l2` of centred logits, `jsd` of `beta`.
        temperature: divides both logits; no T^2 factor.
        policy_softcap, reference_softcap, policy_logit_scale, reference_logit_scale: where the
            logits given are raw ones, see `LossSpec`.
        vocab_size: number of tokens; columns from there on are padding, with gradient exactly 0.
        reference_lse: like the weights, log sum exp(y / T) of the reference where it was stored.
    Returns:
        (loss, divergence): `loss` is differentiable in `policy_logits` under one upstream scalar of
        any value; `divergence` is float32 like the weights, detached, 0 on skipped rows. A row
        whose policy has a token that the reference suppresses has a `reverse` divergence of +inf.
    Raises:
        ShapeError, ValueError: see `checks`.
    Collectives: none. Host synchronisations: none with Triton kernels. Under `torch.compile` the
    call is one operator of the graph.
    """
    spec = LossSpec(
        direction=direction,
        beta=beta,
        temperature=float(temperature),
        policy_softcap=policy_softcap,
        reference_softcap=reference_softcap,
        policy_logit_scale=policy_logit_scale,
        reference_logit_scale=reference_logit_scale,
    )
    check_vocab_size(vocab_size, policy_logits.shape[-1])
    call = Call(spec=spec, vocab_size=vocab_size)
    return run_masked_kl(policy_logits, reference_logits, weights, reference_lse, call)


def run_masked_kl(
    policy_logits: Tensor,
    reference_logits: Tensor,
    weights: Tensor,
    reference_lse: Tensor | None,
    call: Call,
) -> tuple[Tensor, Tensor]:
    """`masked_kl` of a whole vocabulary or of a rank's part of it."""
    check_spec(call.spec)
    shape = weights.shape
    if policy_logits.ndim == 3:
        policy_logits, reference_logits = (
            policy_logits.flatten(0, 1),
            reference_logits.flatten(0, 1),
        )
        weights = weights.flatten()
    if reference_lse is not None:
        reference_lse = reference_lse.detach().float().flatten()
    check_logits(policy_logits, reference_logits, weights, reference_lse)
    loss, divergence, _ = _op(
        policy_logits,
        reference_logits.detach(),
        weights.detach().float(),
        reference_lse,
        call.encoded(),
    )
    return loss, divergence.reshape(shape)


@torch.library.custom_op("safereg_kernels::masked_kl", mutates_args=())
def _masked_kl(
    policy_logits: Tensor,
    reference_logits: Tensor,
    weights: Tensor,
    reference_lse: Tensor | None,
    call: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, divergence [tokens], statistics [tokens, 9])."""
    options, path = Call.decoded(call), path_for(policy_logits.device)
    spec, shard = options.spec, options.shard
    block = _block(policy_logits, reference_logits, weights, options, reference_lse)
    statistics = path.row_statistics(block, spec)
    if shard is not None:
        statistics = shard.merged(statistics, path, spec)
    if spec.direction == "jsd":
        path.add_mixture(block, spec, statistics)
        if shard is not None:
            shard.sum_shares(statistics)
    divergence = divergence_of(statistics, weights, spec.direction)
    return weighted(weights, divergence).sum(), divergence, statistics.contiguous()


@torch.library.custom_op("safereg_kernels::masked_kl_backward", mutates_args=())
def _masked_kl_backward(
    policy_logits: Tensor,
    reference_logits: Tensor,
    weights: Tensor,
    statistics: Tensor,
    upstream: Tensor,
    call: str,
) -> Tensor:
    """Gradient in `policy_logits`, of their dtype."""
    options = Call.decoded(call)
    scaled = torch.where(weights != 0, weights * upstream, 0.0)
    block = _block(policy_logits, reference_logits, scaled, options, None)
    grad = policy_logits.new_empty(policy_logits.shape)
    path_for(grad.device).write_gradient(grad, block, options.spec, statistics)
    return grad


def _block(
    policy: Tensor, reference: Tensor, weights: Tensor, call: Call, reference_lse: Tensor | None
) -> Block:
    return Block(
        policy=policy,
        reference=reference,
        labels=None,
        ce_weights=None,
        kl_weights=weights,
        reference_lse=reference_lse,
        num_columns=local_columns(policy.shape[1], call.vocab_size, call.shard),
    )


@_masked_kl.register_fake
def _(policy_logits, reference_logits, weights, reference_lse, call):
    tokens = policy_logits.shape[0]
    like = policy_logits.new_empty((tokens, NUM_STATISTICS), dtype=torch.float32)
    return like.new_empty(()), like.new_empty(tokens), like


@_masked_kl_backward.register_fake
def _(policy_logits, reference_logits, weights, statistics, upstream, call):
    return policy_logits.new_empty(policy_logits.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    policy_logits, reference_logits, weights, _, ctx.call = inputs
    _, divergence, statistics = output
    ctx.mark_non_differentiable(divergence, statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(policy_logits, reference_logits, weights, statistics)


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    if upstream[0] is None:
        return (None,) * 5
    return _masked_kl_backward(*ctx.saved_tensors, upstream[0], ctx.call), None, None, None, None


_masked_kl.register_autograd(_backward, setup_context=_keep)
_op = torch.ops.safereg_kernels.masked_kl.default
