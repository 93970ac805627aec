"""What all ranks agree on before a schedule: the micro-batches that the reference runs on."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from safereg_dist.parallel.comm import Agreement, Result
from safereg_dist.parallel.megatron import Layout
from safereg_dist.reference import NoReference
from safereg_dist.reference.reference import ReferenceSchedule, schedule_rows
from safereg_dist.risk.stage import RiskStage
from safereg_dist.types import Row, known_risk

_BITS = 60
"""Micro-batches whose flags one number carries."""
_UNIT = 1 << 30
"""Sums of risk and coefficients are agreed on as whole numbers of 1 / _UNIT."""
_SUMS = 5
"""Numbers of a replica behind the flags of its micro-batches."""


class Agreed(NamedTuple):
    """What all ranks know of the step, of each replica."""

    active: list[list[int]]
    """Micro-batches that hold an active row."""
    stored: list[list[int]]
    """Of these, those whose states are on disk."""
    sums: list[list[int]]
    """See `report_of`."""


def words_of(micro_batches: int) -> int:
    """How many numbers carry the flags of so many micro-batches."""
    return -(-micro_batches // _BITS)


def flags_of(places: Iterable[int], micro_batches: int) -> list[int]:
    """One bit for each of the micro-batches at these places."""
    found = [0] * words_of(micro_batches)
    for place in places:
        found[place // _BITS] |= 1 << (place % _BITS)
    return found


def places_of(flags: Sequence[int]) -> list[int]:
    """The micro-batches whose bits are set."""
    return [
        i * _BITS + bit for i, word in enumerate(flags) for bit in range(_BITS) if word >> bit & 1
    ]


def agree(layout: Layout, own: Result[list[int]], size: int) -> Agreement:
    """Starts the agreement on `size` numbers of each replica; ranks but its owner give zeros.

    Collectives: one MAX all-reduce over all ranks, of 8 bytes a number and replica.
    """
    place, replicas = layout.data.rank, layout.data.world_size
    before, after = [0] * size * place, [0] * size * (replicas - place - 1)
    table = own.then(lambda numbers: [*before, *numbers, *after])
    return layout.world.all_reduce_max_async(table, count=size * replicas)


def by_replica(agreement: Agreement, size: int) -> list[list[int]]:
    """The numbers of each replica. One host sync; raises a failed rank's error on all ranks."""
    numbers = agreement.result()
    return [numbers[begin : begin + size] for begin in range(0, len(numbers), size)]


def needed(
    places: list[int], of_replicas: list[list[int]], count: int, layout: Layout
) -> list[int]:
    """The micro-batches to run for these: more where other replicas or the schedule need them."""
    wanted = len(places)
    if layout.shares_experts:
        wanted = max(map(len, of_replicas))
    wanted = -(-wanted // layout.group_of_micro_batches) * layout.group_of_micro_batches
    others = [index for index in range(count) if index not in places]
    return sorted([*places, *others[: wanted - len(places)]])


def numbers_of_step(micro_batches: int, *, has_store: bool) -> int:
    """How many numbers a replica gives to the agreement of a step."""
    return words_of(micro_batches) * (1 + has_store) + _SUMS


def agreed(agreement: Agreement, micro_batches: int, *, has_store: bool) -> Agreed:
    """Reads the agreement of a step. One host sync; raises a failed rank's error on all ranks."""
    words, size = words_of(micro_batches), numbers_of_step(micro_batches, has_store=has_store)
    table = by_replica(agreement, size)
    return Agreed(
        active=[places_of(row[:words]) for row in table],
        stored=[places_of(row[words:-_SUMS]) for row in table],
        sums=[row[-_SUMS:] for row in table],
    )


class AgreedReference(NoReference):
    """Stands where `SafetyRegularizer` asks its reference: schedules, and agrees over all ranks."""

    def __init__(
        self,
        layout: Layout,
        risk: RiskStage,
        stored: Callable[[ReferenceSchedule], list[int]] | None = None,
    ) -> None:
        """`stored` finds the active micro-batches whose states are stored; None: none are."""
        self._layout = layout
        self._stored = stored
        self._risk = risk
        self._sums: list[int] = [0] * _SUMS

    def schedule(
        self,
        rows: Sequence[Row],
        kl_coef: Sequence[float],
        *,
        sizes: Sequence[int],
        may_sort: bool = True,
    ) -> ReferenceSchedule:
        """Which rows are active. Collectives: none."""
        schedule = schedule_rows(rows, kl_coef, sizes=sizes, may_sort=may_sort)
        known = [known_risk(value) for value in self._risk.last.values if value is not None]
        risk, coef = (sum(round(value * _UNIT) for value in values) for values in (known, kl_coef))
        self._sums = [risk, len(known), coef, len(schedule.to_run), len(rows)]
        return schedule

    def start_agreement(
        self, schedule: Result[ReferenceSchedule], *, micro_batches: int, is_sorted: bool
    ) -> Agreement:
        """Starts the agreement on the active micro-batches, and on the step's sums."""

        def numbers(known: ReferenceSchedule) -> list[int]:
            flags = flags_of(_active(known), micro_batches)
            if self._stored is not None:
                flags += flags_of(self._stored(known), micro_batches)
            return [*flags, *self._sums]

        size = numbers_of_step(micro_batches, has_store=self._stored is not None)
        return agree(self._layout, schedule.then(numbers), size)


def report_of(sums: Sequence[int]) -> dict[str, tuple[float, float]]:
    """(numerator, count) of what the sums of `AgreedReference` say of a replica's step."""
    risk, known, coef, active, rows = sums
    return {
        "risk": (risk / _UNIT, float(known)),
        "kl_coef": (coef / _UNIT, float(rows)),
        "active_share": (float(active), float(rows)),
    }


def active_rows(schedule: ReferenceSchedule, index: int) -> list[int]:
    """The active rows of a micro-batch, counted from its first one."""
    places = schedule.places(index)
    return [place - places.start for place in places if place in schedule.to_run]


def _active(schedule: ReferenceSchedule) -> list[int]:
    """The micro-batches that hold an active row."""
    return [i for i in range(len(schedule.sizes)) if active_rows(schedule, i)]
