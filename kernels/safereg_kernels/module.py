"""`LinearCEKL`: `linear_ce_kl` as a module, options at construction, tensors in the call."""

import inspect
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from safereg_kernels.checks import check_positive, check_reduction, check_spec, check_vocab_size
from safereg_kernels.linear_ce_kl import TokenMetrics, linear_ce_kl
from safereg_kernels.spec import LossSpec
from safereg_kernels.topk import TopK


class LinearCEKL(nn.Module):
    """Weighted cross-entropy plus divergence, from hidden states and heads; no parameters.

    loss = sum_t ce_weights_t (CE_t + z_loss lse_t^2) + kl_weights_t D_t

    Every option means what it means in `linear_ce_kl`. What depends on no tensor is refused at
    construction.

    Raises:
        ShapeError, ValueError: see `checks`.
    """

    def __init__(
        self,
        *,
        direction: str = "forward",
        beta: float = 0.5,
        temperature: float = 1.0,
        z_loss: float = 0.0,
        policy_softcap: float | None = None,
        reference_softcap: float | None = None,
        policy_logit_scale: float = 1.0,
        reference_logit_scale: float = 1.0,
        is_difference: bool = False,
        chunk_tokens: int | None = None,
        head_bytes: int | None = None,
        logits_dtype: torch.dtype = torch.float32,
        vocab_size: int | None = None,
        ignore_index: int = -100,
        shift: bool = False,
        reduction: str = "sum",
        return_lse: bool = False,
        return_entropy: bool = False,
        return_accuracy: bool = False,
    ) -> None:
        super().__init__()
        self._options: dict[str, Any] = {
            "direction": direction,
            "beta": beta,
            "temperature": temperature,
            "z_loss": z_loss,
            "policy_softcap": policy_softcap,
            "reference_softcap": reference_softcap,
            "policy_logit_scale": policy_logit_scale,
            "reference_logit_scale": reference_logit_scale,
            "is_difference": is_difference,
            "chunk_tokens": chunk_tokens,
            "head_bytes": head_bytes,
            "logits_dtype": logits_dtype,
            "vocab_size": vocab_size,
            "ignore_index": ignore_index,
            "shift": shift,
            "reduction": reduction,
            "return_lse": return_lse,
            "return_entropy": return_entropy,
            "return_accuracy": return_accuracy,
        }
        of_spec = {field.name for field in fields(LossSpec)} & self._options.keys()
        check_spec(LossSpec(**{name: self._options[name] for name in of_spec}))
        check_positive(chunk_tokens=chunk_tokens, head_bytes=head_bytes)
        check_reduction(reduction)
        check_vocab_size(vocab_size, None)
        if not logits_dtype.is_floating_point:
            raise ValueError(
                f"logits_dtype must be torch.float32 or the head's own, got {logits_dtype}"
            )

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        defaults = inspect.signature(type(self).__init__).parameters
        return ", ".join(
            f"{name}={value!r}"
            for name, value in self._options.items()
            if name not in defaults or value != defaults[name].default
        )

    def forward(
        self,
        policy_hidden: Tensor,
        policy_head: Tensor,
        labels: Tensor,
        *,
        ce_weights: Tensor | None = None,
        kl_weights: Tensor | None = None,
        reference_hidden: Tensor | None = None,
        reference_head: Tensor | None = None,
        policy_bias: Tensor | None = None,
        reference_bias: Tensor | None = None,
        ce_report: Tensor | None = None,
        reference_lse: Tensor | None = None,
        reference_topk: TopK | None = None,
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, TokenMetrics]:
        """(loss, ce, divergence), and `TokenMetrics` where a return_* is set: see `linear_ce_kl`.

        Args:
            policy_hidden: [tokens, H] or [B, S, H]; the policy's head is [vocab, H].
            labels: int64 [tokens] or [B, S], and so every weight, report and result.
        Raises:
            ShapeError, ValueError: see `checks`.
        """
        return linear_ce_kl(
            policy_hidden,
            policy_head,
            labels,
            ce_weights=ce_weights,
            kl_weights=kl_weights,
            reference_hidden=reference_hidden,
            reference_head=reference_head,
            policy_bias=policy_bias,
            reference_bias=reference_bias,
            ce_report=ce_report,
            reference_lse=reference_lse,
            reference_topk=reference_topk,
            **self._options,
        )
