"""Stages 3 and 5: the frozen reference, run on the rows that need it, in passes that rows share.

One active row (b > 0) on any rank makes all ranks gather the reference, layer by layer. So each
rank sorts the rows of a window: active rows come first (the loss is a sum over the window, so their
order changes only rounding). The reference runs on them together, and its states are kept for their
micro-batches. Ranks then agree on one number, the most active rows of any rank: it determines the
number of passes, and which micro-batches need the head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from safereg_dist.data.collate import padded
from safereg_dist.models.fingerprint import row_key
from safereg_dist.parallel.comm import Agreement, Ranks, Result
from safereg_dist.reference.base import Packing, ReferenceModel
from safereg_dist.reference.exchange import Exchange, TokenRow
from safereg_dist.reference.store import ReferenceStore
from safereg_dist.regions import REFERENCE_HEAD, REFERENCE_TRUNK, region
from safereg_dist.types import NO_HEAD, Head, MicroBatch, ReferenceStates, Row, to_device


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceSchedule:
    """The active rows of one rank in a window, and the order of training, which places index."""

    order: list[int]
    """Indices of the window's rows in the order of training: active rows first."""
    to_run: dict[int, Row]
    """Place -> active row that the trunk has to run on."""
    stored: dict[int, Tensor]
    """Place -> states of an active row that is stored, memory-mapped."""

    @classmethod
    def of_no_row(cls, num_rows: int) -> "ReferenceSchedule":
        """The schedule without active rows; rows keep their order."""
        return cls(order=list(range(num_rows)), to_run={}, stored={})

    @property
    def num_active(self) -> int:
        """Active rows of this rank."""
        return len(self.to_run) + len(self.stored)


@dataclass(slots=True, kw_only=True)
class ReferencePasses:
    """The reference's passes over a window: their agreement, and states not yet used.

    Places index the order of training, as in the schedule.
    """

    schedule: ReferenceSchedule
    agreement: Agreement | None
    """Over ranks, the largest number of active rows and of rows that the trunk runs on; it may
    still be in flight. None where there is no reference."""
    micro_batch_size: int
    waiting: dict[int, Tensor] = field(default_factory=dict)
    """Place -> states computed but not yet used."""


class NoReference:
    """The reference of an objective without divergence: runs nothing, agrees on nothing."""

    def schedule(
        self, rows: Sequence[Row], kl_coef: Sequence[float], *, micro_batches: int
    ) -> ReferenceSchedule:
        """The schedule without active rows. Collectives: none."""
        return ReferenceSchedule.of_no_row(len(rows))

    def start_agreement(self, schedule: Result[ReferenceSchedule]) -> None:
        """Returns None; raises an error of this rank. Collectives: none."""
        assert schedule.value is not None

    def hidden_states(
        self, passes: ReferencePasses, index: int, batch: MicroBatch
    ) -> ReferenceStates:
        """No states. Collectives: none."""
        return ReferenceStates(None, needs_head=False)

    @contextmanager
    def gathered_head(self, is_needed: bool) -> Iterator[Head]:
        """Yields no head."""
        yield NO_HEAD


class Reference:
    """Runs the frozen reference on active rows, the same number of passes on every rank."""

    def __init__(
        self,
        model: ReferenceModel,
        *,
        ranks: Ranks,
        packing: Packing,
        store: ReferenceStore | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        """`store` holds states computed before; `exchange` balances rows over ranks."""
        self.model = model
        self.ranks = ranks
        self.packing = packing
        self.store = store
        self.exchange = exchange

    @property
    def state_size(self) -> int:
        """H_ref, the size of the head's input; in a few models smaller than the hidden size."""
        return self.model.head.state_size

    # ---- before the policy's forward

    @region(REFERENCE_TRUNK)
    def schedule(
        self, rows: Sequence[Row], kl_coef: Sequence[float], *, micro_batches: int
    ) -> ReferenceSchedule:
        """Which rows the trunk runs on, and the order of training. Collectives: none."""
        return schedule_rows(rows, kl_coef, micro_batches=micro_batches, store=self.store)

    def start_agreement(self, schedule: Result[ReferenceSchedule]) -> Agreement:
        """Starts the agreement of a window on the most active rows of any rank.

        All ranks raise an error in the first `hidden_states`.
        Collectives: the start of one MAX all-reduce of 8 bytes (16 with a stored reference).
        """
        if self.store is None:
            return self.ranks.all_reduce_max_async(schedule.then(lambda own: [own.num_active]))
        both = schedule.then(lambda own: [own.num_active, len(own.to_run)])
        return self.ranks.all_reduce_max_async(both, count=2)

    # ---- after it

    @region(REFERENCE_TRUNK)
    def hidden_states(
        self, passes: ReferencePasses, index: int, batch: MicroBatch
    ) -> ReferenceStates:
        """The states of `batch`, micro-batch `index` of the window; call it in order of `index`.

        Raises:
            The first failed rank's error, on all ranks.
        Collectives: in the first micro-batch of each group whose states are kept together, the
        engine's for the passes agreed on, and those of an exchange.
        """
        assert passes.agreement is not None
        agreed = passes.agreement.result()
        most_active, most_to_run = agreed[0], agreed[-1]
        size = passes.micro_batch_size
        first, group = index * size, size * self._micro_batches_waiting(size)
        rows_run = self._run(passes, first, group, most_to_run) if first % group == 0 else 0
        places = range(first, first + size)
        is_missing = [self.store is not None and p in passes.schedule.to_run for p in places]
        return ReferenceStates(
            self._listed(passes, places, batch),
            needs_head=first < most_active,  # active rows come first, on every rank
            rows_run=rows_run,
            misses=sum(is_missing),
        )

    def _micro_batches_waiting(self, size: int) -> int:
        """Micro-batches (>= 1) whose states fit `keep_bytes` at worst; the same on all ranks."""
        head = self.model.head.weight
        assert head is not None
        bytes_each = size * self.packing.max_length * self.state_size * head.itemsize
        return micro_batches_at_once(self.packing.keep_bytes, bytes_each)

    def _run(self, passes: ReferencePasses, first: int, group: int, most_to_run: int) -> int:
        """Runs the trunk on places `first` to `first + group - 1`; returns the rows run here."""
        most = min(max(most_to_run - first, 0), group)  # of any rank, in this group
        if most == 0:
            return 0
        rows = {p: row for p, row in passes.schedule.to_run.items() if first <= p < first + group}
        places = sorted(rows)
        ordered = [rows[place] for place in places]
        if self.exchange is not None and self.ranks.world_size > 1:
            states, rows_run = self.exchange.states(ordered, self.response_states)
        else:
            needed = -(-most // self.packing.rows_per_pass)
            states, rows_run = self.response_states(ordered, passes=needed), len(ordered)
        passes.waiting = dict(zip(places, states, strict=True))
        return rows_run

    def _listed(self, passes: ReferencePasses, places: range, batch: MicroBatch) -> Tensor | None:
        """[T, H_ref] states of a micro-batch, zeros on rows that are not active."""
        found: dict[int, Tensor] = {}
        for row, place in enumerate(places):
            if place in passes.waiting:
                found[row] = passes.waiting.pop(place)
            elif place in passes.schedule.stored:
                found[row] = to_device(passes.schedule.stored.pop(place), self.ranks.device)
        if not found:
            return None
        like = next(iter(found.values()))
        return torch.cat(
            [
                found[row] if row in found else like.new_zeros(tokens, like.shape[-1])
                for row, tokens in enumerate(batch.tokens_of_row)
            ]
        )

    def response_states(self, rows: Sequence[TokenRow], *, passes: int) -> list[Tensor]:
        """[t, H_ref] states that predict each row's response tokens, after the final norm.

        Rows are sorted by length, longest first, and each pass is padded to its longest row only. A
        rank that runs out of rows runs one dummy token in each remaining pass, so that every rank
        joins every collective. Collectives: the engine's, `passes` times.
        """
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
        size, found = self.packing.rows_per_pass, {}
        for begin in range(0, passes * size, size):
            group = order[begin : begin + size]
            found.update(zip(group, self._pass([rows[i] for i in group]), strict=True))
        return [found[i] for i in range(len(rows))]

    def _pass(self, rows: Sequence[TokenRow]) -> Sequence[Tensor]:
        device = self.ranks.device
        if not rows:
            self.model.hidden_states(torch.zeros(1, 1, dtype=torch.int64, device=device))
            return []
        width = max(len(row.input_ids) for row in rows)
        ids = padded([row.input_ids for row in rows], width=width)
        index: list[int] = []
        counts: list[int] = []
        for place, row in enumerate(rows):
            # The hidden state at t - 1 predicts token t.
            own = [place * width + t - 1 for t in range(1, len(row.loss_mask)) if row.loss_mask[t]]
            index += own
            counts.append(len(own))
        states = self.model.hidden_states(to_device(ids, device)).flatten(0, 1)
        chosen = to_device(torch.tensor(index, dtype=torch.int64), device)
        return states.index_select(0, chosen).split(counts)

    def prompt_states(self, input_ids: Tensor, num_layers: int) -> Tensor:
        """[B, S, H] after `num_layers` layers; runs no others. Collectives: the engine's."""
        return self.model.prefix_states(input_ids, num_layers)

    @contextmanager
    def gathered_head(self, is_needed: bool) -> Iterator[Head]:
        """A block in which the head is gathered; without `is_needed` it yields no head.

        Collectives: one all-gather per head parameter, if `is_needed`.
        """
        if not is_needed:
            yield NO_HEAD
            return
        with region(REFERENCE_HEAD), self.model.gathered_head() as head:
            yield head


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


def micro_batches_at_once(keep_bytes: int, bytes_each: int) -> int:
    """Micro-batches (>= 1) whose states may wait together, of so many bytes each at worst."""
    return max(1, keep_bytes // bytes_each)


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
