"""The peer of `bench_overhead.py`: an always-on reference with full logits, for every row.

This is what the single-GPU script of arXiv 2602.17546, and the trainers of TRL and LLaMA-Factory
that anchor fine-tuning to a reference, do in each micro-batch, written here on our own interfaces
so that both sides have the same ZeRO-3 engines, groups, rows, optimizer and loss L:

    policy and reference run whole, over all rows: logits [B, S, V] of both
    CE and KL(reference || policy) at every position of every row, prompt and padding included
    then masked to response tokens and weighted by the rows' coefficients b

What is ours in `safereg_dist` and not here: rows with b = 0 kept from the reference, response
tokens alone in the head, no [B, S, V] tensor.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import PreTrainedModel

from safereg_dist.coefficient import DEFAULT_THRESHOLD, scheduled
from safereg_dist.config import Config
from safereg_dist.data import split
from safereg_dist.factory import resolve_model
from safereg_dist.parallel.engine import Backend, PolicyEngine, ReferenceEngine
from safereg_dist.regions import REFERENCE_TRUNK, region
from safereg_dist.types import MicroBatch, Row


class AlwaysOnOutput(NamedTuple):
    """What one micro-batch gives."""

    loss: Tensor
    """float32 scalar, this rank's share of L."""
    reference_rows: int
    """Rows that the reference ran on: all."""


class WholeModel(nn.Module):
    """A causal language model, head included, under the interface of a reference's trunk."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, S, V] logits."""
        return self.model(input_ids=input_ids, use_cache=False).logits


class AlwaysOnStep(nn.Module):
    """The trained module: whole policy, and a whole reference that is asked about every row."""

    def __init__(self, policy: PreTrainedModel, reference: ReferenceEngine, config: Config) -> None:
        super().__init__()
        self.policy = WholeModel(policy)
        self._reference = reference  # an engine, not a module: its weights are not the policy's
        self._regularizer = config.regularizer

    def micro_batches(self, window: MicroBatch, count: int) -> Iterator[tuple[MicroBatch, None]]:
        """The rows of one optimizer step as `count` micro-batches, in their own order."""
        size = len(window.rows) // count
        yield from ((batch, None) for batch in split(window, range(len(window.rows)), size))

    def forward(self, batch: MicroBatch, num_tokens: Tensor, ahead: None = None) -> AlwaysOnOutput:
        """This rank's share of L. Collectives: the engines', reference included, every time."""
        policy_logits = self.policy(batch.input_ids)
        with region(REFERENCE_TRUNK):
            reference_logits = self._reference(batch.input_ids)
        kl_coef = [self._coefficient(row) for row in batch.rows]
        loss = full_logits_loss(policy_logits, reference_logits, batch, kl_coef, num_tokens)
        return AlwaysOnOutput(loss, len(batch.rows))

    def head_parameters(self) -> list[nn.Parameter]:
        """None: the head runs inside its own module, where engines gather it anyway."""
        return []

    def _coefficient(self, row: Row) -> float:
        assert row.risk is not None  # the risk is the data's column
        return scheduled(row.risk, self._regularizer, DEFAULT_THRESHOLD)


def full_logits_loss(
    policy_logits: Tensor,
    reference_logits: Tensor,
    batch: MicroBatch,
    kl_coef: list[float],
    num_tokens: Tensor,
) -> Tensor:
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
    return (((1 - coef) * ce + coef * kl) * mask[:, :-1]).sum() / num_tokens.clamp_min(1)


def build_always_on(config: Config, backend: Backend) -> tuple[AlwaysOnStep, PolicyEngine]:
    """Step and training engine of the peer, from the configuration of our own arm.

    Collectives: those of loading and wrapping; every rank calls it.
    """
    precision = config.train.precision
    folder = resolve_model(config.model, backend.ranks)
    policy = backend.load_model(folder, precision=precision, offload=config.engine.offload_params)
    reference = backend.load_model(
        resolve_model(config.reference.model or config.model, backend.ranks),
        precision=precision,
        offload=config.reference.offload,
    )
    engine = backend.wrap_reference(
        WholeModel(reference),
        offload=config.reference.offload,
        rows=config.train.micro_batch_size,
    )
    step = AlwaysOnStep(policy, engine, config)
    step.train()
    return step, backend.wrap_policy(step, config=config)
