"""The order of rows on each rank."""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from safereg_dist.data.shares import Shares, split
from safereg_dist.data.streaming import StreamedRows
from safereg_dist.data.tokenized import TokenizedDataset
from safereg_dist.errors import DataError
from safereg_dist.types import Row


class Sampler:
    """The endless, ordered stream of rows that one rank trains on.

    Anchor rows are spread evenly among training rows. The position in the stream determines the
    row, so resuming needs the position only.
    """

    def __init__(
        self,
        train: TokenizedDataset | StreamedRows,
        anchor: TokenizedDataset | None,
        *,
        anchor_fraction: float,
        rank: int,
        world_size: int,
        seed: int,
        epochs: float | None,
        name: str = "data.train",
        active: np.ndarray | None = None,
        parts: Sequence[tuple[int, float]] | None = None,
    ) -> None:
        """The stream of one rank.

        Args:
            train: rows that are streamed are in their order already, and never end.
            active: bool [rows], marks the rows to deal evenly over ranks; None = no even deal.
            parts: (rows, weight) of the data sets that follow one another in `train`, to be drawn
                by weight; None = as one set.
        Raises:
            DataError: fewer rows than ranks.
        """
        self._train, self._anchor = train, anchor
        self._deal: _Order
        if isinstance(train, StreamedRows):
            self._deal = StreamedOrder()
        elif parts is not None:
            for index, (size, _) in enumerate(parts):
                _enough(size, world_size, f"{name}[{index}]")
            self._deal = WeightedOrder(parts, rank, world_size, seed)
        else:
            _enough(len(train), world_size, name)
            self._deal = (
                ShardedOrder(len(train), rank, world_size, seed, kind=0)
                if active is None
                else BalancedOrder(active, rank, world_size, seed)
            )
        if anchor is not None:
            _enough(len(anchor), world_size, "data.anchor")
            self._anchor_deal = ShardedOrder(len(anchor), rank, world_size, seed, kind=1)
        self.most_rows = self._deal.most_rows  # the largest number on any rank
        self._fraction = anchor_fraction if anchor is not None else 0.0
        self._limit = None if epochs is None else _rows_of(epochs, self._deal.epoch_length)

    def in_first_epoch(self, position: int) -> bool:
        """True until every rank has gone through all its rows; the same on every rank."""
        return self.rows_within(position) < self.most_rows

    def first_rows(self, count: int) -> Iterator[Row | None]:
        """Yields the first `count` training rows of this rank, in the run's order, without anchors.

        Yields None for each row beyond the rank's last.
        """
        new = iter(self._deal.new_ordinals())
        for _ in range(count):
            ordinal = next(new, None)
            yield None if ordinal is None else self._train_row(ordinal)

    def rows_within(self, positions: int) -> int:
        """Number of distinct training rows in the first `positions`; the same on all ranks."""
        return self._deal.new_within(positions - math.floor(positions * self._fraction))

    def row(self, position: int) -> Row | None:
        """The row at a position of the stream; None after the last epoch's last row.

        With an even deal also None at the end of an epoch, on ranks without a row left; and None
        in the place of a streamed row that is left out.
        """
        is_anchor, anchors_before = split(position, self._fraction)
        if is_anchor:
            assert self._anchor is not None
            return self._anchor.row(self._anchor_deal.index(anchors_before), is_anchor=True)
        ordinal = position - anchors_before
        if self._limit is not None and ordinal >= self._limit:
            return None
        return self._train_row(ordinal)

    def rows(self, start: int, count: int, *, filler: Row) -> list[Row]:
        """The `count` rows from position `start`; `filler` where there is none."""
        found = (self.row(position) for position in range(start, start + count))
        return [filler if row is None else row for row in found]

    def _train_row(self, ordinal: int) -> Row | None:
        index = self._deal.index(ordinal)
        return None if index < 0 else self._train.row(index)


class _Order:
    """The training rows of one rank: which row an ordinal is, epoch after epoch."""

    epoch_length: int
    """Ordinals of an epoch on this rank."""
    most_rows: int
    """The largest number of rows on any rank."""

    def index(self, ordinal: int) -> int:
        """The index of this rank's `ordinal`-th row; -1 if the epoch has none for it."""
        raise NotImplementedError

    def new_ordinals(self) -> Iterable[int]:
        """The ordinals, ascending, at which each of the rank's rows comes first."""
        return range(self.epoch_length)

    def new_within(self, ordinals: int) -> int:
        """The most rows that come first in the first `ordinals`; the same on all ranks."""
        return min(ordinals, self.most_rows)


class ShardedOrder(_Order):
    """A seeded permutation assigns every row to exactly one rank, for all epochs.

    So a row's cached risk stays on the rank that uses it. Each epoch shuffles the rank's rows anew.
    """

    def __init__(self, count: int, rank: int, world_size: int, seed: int, *, kind: int) -> None:
        self._own = np.random.default_rng(seed + kind).permutation(count)[rank::world_size]
        self.epoch_length = len(self._own)
        self.most_rows = math.ceil(count / world_size)
        self._salt = [seed, kind, int(self._own[0])]
        self._epoch, self._order = -1, self._own

    def index(self, ordinal: int) -> int:
        """The index of this rank's `ordinal`-th row."""
        epoch, offset = divmod(ordinal, self.epoch_length)
        if epoch != self._epoch:
            seed, kind, first = self._salt
            self._epoch = epoch
            self._order = np.random.default_rng([seed, epoch, kind, first]).permutation(self._own)
        return int(self._order[offset])


class WeightedOrder(_Order):
    """Draws from data sets by weight, evenly spread; each set is sharded, and repeats by itself.

    An epoch is as many rows as all sets have together.
    """

    def __init__(
        self, parts: Sequence[tuple[int, float]], rank: int, world_size: int, seed: int
    ) -> None:
        sizes = [size for size, _ in parts]
        self._shares = Shares([weight for _, weight in parts])
        self._deals = [  # kind 1 is the anchors'
            ShardedOrder(size, rank, world_size, seed, kind=2 * part)
            for part, size in enumerate(sizes)
        ]
        self._begins = [sum(sizes[:part]) for part in range(len(sizes))]
        self.epoch_length = math.ceil(sum(sizes) / world_size)
        self.most_rows = sum(deal.most_rows for deal in self._deals)

    def index(self, ordinal: int) -> int:
        """The index of this rank's `ordinal`-th row, counted over all sets."""
        part, own = self._shares.place(ordinal)
        return self._begins[part] + self._deals[part].index(own)

    def new_ordinals(self) -> Iterator[int]:
        """As in `_Order`; those in between repeat a row."""
        left, ordinal = sum(deal.epoch_length for deal in self._deals), 0
        while left:
            part, own = self._shares.place(ordinal)
            if own < self._deals[part].epoch_length:
                left -= 1
                yield ordinal
            ordinal += 1

    def new_within(self, ordinals: int) -> int:
        """As in `_Order`."""
        counts = zip(self._deals, self._shares.counts(ordinals), strict=True)
        return sum(min(count, deal.most_rows) for deal, count in counts)


class StreamedOrder(_Order):
    """The order in which rows are streamed; how many there are is not known."""

    epoch_length = most_rows = sys.maxsize

    def index(self, ordinal: int) -> int:
        """The ordinal itself."""
        return ordinal


class BalancedOrder(_Order):
    """Deals active rows evenly over ranks and time, and the others into the remaining places.

    An epoch is a table of P = ceil(N / W) places on each of W ranks. The j-th active row of the run
    goes to rank j mod W, and the active rows of an epoch are spread evenly over its places: so in
    any range of places, the numbers of active rows differ by at most one between ranks. Each epoch
    permutes both kinds of rows anew and contains each row once.
    """

    def __init__(self, active: np.ndarray, rank: int, world_size: int, seed: int) -> None:
        self._active, self._others = np.flatnonzero(active), np.flatnonzero(~active)
        self._rank, self._world_size, self._seed = rank, world_size, seed
        self.epoch_length = self.most_rows = math.ceil(len(active) / world_size)
        self._epoch, self._own = -1, np.empty(0, dtype=np.int64)

    def index(self, ordinal: int) -> int:
        """The index of this rank's `ordinal`-th row; -1 if the epoch has none for it."""
        epoch, offset = divmod(ordinal, self.epoch_length)
        if epoch != self._epoch:
            self._epoch, self._own = epoch, self._table(epoch)[:, self._rank].copy()
        return int(self._own[offset])

    def _table(self, epoch: int) -> np.ndarray:
        """[P, W] row indices of one epoch, -1 in unused places of the last line."""
        draw = np.random.default_rng([self._seed, epoch, 0])
        active, others = draw.permutation(self._active), draw.permutation(self._others)
        width = self._world_size
        lines, left = divmod(len(active) + len(others), width)  # full lines, remaining rows
        table = np.full((self.epoch_length, width), -1, dtype=np.int64)
        spread = np.arange(min(len(active), lines * width))
        # The round-robin continues across epochs, since a step may contain an epoch's end.
        turn = (spread + epoch * len(active)) % width
        table[spread * lines // max(len(spread), 1), turn] = active[: len(spread)]
        # Active rows that do not fit the full lines go first in the last line, in their turn.
        beyond, free = active[len(spread) :], np.flatnonzero(table[:lines].ravel() < 0)
        last = lines * width + (np.arange(left) + epoch * (len(beyond) or left)) % width
        table.ravel()[free] = others[: len(free)]
        table.ravel()[last] = np.concatenate([beyond, others[len(free) :]])
        return table


def steps_for(
    store: TokenizedDataset,
    *,
    epochs: float,
    world_size: int,
    rows_per_step: int,
    anchor_fraction: float,
) -> int:
    """Optimizer steps that train on each row `epochs` times; `rows_per_step` is per rank."""
    rows = _rows_of(epochs, math.ceil(len(store) / world_size))
    positions = math.ceil(rows / (1 - anchor_fraction))
    # Ends at the last training row, without the anchors after it.
    while positions - 1 - math.floor((positions - 1) * anchor_fraction) >= rows:
        positions -= 1
    return math.ceil(positions / rows_per_step)


def _rows_of(epochs: float, count: int) -> int:
    """Rows in `epochs` passes over `count` rows; at least one, since a step needs a row."""
    return max(1, round(epochs * count))


def _enough(count: int, world_size: int, name: str) -> None:
    if count < world_size:
        raise DataError(
            f"{name} has {count} usable rows for {world_size} ranks: give at least one a rank"
        )
