"""One step of safety-regularised fine-tuning: the algorithm, from a micro-batch to its loss.

    batch -> policy trunk -> risk -> coefficient -> agree -> reference trunk -> head: CE, D -> loss

Each stage is one file of this package: `batch`, `policy`, `risk/`, `coefficient`, `reference`,
`objective`. This module is the differentiable part, so any engine (DeepSpeed, plain torch) wraps
and hooks it as usual, and the head's weight is whole inside its forward.
"""

from torch import Tensor, nn

from safereg_dist.coefficient import Coefficient
from safereg_dist.objective import Objective
from safereg_dist.parallel.comm import held
from safereg_dist.policy import Policy
from safereg_dist.reference import NoReference, Reference
from safereg_dist.risk.stage import RiskStage
from safereg_dist.types import MicroBatch, RowRisks, StepOutput


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

    def forward(self, batch: MicroBatch, num_tokens: Tensor) -> StepOutput:
        """Loss and log values of one micro-batch; `num_tokens` is the global N, on the device.

        Collectives: one 8-byte MAX all-reduce, then the reference's own if any rank needs it
        (before it, those of the risk estimator while its cache is cold, and one of 16 bytes with
        granularity `batch`). In evaluation mode the task loss alone, without any of these.
        """
        hidden, probed = self.policy(batch)
        if not self.training:
            return self._validate(batch, hidden, num_tokens)
        risk = held(self.risk, batch, probed)
        kl_coef = held(self.coefficient, batch.rows, risk)
        passes = self.reference.agree_on_passes(batch, kl_coef)
        reference_hidden, reference_rows = self.reference.hidden_states(
            batch, kl_coef, passes=passes
        )
        with self.reference.gathered_head(passes=passes) as reference_head:
            loss, ce, divergence = self.objective(
                hidden,
                self.policy.head,
                batch,
                kl_coef,
                reference_hidden=reference_hidden,
                reference_head=reference_head,
                num_tokens=num_tokens,
            )
        return StepOutput(loss, ce, divergence, risk, kl_coef, reference_rows)

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
