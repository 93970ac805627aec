"""Claimed: whatever the number of ranks, and however it changes, an optimizer step holds the same
rows; so no row is lost or seen twice. A rank has no more rows in a micro-batch than configured.

Everything is exact. The judge deals the rows of the first ranks one by one.
"""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from support.builders import random_rows, word_tokenizer, write_jsonl

from safereg_dist.config import DataConfig
from safereg_dist.data import Sampler, load_rows
from safereg_dist.data.lanes import Lanes, StepShape
from safereg_dist.errors import ConfigError

CASES = [(4, 2, 3), (4, 3, 1), (1, 1, 6), (3, 2, 2), (2, 1, 5)]  # ranks, micro-batches, rows


def lanes_of(count, shape, world_size):
    return [
        Lanes(count=count, of_lane=shape, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]


@pytest.mark.parametrize(("count", "micro_batches", "size"), CASES)
@pytest.mark.parametrize("kind", ["sharded", "balanced", "weighted", "anchors"])
def test_a_step_holds_the_same_rows_on_any_number_of_ranks(
    tmp_path, count, micro_batches, size, kind
):
    rows = load(tmp_path / "rows.jsonl", 41)
    anchor = load(tmp_path / "anchor.jsonl", 9) if kind == "anchors" else None
    shape = StepShape(micro_batches, size)

    def lane(rank):
        return Sampler(
            rows,
            anchor,
            anchor_fraction=0.2,
            rank=rank,
            world_size=count,
            seed=3,
            epochs=3,
            active=np.arange(41) % 5 == 0 if kind == "balanced" else None,
            parts=[(30, 1.0), (11, 2.0)] if kind == "weighted" else None,
        )

    first = [lane(rank) for rank in range(count)]
    places = [range(step * shape.rows, (step + 1) * shape.rows) for step in range(15)]
    expected = [names(stream.row(p) for stream in first for p in own) for own in places]
    for world_size in range(1, count * shape.rows + 1):
        given = lanes_of(count, shape, world_size)
        streams = [each.stream(lane) for each in given]
        now = given[0].of_rank
        assert now.micro_batch_size <= size
        assert (now.micro_batches - 1) * size < -(-count * shape.rows // world_size)
        for step, wanted in enumerate(expected):
            own = range(step * now.rows, (step + 1) * now.rows)
            assert names(stream.row(p) for stream in streams for p in own) == wanted


def load(path, count):
    write_jsonl(path, random_rows(count))
    config = DataConfig(train=str(path), max_length=64)
    return load_rows(str(path), word_tokenizer(), config, progress=False)


def names(rows):
    return Counter((row.id, row.is_anchor) for row in rows if row is not None)


def test_risks_are_asked_for_as_long_as_a_row_can_be_new_to_its_rank():
    """Where lanes are whole, a row stays on one rank; else it may come to another in any epoch."""
    stream = SimpleNamespace(in_first_epoch=lambda position: position < 12)
    shape = StepShape(2, 3)
    for world_size, is_first in ((2, [True, True, False]), (3, [True] * 3), (8, [True] * 3)):
        for lanes in lanes_of(4, shape, world_size):
            shared = lanes.stream(lambda rank: stream)
            steps = [step * lanes.of_rank.rows for step in range(3)]
            assert [shared.in_first_epoch(position) for position in steps] == is_first


def test_the_ranks_that_began_keep_their_own_stream():
    for lanes in lanes_of(3, StepShape(2, 2), 3):
        assert lanes.stream(lambda rank: rank) == lanes.rank
        assert lanes.of_rank == (2, 2)


def test_more_ranks_than_rows_are_refused():
    with pytest.raises(ConfigError, match=r"6 rows a step .* at most 6 ranks"):
        _ = lanes_of(2, StepShape(1, 3), 7)[0].of_rank
