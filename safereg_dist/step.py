"""One step of safety-regularised fine-tuning: the algorithm, from a micro-batch to its loss.

    batch -> policy trunk -> risk -> coefficient -> agree -> reference trunk -> head: CE, D -> loss

Each stage is one file of this package: `batch`, `policy`, `risk/`, `coefficient`, `reference`,
`objective`. This module is the differentiable part, so any engine (DeepSpeed, plain torch) wraps
and hooks it as usual, and the head's weight is whole inside its forward.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from safereg_dist.coefficient import Coefficient
from safereg_dist.data import split
from safereg_dist.objective import Objective
from safereg_dist.parallel.comm import held
from safereg_dist.policy import Policy
from safereg_dist.reference import NoReference, NoWindow, Reference, Window
from safereg_dist.risk.combine import RiskStage
from safereg_dist.types import MicroBatch, RowRisks, StepOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """What is known of a micro-batch before the policy has seen it."""

    risk: RowRisks
    kl_coef: list[float]
    window: Window | NoWindow
    """Where its reference states come from; also what raises, on all ranks, if risk failed here."""
    index: int
    """Its place in the window."""

    def of_rows(self, rows: list[int], index: int) -> "Ahead":
        """The same of the rows of one micro-batch; a failure stays as it is."""
        if isinstance(self.kl_coef, Exception):
            return replace(self, index=index)
        coef = [self.kl_coef[row] for row in rows]
        return replace(self, risk=self.risk.of_rows(rows), kl_coef=coef, index=index)


class RegularizedStep(nn.Module):
    """The trained module: a policy and the stages around it (which hold no trained weights)."""

    def __init__(
        self,
        policy: Policy,
        *,
        risk: RiskStage,
        coefficient: Coefficient,
        reference: Reference | NoReference,
        objective: Objective,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.risk = risk
        self.coefficient = coefficient
        self.reference = reference  # not a module: its weights must not join the policy's
        self.objective = objective

    def micro_batches(
        self, window: MicroBatch, count: int
    ) -> Iterator[tuple[MicroBatch, Ahead | None]]:
        """The rows of one optimizer step as `count` micro-batches, for `forward` one by one.

        Where risk does not depend on the policy's states, it is known for the whole window now, and
        risky rows are brought together, so that the reference runs on them once; else None.
        Collectives: the start of one MAX all-reduce (see `Window`), and before it those of the
        estimator (while a cache is cold) and of granularity `batch`.
        """
        size = len(window.rows) // count
        if self.risk.reads_policy:
            yield from ((batch, None) for batch in split(window, range(len(window.rows)), size))
            return
        ahead = self._look_at(window, None, count=count)
        order = ahead.window.order
        for index, batch in enumerate(split(window, order, size)):
            yield batch, ahead.of_rows(order[index * size : (index + 1) * size], index)

    def forward(
        self, batch: MicroBatch, num_tokens: Tensor, ahead: Ahead | None = None
    ) -> StepOutput:
        """Loss and log values of one micro-batch; `num_tokens` is the global N, on the device.

        Collectives: without `ahead` those of `micro_batches`; then the reference's own if any rank
        needs it. In evaluation mode the task loss alone, without any of these.
        """
        hidden, probed = self.policy(batch)
        if not self.training:
            return self._validate(batch, hidden, num_tokens)
        if ahead is None:
            ahead = self._look_at(batch, probed)
        states = ahead.window.states(ahead.index, batch)
        with self.reference.gathered_head(states.needs_head) as reference_head:
            loss, ce, divergence = self.objective(
                hidden,
                self.policy.head,
                batch,
                ahead.kl_coef,
                reference_hidden=states.hidden,
                reference_head=reference_head,
                num_tokens=num_tokens,
            )
        return StepOutput(
            loss, ce, divergence, ahead.risk, ahead.kl_coef, states.rows_run, states.misses
        )

    def _look_at(self, batch: MicroBatch, probed: Tensor | None, *, count: int = 1) -> Ahead:
        """Risk, coefficient and window of rows; what fails here is raised by `window.states`."""
        risk = held(self.risk, batch, probed)
        kl_coef = held(self.coefficient, batch.rows, risk, count)
        window = self.reference.open(batch.rows, kl_coef, micro_batches=count)
        return Ahead(risk=risk, kl_coef=kl_coef, window=window, index=0)

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters used here, outside their own module: engines must gather them for us."""
        return self.policy.head.parameters

    def _validate(self, batch: MicroBatch, hidden: Tensor, num_tokens: Tensor) -> StepOutput:
        unweighted = [0.0] * len(batch.rows)
        loss, ce, divergence = self.objective(
            hidden, self.policy.head, batch, unweighted, num_tokens=num_tokens
        )
        risk = RowRisks([None] * len(batch.rows), {}, ["none"] * len(batch.rows), {})
        return StepOutput(loss, ce, divergence, risk, unweighted, 0)
