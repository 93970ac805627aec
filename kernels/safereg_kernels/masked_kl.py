"""`masked_kl`: weighted divergence between two sets of logits, gradient formed in the forward."""

import os
from typing import Any

import torch
from torch import Tensor

from safereg_kernels.eager import DIRECTIONS, divergence_and_grad
from safereg_kernels.errors import ShapeError


def masked_kl(
    policy_logits: Tensor,
    reference_logits: Tensor,
    weights: Tensor,
    *,
    direction: str = "forward",
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of per-token divergences (float32 scalar) and the divergences [tokens].

    loss = sum_t weights_t D_t, with D in nats (see `eager` for the three directions). Rows of
    weight 0 are skipped, not multiplied: they are never read, so NaN there does no harm.

    Args:
        policy_logits: [tokens, vocab], any float dtype; reduced in float32; differentiable.
        reference_logits: [tokens, vocab]; no gradient flows here.
        weights: [tokens] float32; 0 = the row is skipped.
        direction: `forward` KL(q||p), `reverse` KL(p||q), or `l2` of centred logits.
        temperature: divides both logits; no T^2 factor.
    Returns:
        (loss, divergence): `loss` is differentiable in `policy_logits` under one upstream scalar of
        any value; `divergence` is float32 [tokens], detached, 0 on skipped rows.
    Raises:
        ShapeError: the arguments disagree on `tokens` or `vocab`.
    Collectives: none.
    """
    require_eager_path()
    check_direction(direction)
    _check_shapes(policy_logits, reference_logits, weights)
    loss, divergence = _MaskedKL.apply(
        policy_logits,
        reference_logits,
        weights,
        direction,
        float(temperature),
        torch.is_grad_enabled(),
    )
    return loss, divergence


def require_eager_path() -> None:
    """Raises where SAFEREG_KERNELS asks for Triton kernels, which this version does not have."""
    choice = os.environ.get("SAFEREG_KERNELS", "auto")
    if choice not in ("auto", "eager", "triton"):
        raise ValueError(f"SAFEREG_KERNELS must be auto, eager or triton, got {choice!r}")
    if choice == "triton":
        raise NotImplementedError(
            "SAFEREG_KERNELS=triton, but this version has no Triton kernels yet: use auto or eager"
        )


def check_direction(direction: str) -> None:
    """Raises ValueError unless `direction` is one of the three known ones."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {DIRECTIONS}, got {direction!r}")


def _check_shapes(policy_logits: Tensor, reference_logits: Tensor, weights: Tensor) -> None:
    if policy_logits.ndim != 2 or policy_logits.shape != reference_logits.shape:
        raise ShapeError(
            f"policy logits {tuple(policy_logits.shape)} and reference logits "
            f"{tuple(reference_logits.shape)} must both be [tokens, vocab] and equal: both models "
            "must use the same padded vocabulary"
        )
    if weights.shape != policy_logits.shape[:1]:
        raise ShapeError(
            f"weights {tuple(weights.shape)} must be [{policy_logits.shape[0]}], one per token"
        )


class _MaskedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        policy_logits: Tensor,
        reference_logits: Tensor,
        weights: Tensor,
        direction: str,
        temperature: float,
        is_grad_enabled: bool,  # `needs_input_grad` is true under `no_grad` as well
    ) -> tuple[Tensor, Tensor]:
        need_grad = is_grad_enabled and ctx.needs_input_grad[0]
        rows = weights.nonzero().squeeze(-1)
        active = weights[rows].float()
        value, grad = divergence_and_grad(
            policy_logits[rows],
            reference_logits[rows],
            direction=direction,
            temperature=temperature,
            need_grad=need_grad,
        )
        divergence = torch.zeros(weights.shape, dtype=torch.float32, device=weights.device)
        divergence[rows] = value
        if grad is not None:
            # float16 would underflow before the upstream loss scale; bfloat16 has float32's range.
            dtype = torch.bfloat16 if policy_logits.dtype == torch.bfloat16 else torch.float32
            ctx.save_for_backward(rows, (grad * active[:, None]).to(dtype))
        ctx.shape, ctx.dtype = policy_logits.shape, policy_logits.dtype
        ctx.mark_non_differentiable(divergence)
        return (active * value).sum(), divergence

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, grad = ctx.saved_tensors
        full = grad.new_zeros(ctx.shape, dtype=ctx.dtype)
        full[rows] = (grad.float() * upstream[0]).to(ctx.dtype)
        return full, None, None, None, None, None
