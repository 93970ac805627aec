"""The same functions for a vocabulary that is spread over a tensor-parallel group.

Every rank holds some columns of both models' logits (or rows of both heads), any number of them,
even none, and the same tokens. Each computes its columns' statistics; one small all-gather makes
them those of whole rows, the same bits on every rank; each then writes the gradient of its own
columns. No autograd runs through the collective, whose derivative would count every rank again.
"""

import torch
from torch import Tensor, distributed

from safereg_kernels.checks import check_vocab_size
from safereg_kernels.linear_ce_kl import run_linear_ce_kl
from safereg_kernels.masked_kl import run_masked_kl
from safereg_kernels.shard import VocabShard

CHUNK_TOKENS = 1024
"""Tokens per chunk: the same on every rank, however many columns each has."""


@torch.compiler.disable(reason="launches kernels and a collective")
def vocab_parallel_masked_kl(
    policy_logits: Tensor,
    reference_logits: Tensor,
    weights: Tensor,
    *,
    tp_group: distributed.ProcessGroup,
    vocab_start: int,
    direction: str = "forward",
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`masked_kl` of a sharded vocabulary: (loss, divergence [tokens]), equal on every rank.

    Args:
        policy_logits, reference_logits: [tokens, columns of this rank].
        weights: [tokens], the same on every rank.
        tp_group: the tensor-parallel group.
        vocab_start: token id of this rank's first column.
        direction, temperature: see `masked_kl`.
        vocab_size: number of tokens of the whole vocabulary; ids from there on are padding.
    Returns:
        (loss, divergence); the gradient in `policy_logits` is that of this rank's columns, once,
        for an upstream scalar that is the same on every rank.
    Raises:
        ShapeError, ValueError: see `checks`; on this rank alone, before any collective.
    Collectives: forward one all-gather of 6 float32 per token, backward none.
    """
    check_vocab_size(vocab_size, None)
    return run_masked_kl(
        policy_logits,
        reference_logits,
        weights,
        direction=direction,
        temperature=temperature,
        vocab_size=vocab_size,
        shard=VocabShard(group=tp_group, start=vocab_start),
    )


@torch.compiler.disable(reason="launches kernels and a collective")
def vocab_parallel_linear_ce_kl(
    policy_hidden: Tensor,
    policy_head: Tensor,
    labels: Tensor,
    *,
    ce_weights: Tensor,
    kl_weights: Tensor,
    reference_hidden: Tensor | None,
    reference_head: Tensor | None,
    tp_group: distributed.ProcessGroup,
    vocab_start: int,
    direction: str = "forward",
    chunk_tokens: int = CHUNK_TOKENS,
    policy_bias: Tensor | None = None,
    reference_bias: Tensor | None = None,
    policy_softcap: float | None = None,
    reference_softcap: float | None = None,
    vocab_size: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    is_difference: bool = False,
    ce_report: Tensor | None = None,
    reduce_hidden_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_ce_kl` of a sharded vocabulary: (loss, ce, divergence), equal on every rank.

    Args:
        policy_hidden, reference_hidden: [tokens, H], the same on every rank.
        policy_head, reference_head: [rows of this rank, H].
        labels: [tokens] token ids of the whole vocabulary.
        tp_group: the tensor-parallel group.
        vocab_start: token id of this rank's first row of the head.
        chunk_tokens: tokens per chunk, the same on every rank.
        vocab_size: number of tokens of the whole vocabulary; ids from there on are padding.
        reduce_hidden_grad: sum the gradient of the hidden states over the group. False where the
            caller's own operator does it in its backward (Megatron's copy to the tensor-parallel
            region), which would otherwise count every rank again.
        The rest: see `linear_ce_kl`; weights and labels are the same on every rank.
    Returns:
        (loss, ce, divergence); the head's gradient is that of this rank's rows, once, for an
        upstream scalar that is the same on every rank.
    Raises:
        ShapeError, ValueError: see `checks`; on this rank alone, before any collective.
    Collectives: per chunk one all-gather of 6 float32 per token; with `reduce_hidden_grad` one
    all-reduce of float32 [active tokens, H] in the forward. Backward: none.
    """
    check_vocab_size(vocab_size, None)
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
        shard=VocabShard(
            group=tp_group, start=vocab_start, is_hidden_grad_summed=reduce_hidden_grad
        ),
    )
