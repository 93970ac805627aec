"""Claimed: data sets without weights are one set; with weights each gives its share of any stretch,
repeats by itself, and a position determines its row; ranks share each set. Streamed rows come in an
order that a position determines too, each row of a pass once, and nothing is tokenised ahead.

Everything is exact but for the shares, which hold within the number of sets. The judges count rows.
"""

from collections import Counter
from itertools import count, islice

import pytest
from support.builders import random_rows, word_tokenizer, write_jsonl

from safereg_dist.config import DataConfig
from safereg_dist.data import Sampler, StreamedRows, joined, load_rows, steps_for, streaming
from safereg_dist.data.shares import Shares
from safereg_dist.errors import DataError

WEIGHTS = [[1.0], [1, 1], [3, 1], [0.1, 0.2, 0.7], [1, 1, 1, 1, 1], [1e-3, 5, 2], [7, 1e-3]]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_shares_are_spread_evenly_and_counted(weights):
    shares = Shares(weights)
    seen = [0] * len(weights)
    for position in range(2000):
        assert shares.counts(position) == seen
        part, before = shares.place(position)
        assert before == seen[part]
        seen[part] += 1
        for got, weight in zip(seen, weights, strict=True):
            assert abs(got - (position + 1) * weight / sum(weights)) < max(len(weights), 1.01)


# Sets of known length


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFEREG_CACHE", str(tmp_path / "cache"))
    made = {}
    for name, size in (("small", 6), ("large", 25), ("anchor", 7)):
        rows = [{**row, "id": f"{name}-{i}"} for i, row in enumerate(random_rows(size))]
        made[name] = write_jsonl(tmp_path / f"{name}.jsonl", rows)
    return made


def load(path):
    return load_rows(str(path), word_tokenizer(), DataConfig(train=str(path)), progress=False)


def both(files):
    return {name: load(files[name]) for name in ("small", "large")}


def sampler(files, weights=None, rank=0, world_size=1, *, anchor=False, epochs=None, seed=3):
    stores = both(files)
    return Sampler(
        joined(stores),
        load(files["anchor"]) if anchor else None,
        anchor_fraction=0.2,
        rank=rank,
        world_size=world_size,
        seed=seed,
        epochs=epochs,
        parts=weights and [(len(s), w) for s, w in zip(stores.values(), weights, strict=True)],
    )


def ids(stream, positions):
    return [stream.row(position).id for position in positions]


def test_without_weights_data_sets_are_one(files, tmp_path):
    whole = tmp_path / "whole.jsonl"
    whole.write_text(files["small"].read_text() + files["large"].read_text())
    for rank in range(2):
        alone = Sampler(
            load(whole), None, anchor_fraction=0, rank=rank, world_size=2, seed=3, epochs=1
        )
        apart = sampler(files, rank=rank, world_size=2, epochs=1)
        assert [apart.row(i) for i in range(20)] == [alone.row(i) for i in range(20)]
    store = joined(both(files))
    assert (len(store), len(store.prompts())) == (31, 31)
    assert store.content_hash != load(whole).content_hash


def test_one_data_set_is_itself(files):
    store = load(files["small"])
    assert joined({"small": store}) is store


@pytest.mark.parametrize("weights", [[1, 1], [1, 3], [0.9, 0.1]])
@pytest.mark.parametrize("world_size", [1, 3])
def test_each_set_gives_its_share_and_goes_through_its_rows(files, weights, world_size):
    owners = {}
    for rank in range(world_size):
        order = ids(sampler(files, weights, rank, world_size), range(300))
        for name, size, weight in (("small", 6, weights[0]), ("large", 25, weights[1])):
            drawn = [row for row in order if row.startswith(name)]
            for end in range(1, 301):
                got = sum(row.startswith(name) for row in order[:end])
                assert abs(got - end * weight / sum(weights)) < 2
            own = len(range(rank, size, world_size))
            passes = [drawn[i : i + own] for i in range(0, len(drawn) - own + 1, own)]
            assert all(sorted(each) == sorted(passes[0]) for each in passes)
            assert len(set(passes[0])) == own
            for row in passes[0]:
                assert owners.setdefault(row, rank) == rank
    assert len(owners) == 31


def test_a_position_determines_its_row_and_the_seed_the_order(files):
    straight = ids(sampler(files, [1, 3], 1, 3, anchor=True), range(90))
    for position in (89, 0, 41, 7, 8):
        assert ids(sampler(files, [1, 3], 1, 3, anchor=True), [position]) == [straight[position]]
    assert ids(sampler(files, [1, 3], 1, 3, anchor=True, seed=4), range(90)) != straight
    anchors = [row.startswith("anchor") for row in straight]
    assert all(abs(sum(anchors[:end]) - 0.2 * end) <= 1 for end in range(91))


@pytest.mark.parametrize("anchor", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_new_rows_are_counted_and_listed(files, anchor, world_size):
    streams = [sampler(files, [1, 8], r, world_size, anchor=anchor) for r in range(world_size)]
    seen = [[] for _ in streams]
    for position in range(400):
        within = {s.rows_within(position) for s in streams}
        promised = {s.in_first_epoch(position) for s in streams}
        assert len(within) == len(promised) == 1
        assert max(map(len, seen)) <= max(within)
        for known, s in zip(seen, streams, strict=True):
            row = s.row(position)
            if not row.is_anchor and row.id not in known:
                assert promised == {True}
                known.append(row.id)
    assert promised == {False}
    for known, s in zip(seen, streams, strict=True):
        listed = list(s.first_rows(s.most_rows))
        assert [row.id for row in listed if row] == known  # once each, as the run meets them
        assert listed[len(known) :] == [None] * (s.most_rows - len(known))
        assert [row.id for row in s.first_rows(5)] == known[:5]
    assert sum(map(len, seen)) == 31


def test_an_epoch_is_as_many_rows_as_all_sets_have(files):
    steps = steps_for(
        joined(both(files)), epochs=2, world_size=2, rows_per_step=4, anchor_fraction=0.0
    )
    for rank in range(2):
        stream = sampler(files, [1, 1], rank, 2, epochs=2)
        rows = [stream.row(position) for position in range(steps * 4)]
        assert [row is not None for row in rows] == [i < 32 for i in range(steps * 4)]


def test_a_set_with_fewer_rows_than_ranks(files):
    with pytest.raises(DataError, match=r"data\.train\[0\] has 6 usable rows for 7 ranks"):
        sampler(files, [1, 1], 0, 7)


def test_ids_are_unique_over_data_sets(files, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(files["small"].read_text())
    with pytest.raises(DataError) as caught:
        joined({str(path): load(path) for path in (files["small"], other)})
    assert f"id 'small-0' occurs in {files['small']} and in {other}" in str(caught.value)
    (tmp_path / "b").mkdir()
    alike = [
        write_jsonl(folder / "t.jsonl", [{"prompt": "w1", "response": "w2"}])
        for folder in (tmp_path, tmp_path / "b")
    ]
    with pytest.raises(DataError, match=r"'t-0' occurs in .*rename a file"):
        joined({str(path): load(path) for path in alike})


# Streams


def streamed(*paths, rank=0, world_size=1, seed=3, keep=4, weights=None, **settings):
    sets = [str(path) for path in paths]
    train = weights and [{"path": p, "weight": w} for p, w in zip(sets, weights, strict=True)]
    config = DataConfig(train=train or sets, streaming=True, **settings)
    return StreamedRows(
        config, word_tokenizer(), rank=rank, world_size=world_size, seed=seed, keep=keep
    )


def test_unshuffled_rows_are_dealt_in_their_order(files):
    written = [f"large-{i}" for i in range(25)]
    for rank in range(3):
        stream = streamed(files["large"], rank=rank, world_size=3, shuffle_buffer=1)
        own = written[rank::3]
        assert ids(stream, range(20)) == (own * 3)[:20]


@pytest.mark.parametrize("buffer", [2, 7, 1000])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_pass_shows_every_row_once_in_another_order(files, buffer, world_size):
    shown = Counter()
    for rank in range(world_size):
        own = len(range(rank, 31, world_size))
        order = ids(
            streamed(*files_of(files), rank=rank, world_size=world_size, shuffle_buffer=buffer),
            range(2 * own),
        )
        assert sorted(order[:own]) == sorted(order[own:])
        assert order[:own] != order[own:]
        shown.update(order[:own])
    assert set(shown.values()) == {1}
    assert len(shown) == 31


def files_of(files):
    return files["small"], files["large"]


def test_a_position_determines_a_streamed_row(files):
    def make(**changes):
        return streamed(*files_of(files), rank=1, world_size=2, shuffle_buffer=5, **changes)

    straight = make()
    order = ids(straight, range(50))
    for position in (49, 0, 17, 16, 30):
        assert ids(make(), [position]) == [order[position]]
        assert ids(straight, [position]) == [order[position]]
    assert ids(make(seed=4), range(50)) != order


def test_streamed_rows_are_those_of_a_table(files):
    path = files["large"]
    stream, table = streamed(path, shuffle_buffer=4), load(path)
    known = {row.id: row for row in (table.row(i) for i in range(25))}
    assert all(stream.row(i) == known[stream.row(i).id] for i in range(25))


def test_streams_are_drawn_by_weight(files):
    order = ids(streamed(*files_of(files), weights=[3, 1], shuffle_buffer=4), range(80))
    assert sum(row.startswith("small") for row in order) == 60
    small = [row for row in order if row.startswith("small")]
    assert all(sorted(small[i : i + 6]) == sorted(small[:6]) for i in range(0, 60, 6))


def test_nothing_is_tokenised_ahead_or_on_the_way_to_a_position(files, monkeypatch):
    calls = count()

    def counted(*given, **named):
        next(calls)
        return tokenize(*given, **named)

    tokenize = streaming.tokenize_row
    monkeypatch.setattr(streaming, "tokenize_row", counted)
    stream = streamed(files["large"], shuffle_buffer=5)
    ids(stream, [20, 21, 21, 20, 22])
    assert next(calls) == 3


def test_a_file_without_end_is_read_as_far_as_it_is_needed(monkeypatch):
    def endless(path, *, streaming):
        assert streaming
        return ((f"{path}:{i}", {"prompt": "w1", "response": f"w{i % 90}"}) for i in count(1))

    monkeypatch.setattr(streaming, "source_rows", endless)
    assert ids(streamed("big.jsonl", shuffle_buffer=1), [5, 6]) == ["big-5", "big-6"]


def test_a_stream_with_anchors(files):
    stream = Sampler(
        streamed(files["large"], shuffle_buffer=5),
        load(files["anchor"]),
        anchor_fraction=0.25,
        rank=0,
        world_size=1,
        seed=3,
        epochs=None,
    )
    kinds = [stream.row(position).is_anchor for position in range(40)]
    assert kinds == ([False] * 3 + [True]) * 10
    plain = ids(streamed(files["large"], shuffle_buffer=5), range(30))
    trained = [stream.row(p).id for p in range(40) if not stream.row(p).is_anchor]
    assert trained == plain
    assert [row.id for row in stream.first_rows(9)] == plain[:9]
    assert stream.rows_within(40) == 30
    assert stream.in_first_epoch(10**9)


def test_the_place_of_a_long_row_stays_empty(tmp_path, capsys):
    rows = [{"prompt": "w1", "response": " ".join(["w2"] * n)} for n in (1, 9, 2, 9)]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    stream = streamed(path, max_length=8, shuffle_buffer=1)
    assert [row and row.id for row in (stream.row(i) for i in range(5))] == [
        *("t-0", None, "t-2", None, "t-0")
    ]
    warned = capsys.readouterr().err
    assert warned.count("stays empty") == 1
    assert f"{path}:2 is longer than data.max_length=8" in warned
    cut = streamed(path, max_length=8, shuffle_buffer=1, overlong="truncate")
    assert [len(cut.row(i).input_ids) for i in range(3)] == [6, 8, 7]
    with pytest.raises(DataError, match=r"t\.jsonl:2: 14 tokens"):
        streamed(path, max_length=8, shuffle_buffer=1, overlong="error").row(1)


def test_streamed_rows_that_cannot_be_used(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"prompt": "w1", "response": "w2"}, {"prompt": "w1"}])
    stream = streamed(path, shuffle_buffer=1)
    assert stream.row(0).id == "t-0"
    for _ in range(2):  # again where it is asked for again
        with pytest.raises(DataError, match=r"t\.jsonl:2: expected `messages`"):
            stream.row(1)
    assert stream.row(0).id == "t-0"
    torn = tmp_path / "torn.jsonl"
    torn.write_text(f"{path.read_text()}no row\n")
    stream = streamed(torn, shuffle_buffer=1)
    for _ in range(2):
        with pytest.raises(DataError, match=r"torn\.jsonl:3 is not JSON"):
            stream.row(2)
    assert stream.row(0).id == "torn-0"
    needs_risk = StreamedRows(
        DataConfig(train=str(path)),
        word_tokenizer(),
        rank=0,
        world_size=1,
        seed=0,
        keep=1,
        needs_risk=True,
    )
    with pytest.raises(DataError, match=r"t\.jsonl:1: risk\.estimator=column needs `risk`"):
        needs_risk.row(0)
    with pytest.raises(DataError, match="fewer rows than there are ranks"):
        streamed(path, rank=2, world_size=3).row(0)
    with pytest.raises(DataError, match="check the path"):
        streamed(tmp_path / "none.jsonl").row(0)
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="two sets of one name"):
        streamed(path, tmp_path / "b" / "t.jsonl")


def test_a_data_set_of_a_hub_is_streamed_too(monkeypatch):
    def load_dataset(path, *, split, streaming):
        assert (path, split, streaming) == ("org/chats", "train", True)
        return islice(({"prompt": f"w{i}", "response": "w2"} for i in count()), 5)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    stream = streamed("org/chats", shuffle_buffer=1)
    assert ids(stream, range(7)) == [f"chats-{i % 5}" for i in range(7)]
