"""`linear_ce_kl`: cross-entropy and divergence straight from hidden states, in chunks of tokens.

No [tokens, vocab] tensor of the whole batch ever exists. For each chunk the policy's logits are
formed once and serve both terms; the reference's logits are formed for rows with a KL weight only;
the gradient is formed in the same pass, over the logits. So the backward is one multiplication by
the upstream scalar.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safereg_kernels.call import Call
from safereg_kernels.checks import (
    check_difference,
    check_labels,
    check_logits_dtype,
    check_one_per_label,
    check_policy,
    check_positive,
    check_reduction,
    check_reference,
    check_shift,
    check_spec,
    check_topk,
    check_topk_ids,
    check_vocab_size,
)
from safereg_kernels.head_op import HeadResults, linear_ce_kl_op, linear_ce_kl_per_token_op
from safereg_kernels.spec import LossSpec
from safereg_kernels.topk import TopK


class TokenMetrics(NamedTuple):
    """Of every token that reaches a product, detached float32 of the labels' shape; else 0.

    None where it was not asked for.
    """

    lse: Tensor | None
    """log sum exp of the policy's logits."""
    entropy: Tensor | None
    """Entropy of the policy's softmax at temperature 1, in nats."""
    accuracy: Tensor | None
    """1 where no logit exceeds the label's; 0 where no cross-entropy is wanted."""


def linear_ce_kl(
    policy_hidden: Tensor,
    policy_head: Tensor,
    labels: Tensor,
    *,
    ce_weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
    reference_hidden: Tensor | None = None,
    reference_head: Tensor | None = None,
    direction: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    head_bytes: int | None = None,
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
    reference_lse: Tensor | None = None,
    reference_topk: TopK | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    reduction: str = "sum",
    return_lse: bool = False,
    return_entropy: bool = False,
    return_accuracy: bool = False,
) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, TokenMetrics]:
    """Weighted cross-entropy plus divergence (float32 scalar), and both per token.

    loss = sum_t ce_weights_t (CE_t + z_loss lse_t^2) + kl_weights_t D_t, with logits
    x = scale (hidden @ head.T + bias), then softcap * tanh(x / softcap) where a soft cap is given.

    Args:
        policy_hidden: [tokens, H] or [B, S, H]; differentiable.
        policy_head: [vocab, H], of the same dtype; differentiable (weight-tied heads as well).
        labels: int64 [tokens] or [B, S]; `ignore_index` where there is none.
        ce_weights, kl_weights: like the labels, finite and >= 0; a row with both 0 never reaches a
            matrix product. On the CPU their rows are counted without waiting for the device.
            ce_weights None = 1 for every label; kl_weights None = 0.
        reference_hidden: [tokens, H_ref] (or [B, S, H_ref]), unread where `kl_weights` is 0; None
            if none is positive.
        reference_head: [vocab, H_ref]; None like `reference_hidden`.
        direction: `forward` KL(q||p), `reverse` KL(p||q), `l2` of centred logits, `jsd` of `beta`.
        temperature: divides both logits in the divergence, without T^2; the cross-entropy is at 1.
        chunk_tokens: rows at a time; a bound on memory, never on the result. None = by memory.
        head_bytes: memory for logits and their gradient (a head that is trained in several passes
            takes 4 bytes a weight more); None = `budget.HEAD_BYTES`.
        policy_bias, reference_bias: [vocab] or None.
        policy_softcap, reference_softcap: soft cap of each model's logits, or None.
        policy_logit_scale, reference_logit_scale: factor of each model's logits.
        z_loss: factor of lse^2, which keeps logits from drifting.
        vocab_size: number of tokens; columns from there on are padding, with gradient exactly 0.
        logits_dtype: dtype in which a chunk's logits are kept, float32 or the head's own. Rounded
            logits halve their memory and drown the gradient of a small divergence in noise.
        is_difference: project policy_hidden - reference_hidden where there is a divergence, for
            models that share one head (the same tensor): then the logits' difference keeps its
            digits in any `logits_dtype`.
        ce_report: bool like the labels, rows whose CE is wanted for the log though its weight is 0;
            None = none. It changes `ce`, never the loss or a gradient.
        reference_lse: like the labels, log sum exp(y / T) of the reference where it was stored:
            saves the search for its maximum.
        reference_topk: a stored teacher, in the place of reference_hidden and reference_head.
        shift: hidden states of position s predict the label of s + 1 ([B, S] input). Weights are of
            position s; the last one has none.
        reduction: `sum`, `mean` (over tokens with a weight), or `none`: the loss of every token,
            differentiable under any upstream vector. `none` forms the logits a second time in the
            backward: 4 products in the place of 3, 6 in the place of 4 with a reference.
        return_lse, return_entropy, return_accuracy: a fourth result with what was asked for, from
            the same pass.
    Returns:
        (loss, ce, divergence) and perhaps `TokenMetrics`: `ce` and `divergence` are float32 of the
        labels' shape, detached, and 0 where their weight is 0 (and no report is asked for). The
        gradient of a scalar `loss` honours one upstream scalar of any value. An invalid label makes
        the loss and its row's gradient NaN.
    Raises:
        ShapeError, ValueError: see `checks`.
    Collectives: none. Host synchronisations: none where the weights and `ce_report` are on the CPU,
    else one, to count rows (`ce_weights` None counts as being where the labels are). Under autocast
    hidden states and heads take its dtype; results stay float32. Under `torch.compile` the call is
    one operator of the graph.
    """
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
        has_metrics=return_lse or return_entropy or return_accuracy,
        ignore_index=ignore_index,
        chunk_tokens=chunk_tokens,
        head_bytes=head_bytes,
        has_float32_head_grad=torch.compiler.is_compiling(),
        logits_dtype_name=str(logits_dtype).removeprefix("torch."),
    )
    tensors = HeadTensors(
        policy_hidden, policy_head, policy_bias, labels, ce_weights, kl_weights, ce_report,
        reference_hidden, reference_head, reference_bias, reference_lse, reference_topk,
    )  # fmt: skip
    check_vocab_size(vocab_size, policy_head.shape[0])
    results = run_linear_ce_kl(tensors, call, shift, reduction)
    return metrics_wanted(results, return_lse, return_entropy, return_accuracy)


def metrics_wanted(
    results: tuple[Tensor, Tensor, Tensor, TokenMetrics], lse: bool, entropy: bool, accuracy: bool
) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, TokenMetrics]:
    """The first three results, and the metrics that were asked for where any was."""
    if not (lse or entropy or accuracy):
        return results[:3]
    wanted = (lse, entropy, accuracy)
    kept = (value if keep else None for value, keep in zip(results[3], wanted, strict=True))
    return *results[:3], TokenMetrics(*kept)


@dataclass(frozen=True, slots=True)
class HeadTensors:
    """The tensors of one call, as the caller gives them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    ce_weights: Tensor | None
    kl_weights: Tensor | None
    ce_report: Tensor | None
    reference_hidden: Tensor | None
    reference_weight: Tensor | None
    reference_bias: Tensor | None
    reference_lse: Tensor | None
    topk: TopK | None


class _Flat(NamedTuple):
    """The same with one row per token, every weight given, and labels that are aligned."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    ce_weights: Tensor
    kl_weights: Tensor
    ce_report: Tensor | None
    reference_hidden: Tensor | None
    reference_weight: Tensor | None
    reference_bias: Tensor | None
    reference_lse: Tensor | None
    topk_ids: Tensor | None
    topk_logits: Tensor | None


def run_linear_ce_kl(
    tensors: HeadTensors, call: Call, shift: bool, reduction: str
) -> tuple[Tensor, Tensor, Tensor, TokenMetrics]:
    """`linear_ce_kl` of a whole vocabulary or of a rank's part of it.

    Every metric is there where the call `has_metrics`; else they are empty.
    """
    check_spec(call.spec)
    check_positive(chunk_tokens=call.chunk_tokens, head_bytes=call.head_bytes)
    check_reduction(reduction)
    check_shift(tensors.labels, shift)
    check_one_per_label(
        tensors.hidden,
        tensors.labels,
        ce_weights=tensors.ce_weights,
        kl_weights=tensors.kl_weights,
        ce_report=tensors.ce_report,
        reference_lse=tensors.reference_lse,
    )
    flat = _autocast(_flat(tensors, call, shift))
    _check(flat, call)
    is_needed = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (flat.hidden, flat.weight, flat.bias)
    ]
    frozen = [None if tensor is None else tensor.detach() for tensor in flat[7:]]
    if reduction == "none":
        outputs = linear_ce_kl_per_token_op(*flat[:7], *frozen, call.encoded(), is_needed)
    else:
        outputs = linear_ce_kl_op(*flat[:7], *frozen, None, call.encoded(), is_needed)
    results = HeadResults(*outputs)
    shape = tensors.labels.shape
    loss = results.loss
    if reduction == "none":
        loss = loss.reshape(shape)
    elif reduction == "mean":
        loss = loss / _num_weighted(flat, call).clamp_min(1)
    ce, divergence = results.ce.reshape(shape), results.divergence.reshape(shape)
    metrics = (results.lse, results.entropy, results.accuracy)
    if call.has_metrics:
        metrics = (values.reshape(shape) for values in metrics)
    return loss, ce, divergence, TokenMetrics(*metrics)


def _flat(tensors: HeadTensors, call: Call, shift: bool) -> _Flat:
    labels, topk = tensors.labels, tensors.topk
    ce_weights, kl_weights = tensors.ce_weights, tensors.kl_weights
    if shift:
        aligned = torch.full_like(labels, call.ignore_index)
        aligned[..., :-1] = labels[..., 1:]
        labels = aligned
    if ce_weights is None:
        ce_weights = (labels != call.ignore_index).float()
    if kl_weights is None:
        kl_weights = torch.zeros_like(ce_weights)
    if shift:
        ce_weights, kl_weights = _without_last(ce_weights), _without_last(kl_weights)

    def flat(tensor: Any, dims: int) -> Any:
        return tensor if tensor is None or tensor.ndim == dims else tensor.flatten(0, -dims)

    return _Flat(
        hidden=flat(tensors.hidden, 2),
        weight=tensors.weight,
        bias=tensors.bias,
        labels=flat(labels, 1),
        ce_weights=flat(ce_weights, 1),
        kl_weights=flat(kl_weights, 1),
        ce_report=flat(tensors.ce_report, 1),
        reference_hidden=flat(tensors.reference_hidden, 2),
        reference_weight=tensors.reference_weight,
        reference_bias=tensors.reference_bias,
        reference_lse=flat(tensors.reference_lse, 1),
        topk_ids=None if topk is None else flat(topk.ids, 2),
        topk_logits=None if topk is None else flat(topk.logits, 2),
    )


def _without_last(weights: Tensor) -> Tensor:
    weights = weights.clone()
    weights[..., -1] = 0
    return weights


def _check(flat: _Flat, call: Call) -> None:
    hidden, weight, columns = flat.hidden, flat.weight, flat.weight.shape[0]
    check_policy(
        hidden, weight, flat.bias, flat.labels, ce_weights=flat.ce_weights,
        kl_weights=flat.kl_weights, ce_report=flat.ce_report, reference_lse=flat.reference_lse,
    )  # fmt: skip
    check_logits_dtype(call.logits_dtype, weight)
    is_whole = call.vocab_size is None and call.shard is None
    check_labels(
        flat.labels, flat.ce_weights, flat.ce_report, call.ignore_index,
        columns if is_whole else call.vocab_size,
    )  # fmt: skip
    if flat.topk_ids is not None and flat.topk_logits is not None:
        check_topk(flat.topk_ids, flat.topk_logits, hidden, call.spec, flat.reference_hidden)
        check_topk_ids(flat.topk_ids, flat.kl_weights, columns if is_whole else call.vocab_size)
    elif flat.reference_hidden is not None and flat.reference_weight is not None:
        check_reference(
            hidden, weight, flat.reference_hidden, flat.reference_weight, flat.reference_bias
        )
        if call.spec.is_difference:
            check_difference(weight, flat.bias, flat.reference_weight, flat.reference_bias)


def _num_weighted(flat: _Flat, call: Call) -> Tensor:
    """Number of tokens with a weight, a scalar where the loss is."""
    device = flat.hidden.device
    ce_weights = flat.ce_weights.to(device, non_blocking=True)
    has_ce = (ce_weights != 0) & (flat.labels != call.ignore_index)
    return (has_ce | (flat.kl_weights.to(device, non_blocking=True) != 0)).sum()


def _autocast(flat: _Flat) -> _Flat:
    """Hidden states and heads in the dtype that an autocast of the caller asks for.

    Products would otherwise run in float32, many times slower than all around them.
    """
    device = flat.hidden.device.type
    if not torch.is_autocast_enabled(device):
        return flat
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor | None) -> Any:
        return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)

    names = ("hidden", "weight", "bias", "reference_hidden", "reference_weight", "reference_bias")
    return flat._replace(**{name: cast(getattr(flat, name)) for name in names})
