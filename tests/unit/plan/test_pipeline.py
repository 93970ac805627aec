"""Claimed: slots of a step, idle ones, micro-batches in flight, and the reference's, are exact.

Judges: a simulation by ticks that knows dependencies alone, with the orders of the literature
written anew (in 1F1B a backward goes first, and a stage holds at most p - s micro-batches); every
placement of a small reference pass, tried; the largest flow through the idle slots. All exact.
"""

from itertools import combinations_with_replacement, product

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow

from safereg_dist.plan.pipeline import Pipeline, bubble_room, idle

SIZES = [(1, 1, 3), (2, 1, 1), (2, 1, 5), (3, 1, 2), (4, 1, 3), (4, 1, 9), (8, 1, 16)]
INTERLEAVED = [(2, 2, 2), (2, 3, 6), (4, 2, 4), (4, 2, 12), (4, 3, 8)]


def simulate(programs, backward=2, places=None):
    """Runs each stage's program tick by tick: [stage][(entry, start, end)].

    An entry is (kind, place, micro-batch); `F` and `R` run from place to place, `B` back. It starts
    as soon as its input is there and the entry before it has ended.
    """
    places = places or len(programs)
    ends, done = {}, [[] for _ in programs]
    tick = 0
    while any(len(own) < len(program) for own, program in zip(done, programs, strict=True)):
        for own, program in zip(done, programs, strict=True):
            if len(own) == len(program) or (own and own[-1][2] > tick):
                continue
            kind, place, batch = entry = program[len(own)]
            before = place + 1 if kind == "B" else place - 1
            is_first = place == (places - 1 if kind == "B" else 0)
            if is_first or ends.get((kind, before, batch), tick + 1) <= tick:
                own.append((entry, tick, tick + (backward if kind == "B" else 1)))
                ends[entry] = own[-1][2]
        tick += 1
        assert tick < 500, "the programs wait for one another"
    return done


def one_forward_one_backward(stages, batches, backward=2):
    """1F1B by its rule, as programs: a backward that can run does, else a forward if few wait."""
    programs = [[] for _ in range(stages)]
    ends, free = {}, [0] * stages
    forwards, backwards = [0] * stages, [0] * stages
    tick = 0
    while min(backwards) < batches:
        for s in range(stages):
            if free[s] > tick:
                continue
            f, b = forwards[s], backwards[s]
            source = ("B", s + 1, b) if s + 1 < stages else ("F", s, b)
            if b < batches and ends.get(source, tick + 1) <= tick and f > b:
                entry, free[s] = ("B", s, b), tick + backward
                backwards[s] += 1
            elif (
                f < batches
                and f - b < stages - s
                and (s == 0 or ends.get(("F", s - 1, f), tick + 1) <= tick)
            ):
                entry, free[s] = ("F", s, f), tick + 1
                forwards[s] += 1
            else:
                continue
            ends[entry] = free[s]
            programs[s].append(entry)
        tick += 1
    return programs


def interleaved(stages, chunks, batches):
    """Programs of the interleaved schedule: entry k of a stage is worked out from k alone."""

    def place(k, stage, *, back):
        group, within = divmod(k, stages * chunks)
        chunk, batch = divmod(within, stages)
        return (chunks - 1 - chunk if back else chunk) * stages + stage, group * stages + batch

    programs, total = [], batches * chunks
    for stage in range(stages):
        lead = min(total, 2 * (stages - 1 - stage) + (chunks - 1) * stages)
        program = [("F", *place(k, stage, back=False)) for k in range(lead)]
        for k in range(total):
            if lead + k < total:
                program.append(("F", *place(lead + k, stage, back=False)))
            program.append(("B", *place(k, stage, back=True)))
        programs.append(program)
    return programs


def programs_of(p, v, m, backward=2):
    return one_forward_one_backward(p, m, backward) if v == 1 else interleaved(p, v, m)


def length(done):
    return max(own[-1][2] for own in done if own)


def reference_first(p, v, count):
    """Forwards of a pass by stage; interleaved, in whole groups of p."""
    groups = -(-count // p) * p if v > 1 else count
    entries = interleaved(p, v, groups) if v > 1 else one_forward_one_backward(p, groups)
    return [[("R", *at) for kind, *at in program if kind == "F"] for program in entries]


@pytest.mark.parametrize("backward", [2, 3])
@pytest.mark.parametrize("size", [*SIZES, *INTERLEAVED], ids=str)
def test_slots_are_those_of_the_simulation(size, backward):
    p, v, m = size
    pipeline = Pipeline(stages=p, chunks=v, micro_batches=m, backward=backward)
    done = simulate(programs_of(p, v, m, backward), backward, p * v)
    assert pipeline.slots == length(done)
    free = idle(pipeline)
    for stage, own in enumerate(done):
        busy = {tick for _, start, end in own for tick in range(start, end)}
        assert free[stage] == sorted(set(range(length(done))) - busy)
        assert len(free[stage]) == pipeline.idle_slots
        held = most = 0
        for (kind, *_), *_ in own:
            held += 1 if kind == "F" else -1
            most = max(most, held)
        assert pipeline.in_flight(stage) == most


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("size", [*SIZES, *INTERLEAVED], ids=str)
def test_a_pass_costs_its_length_alone_and_less_before_a_step(size, count):
    p, v, m = size
    pipeline = Pipeline(stages=p, chunks=v, micro_batches=m)
    first = reference_first(p, v, count)
    assert pipeline.pass_slots(count) == length(simulate(first, places=p * v))
    joined = [a + b for a, b in zip(first, programs_of(p, v, m), strict=True)]
    assert pipeline.slots + pipeline.added_slots(count) == length(simulate(joined, places=p * v))
    assert pipeline.pass_slots(0) == pipeline.added_slots(0) == 0


@pytest.mark.parametrize(
    ("p", "m", "active"), [(2, 2, [1]), (2, 3, [2]), (3, 3, [2]), (2, 3, [0, 2]), (2, 2, [0, 1])]
)
def test_no_placement_in_a_pass_s_own_step_beats_the_pass_before_it(p, m, active):
    """Every way of putting the reference's forwards into the stages' orders; the last stage's come
    before the forward of the same micro-batch, whose loss reads them."""
    programs = one_forward_one_backward(p, m)
    spots = [
        list(combinations_with_replacement(range(len(program) + 1), len(active)))
        for program in programs
    ]
    best = 10_000
    for chosen in product(*spots):
        tried = []
        for stage, (program, places) in enumerate(zip(programs, chosen, strict=True)):
            own = list(program)
            for batch, place in reversed(list(zip(active, places, strict=True))):
                own.insert(place, ("R", stage, batch))
            tried.append(own)
        last = tried[-1]
        if any(last.index(("R", p - 1, b)) > last.index(("F", p - 1, b)) for b in active):
            continue
        try:
            best = min(best, length(simulate(tried)))
        except AssertionError:
            continue
    pipeline = Pipeline(stages=p, micro_batches=m)
    assert best == pipeline.slots + pipeline.added_slots(len(active))


@pytest.mark.parametrize("size", [s for s in [*SIZES, *INTERLEAVED] if s[0] > 1], ids=str)
def test_the_bubble_s_room_is_the_largest_flow_through_its_slots(size):
    p, v, m = size
    done = simulate(programs_of(p, v, m), places=p * v)
    free = []
    for own in done:
        busy = {tick for _, start, end in own for tick in range(start, end)}
        free.append([tick for tick in range(length(done)) if tick not in busy])
    pipeline = Pipeline(stages=p, chunks=v, micro_batches=m)
    assert bubble_room(pipeline) == largest_flow(free) // v
    for count in range(8):
        left = max(0, count - bubble_room(pipeline))
        assert pipeline.added_beside_bubble(count) == pipeline.added_slots(left)


def largest_flow(free):
    """Passes through all stages in order, one idle slot of each, later from stage to stage."""
    slots = [(stage, tick) for stage, own in enumerate(free) for tick in own]
    enter = {slot: 2 + 2 * i for i, slot in enumerate(slots)}
    graph = np.zeros((2 + 2 * len(slots),) * 2, dtype=np.int32)  # 0 = source, 1 = sink
    for stage, tick in slots:
        own = enter[stage, tick]
        graph[own, own + 1] = 1
        if stage == 0:
            graph[0, own] = 1
        if stage == len(free) - 1:
            graph[own + 1, 1] = 1
        else:
            for later in free[stage + 1]:
                graph[own + 1, enter[stage + 1, later]] = later > tick
    return maximum_flow(csr_matrix(graph), 0, 1).flow_value
