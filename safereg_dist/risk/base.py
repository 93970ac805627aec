"""Stage 3: one signal of risk for every row, on the rank that owns it."""

from typing import Protocol

from torch import Tensor

from safereg_dist.types import MicroBatch

Risk = list[float | None]
"""[B] risk in [0, 1] of each row, nan where it failed, None on anchor rows and without a source."""


class RiskEstimator(Protocol):
    """What `stage.RiskStage` asks of a signal."""

    @property
    def name(self) -> str:
        """Goes to the ledger."""
        ...

    @property
    def notes(self) -> dict[int, str]:
        """What the ledger shall say of rows of the last call, by row; mostly nothing."""
        ...

    def __call__(self, batch: MicroBatch, policy_states: Tensor | None) -> Risk:
        """Risk of every row; `policy_states` is [B, S, H] of the probed layer, where asked for."""
        ...


class NoRisk:
    """Every row is harmless."""

    name = "none"
    notes: dict[int, str] = {}  # noqa: RUF012 - never filled

    def __call__(self, batch: MicroBatch, policy_states: Tensor | None) -> Risk:
        """None for every row. Collectives: none."""
        return [None] * len(batch.rows)


class ColumnRisk:
    """The `risk` field of the data, checked when the data was read."""

    name = "column"
    notes: dict[int, str] = {}  # noqa: RUF012 - never filled

    def __call__(self, batch: MicroBatch, policy_states: Tensor | None) -> Risk:
        """The rows' own risk. Collectives: none."""
        return [None if row.is_anchor else row.risk for row in batch.rows]
