"""Rows that share the reference's passes: those of an optimizer step, or of one micro-batch.

One risky row on any rank makes all ranks gather the reference, layer by layer. So a rank's rows of
a whole accumulation window are brought together: rows with b > 0 come first (the loss is a sum over
the window, so their order changes nothing but rounding), the reference runs on them at once, and
its states wait for their micro-batches. What ranks must agree on is then one number, the most
active rows of any rank: it tells how many passes there are, and which micro-batches need the head.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safereg_dist.models.fingerprint import row_key
from safereg_dist.parallel.comm import held
from safereg_dist.reference.exchange import exchanged_states
from safereg_dist.regions import REFERENCE_TRUNK, region
from safereg_dist.types import MicroBatch, ReferenceStates, Row, to_device

if TYPE_CHECKING:
    from safereg_dist.reference.reference import Reference


class NoWindow:
    """A window over which the reference never runs."""

    def __init__(self, num_rows: int) -> None:
        self.order = list(range(num_rows))

    def states(self, index: int, batch: MicroBatch) -> ReferenceStates:
        """None. Collectives: none."""
        return ReferenceStates(None, needs_head=False)


class Window:
    """The active rows of one rank between two agreements, and their reference states.

    Places are positions in the order of training; rows that the trunk has to run on are `_ahead`,
    the states of those that a store holds are `_stored`.

    Collectives: one MAX all-reduce of 8 bytes (16 with a stored reference), under way from the
    start and read with the first states. Then the engine's, for the passes agreed on, and those of
    an exchange, where any rank has a row to run.
    """

    def __init__(
        self,
        reference: "Reference",
        rows: Sequence[Row],
        kl_coef: list[float] | Exception,
        *,
        micro_batches: int,
    ) -> None:
        self._reference = reference
        self._size = len(rows) // micro_batches
        self._group_rows = self._size * _micro_batches_kept(reference, self._size)
        self._ahead: dict[int, Row] = {}
        self._stored: dict[int, Tensor] = {}
        self._kept: dict[int, Tensor] = {}
        self.order = list(range(len(rows)))
        """Rows in the order in which they are trained."""
        failed = kl_coef if isinstance(kl_coef, Exception) else None
        if not isinstance(kl_coef, Exception):
            failed = held(self._place, rows, active_rows(kl_coef, rows), micro_batches)
        self._begin_agreement(failed)

    def _place(self, rows: Sequence[Row], active: list[int], micro_batches: int) -> None:
        stored = self._find(rows, active)
        if micro_batches > 1:
            ahead = [i for i in active if i not in stored]
            first = [*ahead, *stored]
            chosen = set(first)
            self.order = [*first, *(i for i in range(len(rows)) if i not in chosen)]
        place_of = {row: place for place, row in enumerate(self.order)}
        for row in active:
            if row in stored:
                self._stored[place_of[row]] = stored[row]
            else:
                self._ahead[place_of[row]] = rows[row]

    def _find(self, rows: Sequence[Row], active: list[int]) -> dict[int, Tensor]:
        """States of the active rows that are stored, mapped from their files, by row.

        Checked here, where all ranks agree on what a disk may have lost.
        """
        store = self._reference.store
        if store is None:
            return {}
        keys = {row: row_key(rows[row].input_ids, rows[row].loss_mask) for row in active}
        return {row: store.read(key) for row, key in keys.items() if store.holds(key)}

    def _begin_agreement(self, error: Exception | None) -> None:
        ranks, num_ahead = self._reference.ranks, len(self._ahead)
        if self._reference.store is None:
            self._agreement = ranks.all_reduce_max_async(error or [num_ahead])
        else:
            own = [num_ahead + len(self._stored), num_ahead]
            self._agreement = ranks.all_reduce_max_async(error or own, count=2)

    def _agreed(self) -> tuple[int, int]:
        """The most active rows of any rank, and the most that the trunk has to run on."""
        agreed = self._agreement.result()
        return agreed[0], agreed[-1]

    @region(REFERENCE_TRUNK)
    def states(self, index: int, batch: MicroBatch) -> ReferenceStates:
        """States of micro-batch `index`, which is `batch`; indices are asked for in order.

        Raises:
            The first failed rank's error in place of coefficients, on all ranks.
        Collectives: in the first micro-batch of those whose states are kept together, the
        engine's, and those of an exchange.
        """
        most_active, most_ahead = self._agreed()
        first = index * self._size
        rows_run = self._run(first, most_ahead) if first % self._group_rows == 0 else 0
        places = range(first, first + self._size)
        return ReferenceStates(
            self._listed(places, batch),
            needs_head=first < most_active,  # active rows come first, on every rank
            rows_run=rows_run,
            misses=0
            if self._reference.store is None
            else sum(place in self._ahead for place in places),
        )

    def _run(self, first: int, most_ahead: int) -> int:
        """Runs the trunk for the micro-batches from `first` on that are kept; rows run here."""
        most = self._within(first, most_ahead)
        if most == 0:
            return 0
        group = [p for p in range(first, first + self._group_rows) if p in self._ahead]
        rows = [self._ahead[place] for place in group]
        if self._reference.packing.exchange and self._reference.ranks.world_size > 1:
            states, rows_run = exchanged_states(self._reference, rows)
        else:
            passes = -(-most // self._reference.packing.rows_per_pass)
            states, rows_run = self._reference.response_states(rows, passes=passes), len(rows)
        self._kept = dict(zip(group, states, strict=True))
        return rows_run

    def _within(self, first: int, num_ahead: int) -> int:
        """Of so many rows ahead, those in the group that begins at `first`."""
        return min(max(num_ahead - first, 0), self._group_rows)

    def _listed(self, places: range, batch: MicroBatch) -> Tensor | None:
        """[T, H_ref] states of a micro-batch, zeros (unread) on rows that are not active."""
        found = {i: self._take(place) for i, place in enumerate(places) if self._is_active(place)}
        if not found:
            return None
        like = next(iter(found.values()))
        return torch.cat(
            [
                found[i] if i in found else like.new_zeros(tokens, like.shape[-1])
                for i, tokens in enumerate(batch.tokens_of_row)
            ]
        )

    def _is_active(self, place: int) -> bool:
        return place in self._kept or place in self._stored

    def _take(self, place: int) -> Tensor:
        if place in self._kept:
            return self._kept.pop(place)
        return to_device(self._stored.pop(place), self._reference.ranks.device)


def active_rows(kl_coef: list[float], rows: Sequence[Row]) -> list[int]:
    """Rows with a coefficient above 0 and at least one response token."""
    return [
        index
        for index, (coef, row) in enumerate(zip(kl_coef, rows, strict=True))
        if coef > 0 and any(row.loss_mask)
    ]


def _micro_batches_kept(reference: "Reference", size: int) -> int:
    """Micro-batches whose states may be kept at once, were they all risky; alike on all ranks."""
    packing, head = reference.packing, reference.head.weight
    assert head is not None
    bytes_each = size * packing.max_length * reference.state_size * head.itemsize
    return max(1, packing.keep_bytes // bytes_each)
