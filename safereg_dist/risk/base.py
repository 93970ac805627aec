"""A source of risk: what it is asked for, and what it may do besides; and the two simplest ones."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from safereg_dist.types import Row

Risk = list[float | None]
"""[B] risk in [0, 1] of each row, nan where it failed, None on anchor rows and without a source."""


class ProbedStates(NamedTuple):
    """Hidden states of the policy, as they are when its forward has come to the head."""

    hidden: Tensor
    """[B, S, H] output of the probed decoder layer, detached."""
    attention_mask: Tensor
    """[B, S] 1 on real tokens; rows may be padded on either side."""


class RiskSource:
    """The risk of a rank's rows, from the rank's own data. The base class knows no risk.

    Whoever writes a source overrides `__call__`, and of the rest what it needs. Every rank calls
    every method in the same order.
    """

    name = "none"
    """Goes to the ledger."""
    reads_policy: bool = False
    """True where risk is known only after the policy's forward; the same on all ranks."""
    looks_ahead: bool = False
    """True where `prefetch` does something."""
    sum_names: tuple[str, ...] = ()
    """Names of this rank's counts; they are summed over ranks with the step's metrics."""
    notes: Mapping[int, str] = {}
    """What the ledger shall say of rows of the last call, by row; mostly nothing."""

    def __call__(
        self, rows: Sequence[Row], probed: ProbedStates | None = None, *, in_first_epoch: bool
    ) -> Risk:
        """Risk of every row; None for each here. Collectives: none.

        `probed` is there where the source reads the policy. `in_first_epoch` is the same on all
        ranks: once it is False, every rank has been asked about all its rows before.
        """
        return [None] * len(rows)

    def prefetch(self, rows: Iterable[Row]) -> None:
        """Takes rows of coming steps to work on in the background; never waits."""

    def begin_step(self, step: int) -> None:
        """An optimizer step begins."""

    def take_sums(self) -> dict[str, float]:
        """This rank's counts (`sum_names`) since the last call."""
        return {}

    def end_step(self, total: Mapping[str, float]) -> dict[str, float | int]:
        """Metrics of the step from the counts of all ranks; the source may act on them."""
        return {}

    def save_state(self, path: Path) -> None:
        """Writes what the source has to remember, to this file and beside it."""

    def load_state(self, path: Path) -> None:
        """Restores what `save_state` wrote.

        Raises:
            CheckpointError: a file is missing, unreadable, or belongs to another source.
        """


class ColumnRisk(RiskSource):
    """The `risk` field of the data, checked when the data was read."""

    name = "column"

    def __call__(
        self, rows: Sequence[Row], probed: ProbedStates | None = None, *, in_first_epoch: bool
    ) -> Risk:
        """The rows' own risk. Collectives: none."""
        return [None if row.is_anchor else row.risk for row in rows]
