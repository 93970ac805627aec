"""Stages 3 and 5: the frozen reference, run on the rows that need it, in passes that rows share.

One active row (b > 0) on any rank makes all ranks gather the reference, layer by layer. So the
reference runs on the active rows of a whole window together, and its states are kept for their
micro-batches. Where we form the micro-batches, active rows come first (the loss is a sum over the
window, so their order changes only rounding), and ranks agree on one number, the most active rows
of any rank: it determines the number of passes, and which micro-batches need the head. Where a
stack has formed them, rows stay, and ranks agree on that number and on one for each micro-batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from safereg_dist.data.collation import padded
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
    """Indices of the window's rows in the order of training."""
    sizes: list[int]
    """Rows of each micro-batch."""
    is_sorted: bool
    """True if active rows come first and all micro-batches of all ranks have as many rows."""
    to_run: dict[int, Row]
    """Place -> active row that the trunk has to run on."""
    stored: dict[int, Tensor]
    """Place -> states of an active row that is stored, memory-mapped."""

    @classmethod
    def of_no_row(cls, sizes: Sequence[int], *, is_sorted: bool = True) -> "ReferenceSchedule":
        """The schedule without active rows; rows keep their order."""
        order = list(range(sum(sizes)))
        return cls(order=order, sizes=list(sizes), is_sorted=is_sorted, to_run={}, stored={})

    def places(self, index: int, count: int = 1) -> range:
        """The places of the rows of `count` micro-batches from `index` on."""
        first = sum(self.sizes[:index])
        return range(first, first + sum(self.sizes[index : index + count]))

    def counts(self) -> list[int]:
        """What ranks agree on: active rows and rows to run; sorted in all, else by micro-batch.

        Not sorted, the sum of the rows to run is the last number.
        """
        active, to_run = {*self.to_run, *self.stored}, self.to_run.keys()
        if self.is_sorted:
            return [len(active), len(to_run)]
        by_batch = [set(self.places(index)) for index in range(len(self.sizes))]
        return [
            *(len(active & batch) for batch in by_batch),
            *(len(to_run & batch) for batch in by_batch),
            len(to_run),
        ]


@dataclass(slots=True, kw_only=True)
class ReferencePasses:
    """The reference's passes over a window: their agreement, and states not yet used.

    Places index the order of training, as in the schedule.
    """

    schedule: ReferenceSchedule
    agreement: Agreement | None
    """The largest of the ranks' `counts`; it may still be in flight. None without a reference."""
    waiting: dict[int, Tensor] = field(default_factory=dict)
    """Place -> states computed but not yet used."""
    end: int = 0
    """Rows before this place need no pass any more."""


class NoReference:
    """The reference of an objective without divergence: runs nothing, agrees on nothing."""

    runs_policy = False

    def bind(self, engine: Callable[..., Any]) -> None:
        """Nothing to run."""

    def schedule(
        self,
        rows: Sequence[Row],
        kl_coef: Sequence[float],
        *,
        sizes: Sequence[int],
        may_sort: bool = True,
    ) -> ReferenceSchedule:
        """The schedule without active rows. Collectives: none."""
        return ReferenceSchedule.of_no_row(sizes)

    def start_agreement(
        self, schedule: Result[ReferenceSchedule], *, micro_batches: int, is_sorted: bool
    ) -> None:
        """Returns None; raises an error of this rank. Collectives: none."""
        assert schedule.value is not None

    def is_active(self, passes: ReferencePasses, index: int) -> bool:
        """False. Collectives: none."""
        return False

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
    def runs_policy(self) -> bool:
        """True if it runs the policy's own engine: then not while the policy runs."""
        return getattr(self.model, "runs_policy", False)

    def bind(self, engine: Callable[..., Any]) -> None:
        """Tells a reference that runs the policy's own engine which one that is."""
        if self.runs_policy:
            self.model.bind(engine)  # type: ignore[attr-defined]

    @property
    def state_size(self) -> int:
        """H_ref, the size of the head's input; in a few models smaller than the hidden size."""
        return self.model.head.state_size

    # ---- before the policy's forward

    @region(REFERENCE_TRUNK)
    def schedule(
        self,
        rows: Sequence[Row],
        kl_coef: Sequence[float],
        *,
        sizes: Sequence[int],
        may_sort: bool = True,
    ) -> ReferenceSchedule:
        """Which rows the trunk runs on, and the order of training. Collectives: none.

        `sizes` are the rows of each micro-batch; `may_sort` is False if they have been formed.
        """
        return schedule_rows(rows, kl_coef, sizes=sizes, may_sort=may_sort, store=self.store)

    def start_agreement(
        self, schedule: Result[ReferenceSchedule], *, micro_batches: int, is_sorted: bool
    ) -> Agreement:
        """Starts the agreement of a window on the most active rows of any rank.

        All ranks raise an error in the first `hidden_states`.
        Collectives: the start of one MAX all-reduce of 8 bytes (16 with a stored reference); not
        sorted, of 8 bytes more than 16 for each micro-batch.
        """
        if not is_sorted:
            count = 2 * micro_batches + 1
        else:
            count = 1 if self.store is None else 2
        own = schedule.then(lambda known: known.counts()[:count])
        return self.ranks.all_reduce_max_async(own, count=count)

    # ---- after it

    def is_active(self, passes: ReferencePasses, index: int) -> bool:
        """Whether a row of micro-batch `index` is active on any rank; it reads the agreement.

        Raises:
            The first failed rank's error, on all ranks.
        """
        assert passes.agreement is not None
        agreed, schedule = passes.agreement.result(), passes.schedule
        if schedule.is_sorted:
            return schedule.places(index).start < agreed[0]  # active rows come first, on every rank
        return agreed[index] > 0

    @region(REFERENCE_TRUNK)
    def hidden_states(
        self, passes: ReferencePasses, index: int, batch: MicroBatch
    ) -> ReferenceStates:
        """The states of `batch`, micro-batch `index` of the window; call it in order of `index`.

        Micro-batches that are not active may be left out.

        Raises:
            The first failed rank's error, on all ranks.
        Collectives: in the first micro-batch of each group whose states are kept together, the
        engine's for the passes agreed on, and those of an exchange.
        """
        assert passes.agreement is not None
        needs_head = self.is_active(passes, index)
        agreed, schedule = passes.agreement.result(), passes.schedule
        places = schedule.places(index)
        if schedule.is_sorted:
            group, most = self._sorted_group(schedule, index, agreed[-1])
        else:
            group, most = self._formed_group(schedule, index, agreed)
        is_first = group.start >= passes.end
        passes.end = group.stop
        rows_run = self._run(passes, group, most) if most and is_first else 0
        is_missing = [self.store is not None and p in schedule.to_run for p in places]
        return ReferenceStates(
            self._listed(passes, places, batch),
            needs_head=needs_head,
            rows_run=rows_run,
            misses=sum(is_missing),
        )

    def _sorted_group(
        self, schedule: ReferenceSchedule, index: int, most_to_run: int
    ) -> tuple[range, int]:
        """The places whose states are kept together with those of `index`, a whole number of
        micro-batches; and the most rows that any rank runs there."""
        size = schedule.sizes[index]
        count = micro_batches_at_once(self.packing.keep_bytes, size * self._bytes_of_row)
        first = index // count * count * size
        most = min(max(most_to_run - first, 0), count * size)
        return range(first, first + count * size), most

    def _formed_group(
        self, schedule: ReferenceSchedule, index: int, agreed: list[int]
    ) -> tuple[range, int]:
        """As `_sorted_group`: the whole window if the states fit, else one micro-batch."""
        count = len(schedule.sizes)
        if agreed[-1] * self._bytes_of_row <= self.packing.keep_bytes:
            return schedule.places(0, count), agreed[-1]
        return schedule.places(index), agreed[count + index]

    @property
    def _bytes_of_row(self) -> int:
        """Bytes of a row's states at worst; the same on all ranks."""
        head = self.model.head.weight
        assert head is not None
        return self.packing.max_length * self.state_size * head.itemsize

    def _run(self, passes: ReferencePasses, group: range, most: int) -> int:
        """Runs the trunk on the places of `group`, `most` rows on any rank; returns those here."""
        rows = {place: row for place, row in passes.schedule.to_run.items() if place in group}
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
    sizes: Sequence[int],
    may_sort: bool = True,
    store: ReferenceStore | None = None,
) -> ReferenceSchedule:
    """The schedule of a window; rows of a single micro-batch keep their order. Collectives: none.

    `sizes` are equal on all ranks if `may_sort`.

    Raises:
        CheckpointError: the store holds a row and cannot give it.
    """
    active = active_rows(kl_coef, rows)
    stored = {} if store is None else _stored_states(store, rows, active)
    order = list(range(len(rows)))
    if may_sort and len(sizes) > 1:
        first = [*(i for i in active if i not in stored), *stored]
        chosen = set(first)
        order = [*first, *(i for i in order if i not in chosen)]
    place_of = {row: place for place, row in enumerate(order)}
    return ReferenceSchedule(
        order=order,
        sizes=list(sizes),
        is_sorted=may_sort,
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
