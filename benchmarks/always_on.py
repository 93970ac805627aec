"""The peer of `bench_overhead.py`: an always-on reference with full logits, for every row.

This is what the single-GPU script of arXiv 2602.17546, and the trainers of TRL and LLaMA-Factory
that anchor fine-tuning to a reference, do in each micro-batch, written here on our own interfaces
so that both sides have the same ZeRO-3 engines, groups, rows, optimizer and loss L:

    policy and reference run whole, over all rows: logits [B, S, V] of both
    CE and KL(reference || policy) at every position of every row, prompt and padding included
    then masked to response tokens and weighted by the rows' coefficients b

What is ours in `safereg_dist` and not here: rows with b = 0 kept from the reference, response
tokens alone in the head, no [B, S, V] tensor. `trainer.optimizer_step` runs both.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, pad
from transformers import PreTrainedModel

from safereg_dist.coefficient import DEFAULT_THRESHOLD, scheduled
from safereg_dist.config import Config, RegularizerConfig, RiskConfig, replace
from safereg_dist.factory import Run, build_run, resolve_model
from safereg_dist.parallel.engine import Backend, ReferenceEngine
from safereg_dist.regions import REFERENCE_TRUNK, region
from safereg_dist.step import PlannedMicroBatch, SafetyRegularizer, StepPlan
from safereg_dist.types import Loss, MicroBatch, MicroBatchResult, Row, RowRisks


class WholeModel(nn.Module):
    """A causal language model, head included, under the interface of a reference's trunk."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, S, V] logits."""
        return self.model(input_ids=input_ids, use_cache=False).logits


class AlwaysOn:
    """Stands where a `SafetyRegularizer` does: a whole reference is asked about every row."""

    def __init__(
        self, plain: SafetyRegularizer, reference: ReferenceEngine, config: RegularizerConfig
    ) -> None:
        """`plain` is that of plain fine-tuning: it lays the rows out, and adds up what was done."""
        self.plan, self.close = plain.plan, plain.close
        self._model = plain.policy.model
        self._reference = reference
        self._config = config

    @contextmanager
    def loss_of(
        self, planned: PlannedMicroBatch, batch: MicroBatch, step: StepPlan
    ) -> Iterator[None]:
        """A block in which a forward of the policy returns the loss in place of its logits.

        It is computed from them, after the whole forward. Collectives: the reference's, every time.
        """
        results: list[MicroBatchResult] = []

        def loss(module: nn.Module, args: object, output: Any) -> None:
            with region(REFERENCE_TRUNK):
                reference_logits = self._reference(batch.input_ids)
            kl_coef = [self._coefficient(row) for row in batch.rows]
            terms = full_logits_loss(
                output.logits, reference_logits, batch, kl_coef, step.num_tokens
            )
            count = len(batch.rows)
            results.append(MicroBatchResult(terms, RowRisks.none(count), kl_coef, count, 0))
            output.logits = terms.loss

        hook = self._model.register_forward_hook(loss)
        try:
            yield
        finally:
            hook.remove()
        step.metrics.add(batch, *results)

    def _coefficient(self, row: Row) -> float:
        assert row.risk is not None  # the risk is the data's column
        return scheduled(row.risk, self._config, DEFAULT_THRESHOLD)


def full_logits_loss(
    policy_logits: Tensor,
    reference_logits: Tensor,
    batch: MicroBatch,
    kl_coef: list[float],
    num_tokens: Tensor,
) -> Loss:
    """1/N sum_i sum_t [(1 - b_i) CE_it + b_i KL_it] from [B, S, V] logits of both models."""
    labels = batch.input_ids[:, 1:]
    policy, reference = policy_logits[:, :-1].float(), reference_logits[:, :-1].float()
    ce = cross_entropy(policy.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    kl = kl_div(
        log_softmax(policy, dim=-1),
        log_softmax(reference, dim=-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    mask = torch.zeros_like(batch.input_ids, dtype=ce.dtype)
    mask.view(-1)[batch.response_index] = 1.0
    coef = torch.tensor(kl_coef, device=ce.device)[:, None]
    loss = (((1 - coef) * ce + coef * kl) * mask[:, :-1]).sum() / num_tokens.clamp_min(1)
    return Loss(loss, _at_response(ce, batch), _at_response(kl, batch))


def _at_response(values: Tensor, batch: MicroBatch) -> Tensor:
    """[T] of [B, S - 1] values, for the log."""
    return pad(values.detach(), (0, 1)).flatten().index_select(0, batch.response_index)


def build_always_on(config: Config, backend: Backend) -> Run:
    """A run of the peer, from the configuration of our own arm.

    Collectives: those of loading and wrapping; every rank calls it.
    """
    plain = build_run(
        replace(
            config,
            risk=RiskConfig(estimator="none"),
            regularizer=replace(config.regularizer, objective="none"),
        ),
        backend,
    )
    reference = backend.load_model(
        resolve_model(config.reference.model or config.model, backend.ranks),
        precision=config.train.precision,
        offload=config.reference.offload,
    )
    engine = backend.wrap_reference(
        WholeModel(reference),
        offload=config.reference.offload,
        rows=config.train.micro_batch_size,
    )
    peer: Any = AlwaysOn(plain.regularizer, engine, config.regularizer)
    return dataclasses.replace(plain, regularizer=peer)
