"""Stages 3 and 5: the frozen reference, run on the rows that need it, in passes that rows share.

One active row (b > 0) on any rank makes all ranks gather the reference, layer by layer. So a rank's
rows of a whole accumulation window are brought together: active rows come first (the loss is a sum
over the window, so their order changes nothing but rounding), the reference runs on them at once,
and its states wait for their micro-batches. What ranks must agree on is then one number, the most
active rows of any rank: it tells how many passes there are, and which micro-batches need the head.
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


@dataclass(slots=True, kw_only=True)
class ReferencePasses:
    """The passes over a window's active rows: those agreed on, and states that wait for their turn.

    Places count in the order of training, as in the schedule.
    """

    schedule: ReferenceSchedule
    agreement: Agreement | None
    """[most active rows of any rank, the most that the trunk runs on], under way until it is read;
    None where nothing runs."""
    micro_batch_size: int
    waiting: dict[int, Tensor] = field(default_factory=dict)
    """By place: states that are run and not yet asked for."""


class NoReference:
    """Stands where the objective has no divergence: runs nothing, agrees on nothing."""

    def schedule(
        self, rows: Sequence[Row], kl_coef: Sequence[float], *, micro_batches: int
    ) -> ReferenceSchedule:
        """Rows as they come. Collectives: none."""
        return ReferenceSchedule.of_no_row(len(rows))

    def start_agreement(self, schedule: Result[ReferenceSchedule]) -> None:
        """Nothing to agree on; an error of this rank is raised here. Collectives: none."""
        assert schedule.value is not None

    def hidden_states(
        self, passes: ReferencePasses, index: int, batch: MicroBatch
    ) -> ReferenceStates:
        """None. Collectives: none."""
        return ReferenceStates(None, needs_head=False)

    @contextmanager
    def gathered_head(self, is_needed: bool) -> Iterator[Head]:
        """A block without a head."""
        yield NO_HEAD


class Reference:
    """Runs the frozen reference on the rows that need it; every rank the same number of times."""

    def __init__(
        self,
        model: ReferenceModel,
        *,
        ranks: Ranks,
        packing: Packing,
        store: ReferenceStore | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        """`store` holds states that need not be run; `exchange` evens rows out over ranks."""
        self.model = model
        self.ranks = ranks
        self.packing = packing
        self.store = store
        self.exchange = exchange

    @property
    def state_size(self) -> int:
        """H_ref, what the head reads: of a few models less than their hidden size."""
        return self.model.head.state_size

    # ---- before the policy's forward

    @region(REFERENCE_TRUNK)
    def schedule(
        self, rows: Sequence[Row], kl_coef: Sequence[float], *, micro_batches: int
    ) -> ReferenceSchedule:
        """Which rows the trunk runs on, and the order of training. Collectives: none."""
        return schedule_rows(rows, kl_coef, micro_batches=micro_batches, store=self.store)

    def start_agreement(self, schedule: Result[ReferenceSchedule]) -> Agreement:
        """Starts the one agreement of a window: how many active rows the fullest rank has.

        An error is raised by all ranks, by the first `hidden_states`.
        Collectives: one MAX all-reduce of 8 bytes (16 with a stored reference), under way.
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
        """States of micro-batch `index`, which is `batch`; indices are asked for in order.

        Raises:
            The first failed rank's error of before, on all ranks.
        Collectives: in the first micro-batch of those whose states wait together, the engine's for
        the passes agreed on, and those of an exchange.
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
        """Micro-batches whose states may wait at once, were they all risky; alike on all ranks."""
        head = self.model.head.weight
        assert head is not None
        bytes_each = size * self.packing.max_length * self.state_size * head.itemsize
        return max(1, self.packing.keep_bytes // bytes_each)

    def _run(self, passes: ReferencePasses, first: int, group: int, most_to_run: int) -> int:
        """Runs the trunk for the `group` places from `first` on; rows run here."""
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
        """[T, H_ref] states of a micro-batch, zeros (unread) on rows that are not active."""
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

        Longest rows first, so that those of a pass are of like length; each pass is trimmed to its
        own longest row. A rank with fewer rows than passes runs one dummy token in each pass that
        is left, so that every rank joins every collective. Collectives: the engine's, `passes`
        times.
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
        """[B, S, H] after `num_layers` layers, which alone run. Collectives: the engine's."""
        return self.model.prefix_states(input_ids, num_layers)

    @contextmanager
    def gathered_head(self, is_needed: bool) -> Iterator[Head]:
        """A block in which the head is whole; nothing is gathered where no rank needs it.

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
