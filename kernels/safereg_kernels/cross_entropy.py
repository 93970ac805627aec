"""`linear_cross_entropy`: `linear_ce_kl` for those who have no reference."""

from torch import Tensor

from safereg_kernels.linear_ce_kl import TokenMetrics, linear_ce_kl


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    shift: bool = False,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
    head_bytes: int | None = None,
    vocab_size: int | None = None,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_accuracy: bool = False,
) -> Tensor | tuple[Tensor, TokenMetrics]:
    """Cross-entropy of logits that are never all there: float32 scalar, or the labels' shape.

    loss = sum_t (lse_t - x_t[label_t] + z_loss lse_t^2) / N,   lse_t = log sum_v exp x_tv
    x = softcap tanh(logit_scale raw / softcap),   raw = hidden @ head.T + bias

    N is the number of labels that count (at least 1; torch's `cross_entropy` gives NaN where none
    does), 1 for `reduction="sum"`; `"none"` gives each token's summand.

    Args:
        hidden: [tokens, H] or [B, S, H]; differentiable.
        head: [vocab, H], of the same dtype; differentiable.
        labels: int64, [tokens] or [B, S] like `hidden`; `ignore_index` where none counts: such a
            token never reaches a matrix product.
        bias: [vocab] or None; differentiable.
        softcap, logit_scale: x as above; no cap = x is the scaled raw logit.
        z_loss: factor of lse^2, >= 0.
        shift: [B, S] only: position s predicts labels[:, s + 1], the last one nothing.
        reduction: `mean`, `sum` or `none`.
        chunk_tokens, head_bytes, vocab_size: see `linear_ce_kl`.
        return_lse, return_entropy, return_accuracy: return (loss, TokenMetrics) instead.
    Raises:
        ShapeError, ValueError: see `checks`.
    Collectives: none. Host synchronisations: one on CUDA, to count the labels that count. Under
    autocast hidden states and head take its dtype. Under `torch.compile` one operator of the graph.
    """
    loss, _, _, *metrics = linear_ce_kl(
        hidden,
        head,
        labels,
        policy_bias=bias,
        policy_softcap=softcap,
        policy_logit_scale=logit_scale,
        z_loss=z_loss,
        ignore_index=ignore_index,
        shift=shift,
        reduction=reduction,
        chunk_tokens=chunk_tokens,
        head_bytes=head_bytes,
        vocab_size=vocab_size,
        return_lse=return_lse,
        return_entropy=return_entropy,
        return_accuracy=return_accuracy,
    )
    return (loss, metrics[0]) if metrics else loss
