"""The same functions for a vocabulary that is spread over a tensor-parallel group.

Every rank holds some columns of both models' logits (or rows of both heads), any number of them,
even none, and the same tokens. Each computes its columns' statistics; one small all-gather makes
them those of whole rows, the same bits on every rank; each then writes the gradient of its own
columns. No autograd runs through the collective, whose derivative would count every rank again.
"""

import torch
from torch import Tensor, distributed

from safereg_kernels.call import Call
from safereg_kernels.checks import check_vocab_size
from safereg_kernels.linear_ce_kl import HeadTensors, TokenMetrics, metrics_wanted, run_linear_ce_kl
from safereg_kernels.masked_kl import run_masked_kl
from safereg_kernels.shard import VocabShard
from safereg_kernels.spec import LossSpec
from safereg_kernels.topk import TopK

CHUNK_TOKENS = 1024
"""Tokens per chunk: the same on every rank, however many columns each has."""


def vocab_parallel_masked_kl(
    policy_logits: Tensor,
    reference_logits: Tensor,
    weights: Tensor,
    *,
    tp_group: distributed.ProcessGroup,
    vocab_start: int,
    direction: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    policy_softcap: float | None = None,
    reference_softcap: float | None = None,
    policy_logit_scale: float = 1.0,
    reference_logit_scale: float = 1.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`masked_kl` of a sharded vocabulary: (loss, divergence [tokens]), equal on every rank.

    Args:
        policy_logits, reference_logits: [tokens, columns of this rank].
        weights: [tokens], the same on every rank.
        tp_group: the tensor-parallel group.
        vocab_start: token id of this rank's first column.
        vocab_size: number of tokens of the whole vocabulary; ids from there on are padding.
        The rest: see `masked_kl`.
    Returns:
        (loss, divergence); the gradient in `policy_logits` is that of this rank's columns, once,
        for an upstream scalar that is the same on every rank.
    Raises:
        ShapeError, ValueError: see `checks`; on this rank alone, before any collective.
    Collectives: forward one all-gather of 9 float32 per token (`jsd`: and one all-reduce of 2),
    backward none.
    """
    check_vocab_size(vocab_size, None)
    spec = LossSpec(
        direction=direction,
        beta=beta,
        temperature=float(temperature),
        policy_softcap=policy_softcap,
        reference_softcap=reference_softcap,
        policy_logit_scale=policy_logit_scale,
        reference_logit_scale=reference_logit_scale,
    )
    shard = VocabShard(group_name=tp_group.group_name, start=vocab_start)
    call = Call(spec=spec, vocab_size=vocab_size, shard=shard)
    return run_masked_kl(policy_logits, reference_logits, weights, None, call)


def vocab_parallel_linear_ce_kl(
    policy_hidden: Tensor,
    policy_head: Tensor,
    labels: Tensor,
    *,
    tp_group: distributed.ProcessGroup,
    vocab_start: int,
    ce_weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
    reference_hidden: Tensor | None = None,
    reference_head: Tensor | None = None,
    direction: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
    policy_bias: Tensor | None = None,
    reference_bias: Tensor | None = None,
    policy_softcap: float | None = None,
    reference_softcap: float | None = None,
    policy_logit_scale: float = 1.0,
    reference_logit_scale: float = 1.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    is_difference: bool = False,
    ce_report: Tensor | None = None,
    reference_topk: TopK | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    reduction: str = "sum",
    return_lse: bool = False,
    return_entropy: bool = False,
    return_accuracy: bool = False,
    reduce_hidden_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, TokenMetrics]:
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
    Collectives: per chunk one all-gather of 9 float32 per token (`jsd` and a top-k teacher: and one
    all-reduce of 2); with `reduce_hidden_grad` one all-reduce of float32 [tokens, H] in the
    forward. Backward: none, but with `reduction="none"` all of these once more.
    """
    check_vocab_size(vocab_size, None)
    spec = LossSpec(
        direction=direction,
        beta=beta,
        temperature=float(temperature),
        z_loss=z_loss,
        policy_softcap=policy_softcap,
        reference_softcap=reference_softcap,
        policy_logit_scale=policy_logit_scale,
        reference_logit_scale=reference_logit_scale,
        is_difference=is_difference,
        has_entropy=return_entropy,
    )
    call = Call(
        spec=spec,
        vocab_size=vocab_size,
        shard=VocabShard(
            group_name=tp_group.group_name,
            start=vocab_start,
            is_hidden_grad_summed=reduce_hidden_grad,
        ),
        has_metrics=return_lse or return_entropy or return_accuracy,
        ignore_index=ignore_index,
        chunk_tokens=chunk_tokens,
        has_float32_head_grad=torch.compiler.is_compiling(),
        logits_dtype_name=str(logits_dtype).removeprefix("torch."),
    )
    tensors = HeadTensors(
        policy_hidden, policy_head, policy_bias, labels, ce_weights, kl_weights, ce_report,
        reference_hidden, reference_head, reference_bias, None, reference_topk,
    )  # fmt: skip
    results = run_linear_ce_kl(tensors, call, shift, reduction)
    return metrics_wanted(results, return_lse, return_entropy, return_accuracy)
