"""Stage 6: the weight of every token, and the loss from hidden states."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from safereg_dist.config import RegularizerConfig
from safereg_dist.regions import HEAD_CE, region
from safereg_dist.types import NO_HEAD, Head, Loss, MicroBatch
from safereg_kernels import linear_ce_kl, vocab_parallel_linear_ce_kl
from safereg_kernels.vocab_parallel import CHUNK_TOKENS

_DIRECTIONS = {"kl_forward": "forward", "kl_reverse": "reverse", "l2_logits": "l2"}


class Objective:
    """L of the design: one normaliser N for both terms.

    convex, static   L = 1/N sum_i sum_t [ (1 - b_i) CE_it + b_i D_it ]
    additive         L = 1/N sum_i sum_t [ CE_it + b_i D_it ]
    none             L = 1/N sum_i sum_t CE_it

    Anchor rows carry D alone, with b = 1. N counts the response tokens of all ranks and all
    micro-batches of one optimizer step.
    """

    def __init__(
        self, config: RegularizerConfig, *, chunk_tokens: int | None, head_bytes: int | None
    ) -> None:
        self.reports_tokens = False
        """True: the loss comes with the policy's entropy and accuracy at each token."""
        self._additive = config.objective == "additive"
        self._direction = _DIRECTIONS[config.divergence]
        self._chunk_tokens = chunk_tokens
        self._head_bytes = head_bytes

    @region(HEAD_CE)
    def __call__(
        self,
        hidden: Tensor,
        head: Head,
        batch: MicroBatch,
        kl_coef: list[float],
        *,
        num_tokens: Tensor,
        reference_hidden: Tensor | None = None,
        reference_head: Head = NO_HEAD,
    ) -> Loss:
        """Loss of one micro-batch; `num_tokens` is N, a scalar on the device. Collectives: none."""
        assert head.weight is not None
        ce_weights, kl_weights = self.token_weights(batch, kl_coef)
        total, ce, divergence, *found = linear_ce_kl(
            hidden,
            head.weight,
            batch.labels,
            ce_weights=ce_weights,
            kl_weights=kl_weights,
            reference_hidden=reference_hidden,
            reference_head=reference_head.weight,
            direction=self._direction,
            chunk_tokens=self._chunk_tokens,
            head_bytes=self._head_bytes,
            policy_bias=head.bias,
            reference_bias=reference_head.bias,
            policy_softcap=head.softcap,
            reference_softcap=reference_head.softcap,
            policy_logit_scale=head.scale,
            reference_logit_scale=reference_head.scale,
            # The task loss is logged for rows with b = 1 too, whose cross-entropy has weight 0.
            ce_report=self._task_tokens(batch),
            return_entropy=self.reports_tokens,
            return_accuracy=self.reports_tokens,
        )
        # A non-finite loss makes every gradient of this rank nan, and so the global norm: all
        # ranks skip the step together, without another collective.
        finite = torch.where(torch.isfinite(total.detach()), 1.0, float("nan"))
        loss = total * finite / num_tokens.clamp_min(1)
        entropy, accuracy = (found[0].entropy, found[0].accuracy) if found else (None, None)
        return Loss(loss, ce, divergence, entropy, accuracy)

    @region(HEAD_CE)
    def of_tokens(
        self,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        ce_weights: Tensor,
        kl_weights: Tensor,
        *,
        tp_group: ProcessGroup,
        vocab_start: int,
        reduce_hidden_grad: bool,
        reference_hidden: Tensor | None = None,
        reference_head: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(sum, CE [T], D [T]) of tokens with weights of their own, the vocabulary over a group.

        Not divided by N. Collectives: see `vocab_parallel_linear_ce_kl`.
        """
        assert head.weight is not None
        return vocab_parallel_linear_ce_kl(  # type: ignore[return-value]
            hidden,
            head.weight,
            labels,
            ce_weights=ce_weights,
            kl_weights=kl_weights,
            reference_hidden=reference_hidden,
            reference_head=reference_head,
            direction=self._direction,
            chunk_tokens=self._chunk_tokens or CHUNK_TOKENS,
            tp_group=tp_group,
            vocab_start=vocab_start,
            reduce_hidden_grad=reduce_hidden_grad,
            ce_report=torch.ones_like(labels, dtype=torch.bool),
        )

    @staticmethod
    def _task_tokens(batch: MicroBatch) -> Tensor:
        task = torch.tensor([not row.is_anchor for row in batch.rows])
        return task.repeat_interleave(torch.tensor(batch.tokens_of_row))

    def token_weights(self, batch: MicroBatch, kl_coef: list[float]) -> tuple[Tensor, Tensor]:
        """(ce_weights, kl_weights), each float32 [T], before division by N.

        They are on the host, so that counting the rows with a weight needs no device
        synchronisation.
        """
        coef = torch.tensor(kl_coef, dtype=torch.float32)
        anchor = torch.tensor([row.is_anchor for row in batch.rows])
        task = torch.ones_like(coef) if self._additive else 1 - coef
        task = torch.where(anchor, 0.0, task)
        per_row = torch.stack([task, coef])
        ce_weights, kl_weights = per_row.repeat_interleave(torch.tensor(batch.tokens_of_row), dim=1)
        return ce_weights, kl_weights
