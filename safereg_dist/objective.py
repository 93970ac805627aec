"""Stage 6: the weight of every token, and the loss from hidden states."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import softplus

from safereg_dist.config import RegularizerConfig
from safereg_dist.regions import HEAD_CE, region
from safereg_dist.types import NO_HEAD, Head, Loss, MicroBatch, Row
from safereg_kernels import linear_ce_kl, vocab_parallel_linear_ce_kl
from safereg_kernels.vocab_parallel import CHUNK_TOKENS

_DIRECTIONS = {"kl_forward": "forward", "kl_reverse": "reverse", "l2_logits": "l2"}
_FIRST_BETAS, _LATER_BETA = (0.5, 2.0, 2.0, 2.0, 2.0), 0.1  # arXiv 2406.05946, section 4.1


class Objective:
    """L of the design: one normaliser N for both terms.

    convex, static   L = 1/N sum_i sum_t [ (1 - b_i) CE_it + b_i D_it ]
    additive         L = 1/N sum_i sum_t [ CE_it + b_i D_it ]
    none             L = 1/N sum_i sum_t CE_it
    token_wise       L = 1/N sum_i sum_t (2 / beta_t) log(1 + exp(beta_t (CE_it - CE'_it)))

    CE' is the reference's cross-entropy, so CE - CE' = log pi_ref(y_t) - log pi(y_t): constrained
    fine-tuning of Qi et al. (2406.05946), where beta_t is 0.5 at the first token of a response, 2
    at the next four, 0.1 after them. The larger beta_t, the sooner a token that has become likelier
    than under the reference stops pulling. (Their script has a mean over each rank's tokens, and
    keeps the factor of dCE at 0.001 or more.)

    Anchor rows carry D alone, with b = 1. N counts the response tokens of all ranks and all
    micro-batches of one optimizer step.
    """

    def __init__(
        self, config: RegularizerConfig, *, chunk_tokens: int | None, head_bytes: int | None
    ) -> None:
        self.reports_tokens = False
        """True: the loss comes with the policy's entropy and accuracy at each token."""
        self._token_wise = config.objective == "token_wise"
        self._task_is_whole = self._token_wise or config.objective == "additive"
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
        """Loss of one micro-batch; `num_tokens` is N, a scalar on the device. Collectives: none.

        Host synchronisations: none, but one with objective `token_wise`.
        """
        assert head.weight is not None
        ce_weights, kl_weights = self.token_weights(batch, kl_coef)
        head_loss: Callable[..., Any] = partial(
            linear_ce_kl,
            hidden,
            head.weight,
            batch.labels,
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
        )
        if self._token_wise and reference_hidden is not None:
            reference = reference_hidden, reference_head
            constraint = self._constraint(head_loss, batch, ce_weights, reference)
            # The divergence of task rows is only reported; anchor rows have it in their loss.
            ce_weights, beyond, divergence = constraint
        else:
            beyond = divergence = None
        total, ce, weighed, *found = head_loss(
            ce_weights=ce_weights,
            kl_weights=kl_weights,
            # The task loss is logged for rows with b = 1 too, whose cross-entropy has weight 0.
            ce_report=self._task_tokens(batch),
            return_entropy=self.reports_tokens,
            return_accuracy=self.reports_tokens,
        )
        if beyond is not None:
            total = total + beyond
        # A non-finite loss makes every gradient of this rank nan, and so the global norm: all
        # ranks skip the step together, without another collective.
        finite = torch.where(torch.isfinite(total.detach()), 1.0, float("nan"))
        loss = total * finite / num_tokens.clamp_min(1)
        entropy, accuracy = (found[0].entropy, found[0].accuracy) if found else (None, None)
        return Loss(loss, ce, weighed if divergence is None else divergence, entropy, accuracy)

    @torch.no_grad()
    def _constraint(
        self,
        head_loss: Callable[..., Any],
        batch: MicroBatch,
        task: Tensor,
        reference: tuple[Tensor, Head],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of `token_wise`, from both models' cross-entropies of the `task` tokens (weight 1).

        (w [T], the loss less sum_t w_t CE_t, D [T]), where dL_t = w_t dCE_t with
        w_t = 2 sigmoid(beta_t (CE_t - CE'_t)), in (0, 2).
        """
        hidden, head = reference
        assert head.weight is not None
        _, ce, divergence = head_loss(ce_weights=task, kl_weights=torch.ones_like(task))
        _, reference_ce, *_ = linear_ce_kl(
            hidden,
            head.weight,
            batch.labels,
            ce_weights=task,
            chunk_tokens=self._chunk_tokens,
            head_bytes=self._head_bytes,
            policy_bias=head.bias,
            policy_softcap=head.softcap,
            policy_logit_scale=head.scale,
        )
        beta, task = (t.to(ce.device, non_blocking=True) for t in (token_betas(batch.rows), task))
        scaled = beta * (ce - reference_ce)
        # Not finite: the value says so, and the head takes no weight that is not.
        weights = task * torch.nan_to_num(2 * scaled.sigmoid(), nan=1.0)
        return weights, (task * 2 / beta * softplus(scaled) - weights * ce).sum(), divergence

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
        task = torch.ones_like(coef) if self._task_is_whole else 1 - coef
        task = torch.where(anchor, 0.0, task)
        if self._token_wise:  # the reference is in the weight of the cross-entropy
            coef = torch.where(anchor, coef, 0.0)
        per_row = torch.stack([task, coef])
        ce_weights, kl_weights = per_row.repeat_interleave(torch.tensor(batch.tokens_of_row), dim=1)
        return ce_weights, kl_weights


def token_betas(rows: Sequence[Row]) -> Tensor:
    """[T] float32 beta_t of `Objective`, by place in the turn of the assistant; on the host."""
    found = []
    for row in rows:
        place = 0
        for position, is_response in enumerate(row.loss_mask):
            if is_response and position > 0:  # nothing predicts the first token of a row
                found.append(_FIRST_BETAS[place] if place < len(_FIRST_BETAS) else _LATER_BETA)
            place = place + 1 if is_response else 0
    return torch.tensor(found, dtype=torch.float32)
