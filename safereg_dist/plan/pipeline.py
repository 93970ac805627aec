"""Slots of a pipeline's step: who computes what when, how long a stage waits, what fits meanwhile.

p stages of v chunks of layers train m micro-batches. A slot is the forward of one chunk, a v-th of
its stage; a backward takes `backward` slots. Place c p + s is chunk c of stage s, in the order of
the model. Messages take no time. The orders are 1F1B and its interleaved form (Narayanan et al.
2021, arXiv:2104.04473, section 2.2), as megatron-core runs them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple


class Work(NamedTuple):
    """One entry of a stage's order."""

    is_forward: bool
    place: int
    micro_batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """The sizes of a step's schedule."""

    stages: int
    """p, >= 1."""
    micro_batches: int
    """m, >= 1; with chunks a multiple of p."""
    chunks: int = 1
    """v, >= 1."""
    backward: int = 2
    """Slots of a backward: 2, and 3 where the forward is recomputed in it."""

    @property
    def slots(self) -> int:
        """Slots of a step: (m v + p - 1) (1 + backward)."""
        return (self.micro_batches * self.chunks + self.stages - 1) * (1 + self.backward)

    @property
    def idle_slots(self) -> int:
        """Slots in which a stage waits, the same for each: (p - 1) (1 + backward)."""
        return (self.stages - 1) * (1 + self.backward)

    def warmup(self, stage: int) -> int:
        """Forwards of a stage before its first backward alternates with them.

        1F1B: p - s - 1;  interleaved: 2 (p - s - 1) + (v - 1) p;  all of them where there are less.
        """
        behind = self.stages - stage - 1
        first = behind if self.chunks == 1 else 2 * behind + (self.chunks - 1) * self.stages
        return min(first, self.micro_batches * self.chunks)

    def in_flight(self, stage: int) -> int:
        """Forwards of chunks whose activations a stage holds at most."""
        return min(self.warmup(stage) + 1, self.micro_batches * self.chunks)

    def pass_slots(self, count: int) -> int:
        """Slots of a forward-only pass of `count` micro-batches alone: count v + p - 1, or 0."""
        return self.added_slots(count) + self.stages - 1 if count else 0

    def added_slots(self, count: int) -> int:
        """Slots by which that pass, directly before the step, makes it longer: count v.

        A stage that has done its part of the pass waits for the step's first forward as long as it
        waited for the pass to reach it, so that the p - 1 slots are not paid twice.
        """
        return self.whole_groups(count) * self.chunks

    def whole_groups(self, count: int) -> int:
        """Micro-batches of a pass that has to run `count`: interleaved, a multiple of p."""
        group = self.stages if self.chunks > 1 else 1
        return -(-count // group) * group

    def added_beside_bubble(self, count: int) -> int:
        """The same where as many as fit run in the idle slots of earlier steps (`bubble_room`)."""
        return self.added_slots(count - min(count, bubble_room(self)))


def order(pipeline: Pipeline, stage: int) -> list[Work]:
    """What a stage computes, in its order: warm-up, one forward and one backward by turns, rest."""
    forwards = [Work(True, *at) for at in _places(pipeline, stage, is_forward=True)]
    backwards = [Work(False, *at) for at in _places(pipeline, stage, is_forward=False)]
    warmup = pipeline.warmup(stage)
    found = forwards[:warmup]
    for turn, work in enumerate(backwards):
        found += forwards[warmup + turn : warmup + turn + 1]
        found.append(work)
    return found


def _places(pipeline: Pipeline, stage: int, *, is_forward: bool) -> Iterator[tuple[int, int]]:
    """(place, micro-batch): p micro-batches through a chunk, then through the next one."""
    chunks = range(pipeline.chunks) if is_forward else reversed(range(pipeline.chunks))
    places = [chunk * pipeline.stages + stage for chunk in chunks]
    group = pipeline.stages if pipeline.chunks > 1 else 1
    for first in range(0, pipeline.micro_batches, group):
        for place in places:
            yield from ((place, first + i) for i in range(group))


def timeline(
    pipeline: Pipeline, cost: Callable[[Work], float]
) -> list[list[tuple[Work, float, float]]]:
    """(work, start, end) of each stage, everything as early as its order and its inputs allow."""
    orders = [order(pipeline, stage) for stage in range(pipeline.stages)]
    done: dict[Work, float] = {}
    found: list[list[tuple[Work, float, float]]] = [[] for _ in orders]
    while any(len(own) < len(planned) for own, planned in zip(found, orders, strict=True)):
        for own, planned in zip(found, orders, strict=True):
            while len(own) < len(planned):
                work = planned[len(own)]
                ready = _ready(pipeline, work, done)
                if ready is None:
                    break
                start = max(ready, own[-1][2] if own else 0.0)
                done[work] = start + cost(work)
                own.append((work, start, done[work]))
    return found


def _ready(pipeline: Pipeline, work: Work, done: dict[Work, float]) -> float | None:
    """When a work's input is there; None while that is not known."""
    last = pipeline.stages * pipeline.chunks - 1
    if work.place == (0 if work.is_forward else last):
        return 0.0
    return done.get(work._replace(place=work.place - 1 if work.is_forward else work.place + 1))


def idle(pipeline: Pipeline) -> list[list[int]]:
    """The idle slots of each stage, by number from the step's start."""
    found = []
    for own in timeline(pipeline, lambda work: 1 if work.is_forward else pipeline.backward):
        busy = {slot for _, start, end in own for slot in range(int(start), int(end))}
        found.append([slot for slot in range(pipeline.slots) if slot not in busy])
    return found


@cache
def bubble_room(pipeline: Pipeline) -> int:
    """Micro-batches of the reference a step whose forwards all fit into the steps' idle slots.

    They are those of a later step, the next one's with v = 1: risk that does not read the policy is
    known ahead, and the reference is frozen, so nothing in this step waits for them. A micro-batch
    goes through one chunk of all stages in a step, so that it begins v steps ahead; it takes, stage
    after stage, the first idle slot that comes after its last one.

    (In their own step k micro-batches cost k v slots wherever they are placed: the last stage is
    idle only before anything can have reached it, and after its last loss.)
    """
    free = idle(pipeline)
    for count in range(pipeline.idle_slots):
        earliest = 0
        for slots in free:
            slot = next((s for s in slots if s >= earliest), None)
            if slot is None:
                return count // pipeline.chunks
            slots.remove(slot)
            earliest = slot + 1
    return pipeline.idle_slots // pipeline.chunks
