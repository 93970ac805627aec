"""Claimed: an even deal shows every row once an epoch, gives all ranks as many active rows in every
stretch of places (within one), and a position alone determines its row.

Everything is exact. The judge counts rows one by one.
"""

from collections import Counter

import numpy as np
import pytest
from support.builders import random_rows, word_tokenizer, write_jsonl

from safereg_dist.config import DataConfig
from safereg_dist.data import Sampler, load_rows
from safereg_dist.data.sampler import BalancedOrder

CASES = [  # rows, active rows, ranks
    (1, 1, 1),
    (7, 3, 2),
    (12, 3, 4),
    (10, 9, 4),  # the last line holds active rows too
    (13, 5, 4),
    (23, 22, 4),
    (40, 39, 3),
    (41, 41, 4),
    (41, 0, 4),
    (101, 33, 7),
    (64, 16, 4),  # every fourth row: dealt in turn, one rank would get them all
]


def flags(count: int, num_active: int, *, at_front: bool = False) -> np.ndarray:
    active = np.zeros(count, dtype=bool)
    places = np.arange(count) if at_front else np.random.default_rng(3).permutation(count)
    active[places[:num_active]] = True
    return active


def dealt(active: np.ndarray, ranks: int, places: int, seed: int = 5) -> np.ndarray:
    """[places, ranks] rows, read one after the other."""
    deals = [BalancedOrder(active, rank, ranks, seed) for rank in range(ranks)]
    return np.array([[deal.index(place) for deal in deals] for place in range(places)])


@pytest.mark.parametrize(("count", "num_active", "ranks"), CASES)
def test_every_epoch_holds_every_row_once(count, num_active, ranks):
    active = flags(count, num_active)
    length = -(-count // ranks)
    table = dealt(active, ranks, 3 * length)
    epochs = table.reshape(3, -1)
    for epoch in epochs:
        there = epoch[epoch >= 0]
        assert sorted(there) == list(range(count))
        assert (epoch < 0).sum() == length * ranks - count
        assert (epoch[: count // ranks * ranks] >= 0).all()  # what is left over comes last
    if count > 7:
        assert (epochs[0] != epochs[1]).any()  # another order in each epoch


@pytest.mark.parametrize("at_front", [False, True])
@pytest.mark.parametrize(("count", "num_active", "ranks"), CASES)
def test_in_every_stretch_ranks_differ_by_one_active_row_at_most(
    count, num_active, ranks, at_front
):
    active = flags(count, num_active, at_front=at_front)
    length = -(-count // ranks)
    table = dealt(active, ranks, 3 * length)
    is_active = np.where(table >= 0, active[table], False)
    totals = np.concatenate([np.zeros((1, ranks), int), is_active.cumsum(axis=0)])
    for begin in range(len(table)):
        stretches = totals[begin + 1 :] - totals[begin]
        assert (stretches.max(axis=1) - stretches.min(axis=1)).max() <= 1


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_active_rows_are_spread_over_time(ranks):
    active = flags(80, 20)
    table = dealt(active, ranks, 80 // ranks)
    is_active = active[table].sum(axis=1).cumsum()
    even = (np.arange(len(table)) + 1) * 20 / len(table)
    assert np.abs(is_active - even).max() <= 1


def test_a_position_determines_its_row():
    active = flags(53, 20)
    one_by_one = dealt(active, 4, 60)
    draw = np.random.default_rng(0)
    for rank in range(4):
        deal = BalancedOrder(active, rank, 4, seed=5)
        for place in draw.integers(0, 60, 40):
            assert deal.index(int(place)) == one_by_one[place, rank]
    assert (dealt(active, 4, 60, seed=6) != one_by_one).any()


@pytest.mark.parametrize("epochs", [1.0, 2.0, 0.5])
def test_a_stream_of_an_even_deal(tmp_path, monkeypatch, epochs):
    """Against the ordinary stream: the same rows in an epoch, anchors at the same positions."""
    monkeypatch.setenv("SAFEREG_CACHE", str(tmp_path / "cache"))
    files = {}
    for name, count in (("train", 26), ("anchor", 6)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", random_rows(count))
        files[name] = load_rows(
            str(path), word_tokenizer(), DataConfig(train=str(path)), progress=False
        )
    kinds = {}
    for active in (None, flags(26, 7)):
        streams = [
            Sampler(
                files["train"],
                files["anchor"],
                anchor_fraction=0.2,
                rank=rank,
                world_size=4,
                seed=1,
                epochs=epochs,
                active=active,
            )
            for rank in range(4)
        ]
        rows = [[s.row(position) for position in range(30)] for s in streams]
        seen = Counter(row.id for own in rows for row in own if row and not row.is_anchor)
        anchors = [[bool(row and row.is_anchor) for row in own] for own in rows]
        first = Counter(row.id for s in streams for row in s.first_rows(s.most_rows) if row)
        kinds[active is None] = (sum(seen.values()), seen, anchors, first)
    ordinary, even = kinds[True], kinds[False]
    assert even[2] == ordinary[2]
    assert even[3] == ordinary[3] == Counter({row: 1 for row in ordinary[3]})
    if epochs >= 1:
        assert even[1] == ordinary[1]
        assert set(even[1].values()) == {int(epochs)}
