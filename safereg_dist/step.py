"""One step of safety-regularised fine-tuning: the algorithm, in the order in which it runs.

    1  risk          of every row                                       risk/
    2  coefficient   b of every row, from its risk                      coefficient.py
    3  schedule      which rows need the reference; one agreement       reference/
    4  policy        its forward, up to the head                        policy.py
    5  reference     its forward, on the rows that need it              reference/
    6  loss          CE and D, in the head's own call                   objective.py
    7  metrics       what was done, over all ranks                      metrics.py

1 to 3 are `plan`, for all rows of an optimizer step at once; 4 to 6 are a forward of the policy
inside `loss_of`, for each micro-batch; 7 is `close`. `trainer.optimizer_step` puts them together,
and any other loop can. A risk that is read from the policy's own states moves 1 to 3 behind 4.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safereg_dist.coefficient import Coefficient
from safereg_dist.errors import DataError
from safereg_dist.metrics import StepMetrics, StepTotals
from safereg_dist.objective import Objective
from safereg_dist.parallel.comm import Ranks, Result, capture
from safereg_dist.policy import Policy
from safereg_dist.reference import NoReference, Reference, ReferencePasses, ReferenceSchedule
from safereg_dist.risk.stage import ProbedStates, RiskStage
from safereg_dist.types import Loss, MicroBatch, MicroBatchResult, Row, RowRisks


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlan:
    """What is decided for rows before the reference runs: plain values, one for each row."""

    rows: list[Row]
    risk: RowRisks
    kl_coef: list[float]
    """[B] coefficient b of each row."""
    passes: ReferencePasses
    """The reference's passes over all rows of the window, and the agreement on them."""

    def of_places(self, begin: int, end: int) -> "RowPlan":
        """The plan of the rows at places `begin` to `end - 1`."""
        return RowPlan(
            rows=self.rows[begin:end],
            risk=self.risk.of_rows(list(range(begin, end))),
            kl_coef=self.kl_coef[begin:end],
            passes=self.passes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedMicroBatch:
    """One forward and backward of an optimizer step."""

    index: int
    rows: list[Row]
    plan: RowPlan | None
    """The plan of `rows`; None where their risk is read from the policy's states in the forward."""
    is_last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """The rows of one optimizer step on this rank, laid out in micro-batches."""

    step: int
    micro_batches: list[PlannedMicroBatch]
    num_tokens: Tensor
    """N: response tokens of all ranks and micro-batches, a float32 scalar on the device."""
    in_first_epoch: bool
    may_sort: bool
    """False if a stack has formed the micro-batches: rows stay where they are."""
    metrics: StepMetrics
    """Collects the result of each micro-batch as it runs."""


class SafetyRegularizer:
    """The stages around a policy. It holds no trained weights and is independent of the engine."""

    def __init__(
        self,
        policy: Policy | None,
        *,
        risk: RiskStage,
        coefficient: Coefficient,
        reference: Reference | NoReference,
        objective: Objective,
        ranks: Ranks,
    ) -> None:
        """Without a policy it plans and closes steps whose losses a stack computes elsewhere."""
        self._policy = policy
        self.risk = risk
        self.coefficient = coefficient
        self.reference = reference
        self.objective = objective
        self.ranks = ranks
        self.keeps_stack_loss = False
        """True: where no row is active the loss is the stack's own (`is_free`)."""
        self.settings: dict[str, Any] = {}
        """The sections of a configuration that it was made of, but for what was given as an object
        (a risk source, a model)."""

    @property
    def policy(self) -> Policy:
        """The trained model."""
        assert self._policy is not None
        return self._policy

    def bind(self, engine: Callable[..., Any]) -> None:
        """Tells the regulariser which engine runs the policy, once it wraps the model.

        Needed where the policy is its own reference (adapters off); else it does nothing.
        """
        self.reference.bind(engine)

    # ---- before the policy's forward

    def plan(
        self,
        rows: Sequence[Row],
        *,
        step: int,
        micro_batches: int = 1,
        in_first_epoch: bool = True,
    ) -> StepPlan:
        """The plan of one optimizer step over this rank's `rows`, split into `micro_batches`.

        Every rank passes the same number of rows (padded with `data.filler`), a multiple of
        `micro_batches`. Active rows (b > 0) come first, so that the reference runs on them
        together. `in_first_epoch` is False once every rank has planned each of its rows.
        Collectives: one SUM of 8 bytes; the start of one MAX all-reduce of 8 bytes, and before it
        those of the sources of risk (while a cache is cold) and of granularity `batch`.

        Raises:
            DataError: what is no `Row`, or rows that `micro_batches` does not divide; a mistake of
                the loop, and so the same on every rank, is the one error that is not agreed on.
        """
        for row in rows:
            if not isinstance(row, Row):
                raise DataError(
                    f"expected rows of safereg_dist.row_of(id, input_ids, loss_mask, risk=...), "
                    f"got a {type(row).__name__} for step {step}: tokenise it and make it one"
                )
        if micro_batches < 1 or len(rows) % micro_batches:
            raise DataError(
                f"expected a multiple of micro_batches={micro_batches} as the rows of step {step}, "
                f"got {len(rows)}: add safereg_dist.filler rows, or choose another number"
            )
        sizes = [len(rows) // micro_batches] * micro_batches
        return self._plan(rows, sizes, step, in_first_epoch, may_sort=True)

    def open(
        self, batches: Sequence[MicroBatch], *, step: int, in_first_epoch: bool = True
    ) -> StepPlan:
        """The plan of one optimizer step over micro-batches that a stack has formed.

        As `plan`, but rows stay where they are, and their number may differ between ranks; the
        number of micro-batches may not.
        Collectives: as `plan`; the MAX all-reduce has 8 bytes more than 16 for each micro-batch.
        """
        rows = [row for batch in batches for row in batch.rows]
        sizes = [len(batch.rows) for batch in batches]
        error = next((batch.error for batch in batches if batch.error is not None), None)
        return self._plan(rows, sizes, step, in_first_epoch, may_sort=False, error=error)

    def _plan(
        self,
        rows: Sequence[Row],
        sizes: list[int],
        step: int,
        in_first_epoch: bool,
        *,
        may_sort: bool,
        error: Exception | None = None,
    ) -> StepPlan:
        self.risk.begin_step(step)
        num_tokens = self.ranks.total(sum(row.num_response_tokens for row in rows))
        plan = None
        if not self.risk.reads_policy:
            plan = self._decide(rows, None, sizes, in_first_epoch, may_sort=may_sort, error=error)
        ordered = rows if plan is None else plan.rows
        ends = list(accumulate(sizes))
        return StepPlan(
            step=step,
            micro_batches=[
                PlannedMicroBatch(
                    index=index,
                    rows=list(ordered[end - size : end]),
                    plan=plan and plan.of_places(end - size, end),
                    is_last=index == len(sizes) - 1,
                )
                for index, (size, end) in enumerate(zip(sizes, ends, strict=True))
            ],
            num_tokens=num_tokens,
            in_first_epoch=in_first_epoch,
            may_sort=may_sort,
            metrics=StepMetrics(threshold=self.coefficient.threshold),
        )

    def _decide(
        self,
        rows: Sequence[Row],
        probed: ProbedStates | None,
        sizes: list[int],
        in_first_epoch: bool,
        *,
        may_sort: bool,
        error: Exception | None = None,
    ) -> RowPlan:
        """Computes risk, coefficient and schedule of the rows, and starts the agreement.

        If this rank fails, or has failed with `error`, its plan is inert (no risk, b = 0); reading
        the agreement raises the error on all ranks before the plan is used.
        """
        count = len(rows)
        risk = capture(self.risk, rows, probed, in_first_epoch=in_first_epoch)
        if error is not None:
            risk = Result(error=error)  # after the sources, whose collectives all ranks join
        kl_coef = capture(self.coefficient, rows, risk, sizes=sizes)
        schedule = kl_coef.then(
            lambda coef: self.reference.schedule(rows, coef, sizes=sizes, may_sort=may_sort)
        )
        agreement = self.reference.start_agreement(
            schedule, micro_batches=len(sizes), is_sorted=may_sort
        )

        known = schedule.or_else(ReferenceSchedule.of_no_row(sizes, is_sorted=may_sort))
        coef = kl_coef.or_else([0.0] * count)
        return RowPlan(
            rows=[rows[place] for place in known.order],
            risk=risk.or_else(RowRisks.none(count)).of_rows(known.order),
            kl_coef=[coef[place] for place in known.order],
            passes=ReferencePasses(schedule=known, agreement=agreement),
        )

    # ---- the policy's forward, and the rest of the step in its head

    @contextmanager
    def loss_of(
        self, planned: PlannedMicroBatch, batch: MicroBatch, step: StepPlan
    ) -> Iterator[None]:
        """A block in which a forward of the policy over `batch` returns the loss as its logits.

        The loss, float32 and scalar, is this rank's share of L: a sum over tokens divided by the
        global N. Call backward on it unscaled; gradients are summed, not averaged, over ranks.
        Raises, in the forward: the first failed rank's error of `plan`, on all ranks.
        Collectives, in the forward (before it, if the reference runs the policy's own engine): the
        reference's own if any rank needs it; those of `plan` too where the risk is read from the
        policy's states.
        """
        results: list[MicroBatchResult] = []

        def loss(hidden: Tensor, probed: Tensor | None) -> Tensor:
            plan, index = planned.plan, planned.index
            if plan is None:
                assert probed is not None
                own, sizes = ProbedStates(probed, batch.row_begins), [len(planned.rows)]
                plan = self._decide(
                    planned.rows,
                    own,
                    sizes,
                    step.in_first_epoch,
                    may_sort=step.may_sort,
                    error=batch.error,
                )
                index = 0
            states = early or self.reference.hidden_states(plan.passes, index, batch)
            with self.reference.gathered_head(states.needs_head) as reference_head:
                terms = self.objective(
                    _response_states(hidden, batch),
                    self.policy.head,
                    batch,
                    plan.kl_coef,
                    reference_hidden=states.hidden,
                    reference_head=reference_head,
                    num_tokens=step.num_tokens,
                )
            results.append(
                MicroBatchResult(terms, plan.risk, plan.kl_coef, states.rows_run, states.misses)
            )
            return terms.loss

        early = None
        if self.reference.runs_policy:
            assert planned.plan is not None
            early = self.reference.hidden_states(planned.plan.passes, planned.index, batch)
        with self.policy.ending_in(loss):
            yield
        if len(results) != 1:
            raise DataError(
                f"expected one forward of the model that `prepare` was given inside `loss_of`, got "
                f"{len(results)}: call model(input_ids=..., use_cache=False), without labels, in it"
            )
        step.metrics.add(batch, results[0])

    # ---- the forward of a stack that has a loss of its own

    def loss(
        self,
        model: Callable[..., Any],
        inputs: Mapping[str, Any],
        planned: PlannedMicroBatch,
        batch: MicroBatch,
        step: StepPlan,
    ) -> Tensor:
        """This rank's share of L of a micro-batch that a stack has formed, as `loss_of` gives it.

        Where the micro-batch is free it is the model's own loss, over N in place of its own count.
        `inputs` are the arguments of the model's forward, `labels` among them.
        Collectives: the engine's; those of `loss_of` where it is not free.
        """
        if self.is_free(planned):
            loss = model(**inputs, num_items_in_batch=step.num_tokens.clamp_min(1)).loss
            self.add_stack_loss(loss, planned, batch, step)
            return loss
        with self.loss_of(planned, batch, step):
            return model(**{k: v for k, v in inputs.items() if k != "labels"}).logits

    def is_free(self, planned: PlannedMicroBatch) -> bool:
        """Whether a stack's own loss stands: no row of the micro-batch is active on any rank.

        The same on all ranks, but where anchor rows have no reference.

        Raises:
            The first failed rank's error of `plan`, on all ranks.
        Collectives: none, but the agreement is read. One host sync.
        """
        if not self.keeps_stack_loss or planned.plan is None:
            return False
        if self.reference.is_active(planned.plan.passes, planned.index):
            return False
        return not any(row.is_anchor for row in planned.rows)

    def add_stack_loss(
        self, loss: Tensor, planned: PlannedMicroBatch, batch: MicroBatch, step: StepPlan
    ) -> None:
        """Notes the stack's own loss of a free micro-batch, this rank's share of L."""
        assert planned.plan is not None
        own = loss.detach().float()
        terms = Loss(own, own * step.num_tokens, own.new_zeros(batch.num_response_tokens))
        plan = planned.plan
        step.metrics.add(batch, MicroBatchResult(terms, plan.risk, plan.kl_coef, 0, 0))

    # ---- after it

    def close(self, step: StepPlan, *, flags: Mapping[str, bool] | None = None) -> StepTotals:
        """What the step did over all ranks, and this rank's rows of the ledger.

        A flag of the result is true if it is true in `flags` on any rank.
        Collectives: one all-gather, and that of a probe that is being realigned. Two host syncs.
        """
        totals = step.metrics.reduce(
            self.ranks, step=step.step, flags=flags or {}, risk_sums=self.risk.take_sums()
        )
        sums = totals.sums
        found = self.risk.end_step(sums)
        if sums["active_tokens"]:
            found |= self.coefficient.observe(sums["divergence_sum"] / sums["active_tokens"])
        return totals._replace(risk_metrics=found)

    # ---- validation

    @contextmanager
    def task_loss_of(self, batch: MicroBatch) -> Iterator[list[Tensor]]:
        """A block in which a forward of the policy returns the sum of CE over `batch`.

        After the forward, the list that it yields holds the [T] cross-entropies.
        No risk, no reference. Collectives: none.
        """
        found: list[Tensor] = []

        def loss(hidden: Tensor, probed: Tensor | None) -> Tensor:
            terms = self.objective(
                _response_states(hidden, batch),
                self.policy.head,
                batch,
                [0.0] * len(batch.rows),
                num_tokens=hidden.new_ones((), dtype=torch.float32),
            )
            found.append(terms.ce)
            return terms.loss

        with self.policy.ending_in(loss):
            yield found

    # ---- what a checkpoint keeps

    def save_state(self, path: Path) -> dict[str, Any]:
        """Writes the sources' state beside `path`; returns the coefficient's.

        `path` is a file of this rank (`risk0.safetensors`) in your checkpoint; nothing is removed.
        """
        self.risk.save_state(path)
        return self.coefficient.state_dict()

    def load_state(self, path: Path | Sequence[Path], state: Mapping[str, Any]) -> None:
        """Restores what `save_state` wrote and returned.

        `path` is this rank's own; or, where the number of ranks has changed, those of all ranks
        that wrote one.

        Raises:
            CheckpointError: a file is missing, unreadable, or belongs to another source of risk.
        """
        self.coefficient.load_state_dict(state)
        if isinstance(path, Path):
            self.risk.load_state(path)
        else:
            self.risk.load_states(path)


def _response_states(hidden: Tensor, batch: MicroBatch) -> Tensor:
    """[T, H] states that predict the response tokens, selected from [B, S, H]."""
    return hidden.flatten(0, 1).index_select(0, batch.response_index)
