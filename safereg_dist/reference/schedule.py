"""Which rows of a window share the reference's passes, and in which order they train.

One active row (b > 0) on any rank makes all ranks gather the reference, layer by layer. So a rank's
rows of a whole accumulation window are brought together: active rows come first (the loss is a sum
over the window, so their order changes nothing but rounding), the reference runs on them at once,
and its states wait for their micro-batches. What ranks must agree on is then one number, the most
active rows of any rank: it tells how many passes there are, and which micro-batches need the head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from safereg_dist.models.fingerprint import row_key
from safereg_dist.reference.store import ReferenceStore
from safereg_dist.types import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceSchedule:
    """What one rank needs of the reference for a window. Places count in the order of training."""

    order: list[int]
    """Rows of the window in the order in which they are trained: active rows first."""
    to_run: dict[int, Row]
    """By place: the active rows that the trunk has to run on."""
    stored: dict[int, Tensor]
    """By place: states of the other active rows, mapped from the files of the store."""

    @classmethod
    def of_no_row(cls, num_rows: int) -> "ReferenceSchedule":
        """Rows as they come, of which the reference is asked for none."""
        return cls(order=list(range(num_rows)), to_run={}, stored={})

    @property
    def num_active(self) -> int:
        """Active rows of this rank."""
        return len(self.to_run) + len(self.stored)


def schedule_rows(
    rows: Sequence[Row],
    kl_coef: Sequence[float],
    *,
    micro_batches: int,
    store: ReferenceStore | None = None,
) -> ReferenceSchedule:
    """The schedule of a window; rows of a single micro-batch keep their order. Collectives: none.

    Raises:
        CheckpointError: the store holds a row and cannot give it.
    """
    active = active_rows(kl_coef, rows)
    stored = {} if store is None else _stored_states(store, rows, active)
    order = list(range(len(rows)))
    if micro_batches > 1:
        first = [*(i for i in active if i not in stored), *stored]
        chosen = set(first)
        order = [*first, *(i for i in order if i not in chosen)]
    place_of = {row: place for place, row in enumerate(order)}
    return ReferenceSchedule(
        order=order,
        to_run={place_of[row]: rows[row] for row in active if row not in stored},
        stored={place_of[row]: states for row, states in stored.items()},
    )


def active_rows(kl_coef: Sequence[float], rows: Sequence[Row]) -> list[int]:
    """Rows with a coefficient above 0 and at least one response token."""
    return [
        index
        for index, (coef, row) in enumerate(zip(kl_coef, rows, strict=True))
        if coef > 0 and any(row.loss_mask)
    ]


def _stored_states(
    store: ReferenceStore, rows: Sequence[Row], active: list[int]
) -> dict[int, Tensor]:
    keys = {row: row_key(rows[row].input_ids, rows[row].loss_mask) for row in active}
    return {row: store.read(key) for row, key in keys.items() if store.holds(key)}
