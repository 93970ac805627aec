"""The order of rows on each rank."""

import math
from collections.abc import Iterator

import numpy as np

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
        train: TokenizedDataset,
        anchor: TokenizedDataset | None,
        *,
        anchor_fraction: float,
        rank: int,
        world_size: int,
        seed: int,
        epochs: float | None,
        name: str = "data.train",
        active: np.ndarray | None = None,
    ) -> None:
        """`active`, bool [rows], marks the rows to deal evenly over ranks; None = no even deal."""
        _enough(train, world_size, name)
        self._train, self._anchor = train, anchor
        self._deal: ShardedOrder | BalancedOrder = (
            ShardedOrder(len(train), rank, world_size, seed, kind=0)
            if active is None
            else BalancedOrder(active, rank, world_size, seed)
        )
        if anchor is not None:
            _enough(anchor, world_size, "data.anchor")
            self._anchor_deal = ShardedOrder(len(anchor), rank, world_size, seed, kind=1)
        self.most_rows = math.ceil(len(train) / world_size)  # the largest number on any rank
        self._fraction = anchor_fraction if anchor is not None else 0.0
        self._limit = None if epochs is None else _rows_of(epochs, self._deal.epoch_length)

    def in_first_epoch(self, position: int) -> bool:
        """True until every rank has gone through all its rows; the same on every rank."""
        return self.rows_within(position) < self.most_rows

    def first_rows(self, count: int) -> Iterator[Row | None]:
        """Yields the first `count` training rows of this rank, in the run's order, without anchors.

        Yields None for each row beyond the rank's last.
        """
        for ordinal in range(count):
            yield self._train_row(ordinal) if ordinal < self._deal.epoch_length else None

    def rows_within(self, positions: int) -> int:
        """Number of distinct training rows in the first `positions`; the same on all ranks."""
        return min(positions - math.floor(positions * self._fraction), self.most_rows)

    def row(self, position: int) -> Row | None:
        """The row at a position of the stream; None after the last epoch's last row.

        With an even deal also None at the end of an epoch, on ranks without a row left.
        """
        anchors_before = math.floor(position * self._fraction)
        if math.floor((position + 1) * self._fraction) > anchors_before:
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


class ShardedOrder:
    """A seeded permutation assigns every row to exactly one rank, for all epochs.

    So a row's cached risk stays on the rank that uses it. Each epoch shuffles the rank's rows anew.
    """

    def __init__(self, count: int, rank: int, world_size: int, seed: int, *, kind: int) -> None:
        self._own = np.random.default_rng(seed + kind).permutation(count)[rank::world_size]
        self.epoch_length = len(self._own)
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


class BalancedOrder:
    """Deals active rows evenly over ranks and time, and the others into the remaining places.

    An epoch is a table of P = ceil(N / W) places on each of W ranks. The j-th active row of the run
    goes to rank j mod W, and the active rows of an epoch are spread evenly over its places: so in
    any range of places, the numbers of active rows differ by at most one between ranks. Each epoch
    permutes both kinds of rows anew and contains each row once.
    """

    def __init__(self, active: np.ndarray, rank: int, world_size: int, seed: int) -> None:
        self._active, self._others = np.flatnonzero(active), np.flatnonzero(~active)
        self._rank, self._world_size, self._seed = rank, world_size, seed
        self.epoch_length = math.ceil(len(active) / world_size)
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


def _enough(store: TokenizedDataset, world_size: int, name: str) -> None:
    if len(store) < world_size:
        raise DataError(
            f"{name} has {len(store)} usable rows for {world_size} ranks: give at least one a rank"
        )
