"""The rows of a run that goes on with another number of ranks than it began with.

A run deals its rows to the ranks that it begins with, for good. Each of these orders is a lane. An
optimizer step takes the same rows of every lane, however many ranks there are now: so no row is
lost or seen twice over a change, and the global batch, the number of steps and the learning rates
stay as they were.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from safereg_dist.data.sampler import Sampler
from safereg_dist.errors import ConfigError
from safereg_dist.types import Row


class StepShape(NamedTuple):
    """The rows of one rank in an optimizer step."""

    micro_batches: int
    micro_batch_size: int

    @property
    def rows(self) -> int:
        """All of them."""
        return self.micro_batches * self.micro_batch_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """How the rows of a step go from the lanes to the ranks of now, as evenly as they can."""

    count: int
    """Ranks that the run began with."""
    of_lane: StepShape
    """What the configuration says of a rank."""
    rank: int
    world_size: int
    """Ranks of now."""

    @property
    def rows_per_step(self) -> int:
        """Rows of all lanes in an optimizer step, which all ranks share."""
        return self.count * self.of_lane.rows

    @property
    def of_rank(self) -> StepShape:
        """Of every rank of now, with places that stay empty where the rows do not go round.

        Raises:
            ConfigError: a step has fewer rows than there are ranks.
        """
        if self.rows_per_step < self.world_size:
            raise ConfigError(
                f"this run takes {self.rows_per_step} rows a step (it began with {self.count} "
                f"ranks), which {self.world_size} ranks cannot share: go on with at most "
                f"{self.rows_per_step} ranks"
            )
        share = math.ceil(self.rows_per_step / self.world_size)
        micro_batches = math.ceil(share / self.of_lane.micro_batch_size)
        return StepShape(micro_batches, math.ceil(share / micro_batches))

    @property
    def are_whole(self) -> bool:
        """True where each lane stays on one rank: so does a row, in every epoch."""
        return self.count % self.world_size == 0

    def stream(self, of_lane: Callable[[int], Sampler]) -> "Sampler | SharedStream":
        """The rank's stream, from a function that gives that of a lane."""
        if self.count == self.world_size:
            return of_lane(self.rank)
        return SharedStream(self, of_lane)


class SharedStream:
    """Like a `Sampler`: the stream of a rank of now, its consecutive part of each step's rows."""

    def __init__(self, lanes: Lanes, of_lane: Callable[[int], Sampler]) -> None:
        self._lanes = lanes
        self._places = range(
            lanes.rows_per_step * lanes.rank // lanes.world_size,
            lanes.rows_per_step * (lanes.rank + 1) // lanes.world_size,
        )
        size = lanes.of_lane.rows
        self._streams = {lane: of_lane(lane) for lane in {place // size for place in self._places}}

    def row(self, position: int) -> Row | None:
        """The row at a position of the rank's stream; None where there is none."""
        step, index = divmod(position, self._lanes.of_rank.rows)
        if index >= len(self._places):
            return None
        lane, place = divmod(self._places[index], self._lanes.of_lane.rows)
        return self._streams[lane].row(step * self._lanes.of_lane.rows + place)

    def in_first_epoch(self, position: int) -> bool:
        """False once every rank has gone through all its rows; the same on every rank.

        True for good where lanes are split: a row then comes to another rank in another epoch.
        """
        if not self._lanes.are_whole:
            return True
        step = position // self._lanes.of_rank.rows
        stream = next(iter(self._streams.values()))
        return stream.in_first_epoch(step * self._lanes.of_lane.rows)
