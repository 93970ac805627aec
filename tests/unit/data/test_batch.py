"""Claimed: a row's tokens, mask and prompt ends are what its template says, whichever way the mask
is found; every unusable row is refused with file and line; the cache is read when nothing that
shapes tokens has changed, and only then; ranks share the rows without duplicates, and a position in
the stream determines its row.

Everything here is exact. The judges are brute-force loops and the conversation's own text.
"""

import json
import math
import time
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
import torch
from support import builders
from support.builders import PLAIN_TEMPLATE, TEMPLATE, random_rows, word_tokenizer, write_jsonl

from safereg_dist.config import DataConfig
from safereg_dist.data import (
    Sampler,
    collate,
    filler,
    load_rows,
    load_tokenizer,
    steps_for,
    tokenize_row,
    tokenized,
)
from safereg_dist.data.collation import padded
from safereg_dist.errors import ConfigError, DataError
from safereg_dist.types import Row

# The newline that many templates write after the end-of-turn token is a word here, <nl>.
NEWLINE = (
    "{{ '<bos>' }}{% for m in messages %}{{ '<' + m['role'] + '> ' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + ' <eos>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + ' <eos>' }}{% endif %}{{ ' w89 ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
NEWLINE_PLAIN = NEWLINE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# Changes earlier text once a later turn is there, as templates that strip reasoning do.
UNSTABLE = (
    "{{ '<bos>' }}{% for m in messages %}{{ '<user> ' if m['role'] == 'user' else '<asst> ' }}"
    "{{ m['content'] if loop.last else 'w0' }}{{ ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<asst> ' }}{% endif %}"
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"


def chat(*turns):
    names = {"u": "user", "a": "assistant", "s": "system"}
    return {"messages": [{"role": names[who], "content": text} for who, text in turns]}


CONVERSATIONS = {
    "one turn": chat(("u", "w1 w2"), ("a", "w3 w4 w5")),
    "one word": chat(("u", "w1"), ("a", "w3")),
    "three turns": chat(
        ("u", "w1"), ("a", "w2 w3"), ("u", "w4"), ("a", "w5"), ("u", "w6 w7"), ("a", "w8 w9 w10")
    ),
    "system": chat(("s", "w11 w12"), ("u", "w1"), ("a", "w2"), ("u", "w3"), ("a", "w4 w5")),
    "two answers": chat(("u", "w1"), ("a", "w2"), ("a", "w3 w4")),
    "ends with the user": chat(("u", "w1"), ("a", "w2 w3"), ("u", "w4")),
    "begins with the assistant": chat(("a", "w2 w3"), ("u", "w4"), ("a", "w5")),
    "unknown word": chat(("u", "w1"), ("a", "w2 zzz w3")),
    "special token inside": chat(("u", "w1"), ("a", "w2 <eos> w3 <user> w4"), ("u", "w5")),
}


def tokens(tokenizer, raw):
    return tokenize_row(raw, "file:1", tokenizer, default_id="x")


def config(path="t", **changes):
    return DataConfig(train=str(path), **changes)


def load(path, *, tokenizer=None, progress=False, **changes):
    return load_rows(
        str(path), tokenizer or word_tokenizer(), config(path, **changes), progress=progress
    )


# Masks


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize(
    ("with_block", "without"), [(TEMPLATE, PLAIN_TEMPLATE), (NEWLINE, NEWLINE_PLAIN)]
)
def test_both_ways_to_the_mask_agree(name, with_block, without):
    block = tokens(word_tokenizer(with_block), CONVERSATIONS[name])
    prefix = tokens(word_tokenizer(without), CONVERSATIONS[name])
    assert block == prefix


@pytest.mark.parametrize("template", [TEMPLATE, PLAIN_TEMPLATE, NEWLINE, NEWLINE_PLAIN])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_mask_holds_the_answers_and_their_end_of_turn(name, template):
    raw, tokenizer = CONVERSATIONS[name], word_tokenizer(template)
    row = tokens(tokenizer, raw)
    assert len(row.input_ids) == len(row.loss_mask)
    answers = [m["content"].split() for m in raw["messages"] if m["role"] == "assistant"]
    expected = [word for answer in answers for word in [*answer, "<eos>"]]
    shown = tokenizer.convert_ids_to_tokens(
        [t for t, m in zip(row.input_ids, row.loss_mask, strict=True) if m]
    )
    assert shown == [word if word != "zzz" else "<unk>" for word in expected]
    # Each prompt ends where an answer begins.
    assert len(row.prompt_ends) == len(answers)
    for end, answer in zip(row.prompt_ends, answers, strict=True):
        assert tokenizer.convert_ids_to_tokens(row.input_ids[end]) == answer[0]
        assert row.loss_mask[end - 1] == 0


def test_the_newline_after_the_end_of_turn_is_not_trained():
    for template in (NEWLINE, NEWLINE_PLAIN):
        tokenizer = word_tokenizer(template)
        row = tokens(tokenizer, CONVERSATIONS["one turn"])
        assert tokenizer.convert_ids_to_tokens(row.input_ids[-2:]) == ["<eos>", "w89"]
        assert row.loss_mask[-2:] == [1, 0]


def test_a_turn_without_an_end_token_is_trained_to_its_end():
    bare = PLAIN_TEMPLATE.replace(" + '<eos>'", " + ' '")
    row = tokens(word_tokenizer(bare), CONVERSATIONS["unknown word"])
    assert sum(row.loss_mask) == 3  # <unk> in the middle is a word, not an end of turn


def test_prompt_and_response_are_two_messages():
    short = {"prompt": "w1 w2", "response": "w3"}
    long = chat(("u", "w1 w2"), ("a", "w3"))
    assert tokens(word_tokenizer(), short) == tokens(word_tokenizer(), long)


def test_an_empty_answer_is_an_end_of_turn():
    row = tokens(word_tokenizer(), chat(("u", "w1"), ("a", "")))
    assert sum(row.loss_mask) == 1


def test_prompt_keys_tell_prompts_apart_and_nothing_else():
    tokenizer = word_tokenizer()

    def key(*turns):
        return tokens(tokenizer, chat(*turns)).prompt_key

    assert key(("u", "w1"), ("a", "w2")) == key(("u", "w1"), ("a", "w3 w4"))
    assert key(("u", "w1"), ("a", "w2")) != key(("u", "w2"), ("a", "w2"))
    two = [("u", "w1"), ("a", "w2"), ("u", "w3"), ("a", "w4")]
    assert key(*two) != key(*two[:2])
    assert key(*two) != key(("u", "w1"), ("a", "w5"), *two[2:])


# Refusals


def refused(tmp_path, raw, *, template=TEMPLATE, line=3, **changes):
    good = {"prompt": "w1", "response": "w2"}
    path = write_jsonl(tmp_path / "train.jsonl", [{**good, "id": "a"}, {**good, "id": "b"}])
    with path.open("a") as file:
        file.write((raw if isinstance(raw, str) else json.dumps(raw)) + "\n")
    tokenizer = word_tokenizer(template)
    with pytest.raises(DataError) as caught:
        load(path, tokenizer=tokenizer, **changes)
    text = str(caught.value)
    assert f"{path}:{line}" in text
    assert "\n" not in text
    return text


GOOD = {"prompt": "w1", "response": "w2"}


@pytest.mark.parametrize(
    ("raw", "names"),
    [
        ({}, "`messages`, or `prompt`"),
        ({"text": "w1"}, "text"),
        ({"prompt": "w1"}, "response"),
        ({"response": "w1"}, "prompt"),
        ({"prompt": 3, "response": "w1"}, "prompt"),
        ({"prompt": "w1", "response": None}, "response"),
        ({"messages": []}, "non-empty"),
        ({"messages": "hi"}, "list"),
        ({"messages": ["hi"]}, "content"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "content"),
        ({"messages": [{"role": "assistant", "content": ["w1"]}]}, "content"),
        (chat(("u", "w1")), "no assistant turn"),
        (chat(("s", "w1"), ("u", "w1")), "no assistant turn"),
        ({**GOOD, "risk": -0.01}, "risk"),
        ({**GOOD, "risk": 1.01}, "risk"),
        ({**GOOD, "risk": math.nan}, "risk"),
        ({**GOOD, "risk": math.inf}, "risk"),
        ({**GOOD, "risk": "high"}, "risk"),
        ({**GOOD, "risk": [0.5]}, "risk"),
        ({**GOOD, "risk": True}, "risk"),
        ({**GOOD, "risk": 10**400}, "risk"),
        ({**GOOD, "id": "a"}, "'a' occurs twice"),
        ("not json", "JSON"),
        ("[1]", "expected an object"),
        ("3", "expected an object"),
        ('{"prompt": "w1", ', "JSON"),
        ({"prompt": "w1", "response": "\ud800"}, "tokenizer fail"),
    ],
)
def test_rows_that_cannot_be_used(raw, names, tmp_path):
    assert names in refused(tmp_path, raw)


def test_line_numbers_count_blank_lines(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('\n{"prompt": "w1", "response": "w2"}\n\n{"prompt": "w1"}\n')
    with pytest.raises(DataError, match=r"t\.jsonl:4: "):
        load(path)


def test_templates_that_change_earlier_turns(tmp_path):
    raw = chat(("u", "w1"), ("a", "w2"), ("u", "w3"), ("a", "w4"))
    path = write_jsonl(tmp_path / "t.jsonl", [raw])
    with pytest.raises(DataError, match=r"t\.jsonl:1: the chat template changes earlier"):
        load(path, tokenizer=word_tokenizer(UNSTABLE))


def test_templates_that_refuse_a_conversation(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [GOOD, CONVERSATIONS["system"]])
    for template in (STRICT + TEMPLATE, STRICT + PLAIN_TEMPLATE):
        with pytest.raises(DataError, match=r"t\.jsonl:2: .*no system"):
            load(path, tokenizer=word_tokenizer(template))


def test_a_template_that_is_no_jinja(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [GOOD])
    with pytest.raises(DataError, match="template"):
        load(path, tokenizer=word_tokenizer("{% for %}"))


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.json"])
def test_missing_and_empty_files(name, tmp_path):
    path = tmp_path / name
    with pytest.raises(DataError, match="check the path"):
        load(path)
    for content in ("", "\n\n"):
        path.write_text(content)
        with pytest.raises(DataError, match="no usable row"):
            load(path)


def test_folders_and_hub_ids_that_are_not_there(tmp_path):
    for path in (tmp_path, "nobody/no-such-dataset", tmp_path / "no-suffix"):
        with pytest.raises(DataError, match="check the path"):
            load(path)


def test_files_that_are_no_text(tmp_path):
    for name in ("t.jsonl", "t.csv"):
        (tmp_path / name).write_bytes(b"prompt,response\n\xff\xfe,\xff\n")
        with pytest.raises(DataError, match="UTF-8"):
            load(tmp_path / name)


def test_a_file_without_assistant_text_is_not_left_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFEREG_CACHE", str(tmp_path / "cache"))
    path = write_jsonl(tmp_path / "t.jsonl", [GOOD, {"prompt": "w1"}])
    with pytest.raises(DataError):
        load(path)
    assert list((tmp_path / "cache" / "rows").iterdir()) == []


# Ids, CSV and other forms


def test_ids_are_given_where_there_are_none(tmp_path):
    rows = [GOOD, {**GOOD, "id": 7}, {**GOOD, "id": None}, {**GOOD, "id": ""}]
    path = write_jsonl(tmp_path / "some.jsonl", rows)
    store = load(path)
    assert [store.row(i).id for i in range(4)] == ["some-0", "7", "some-2", "some-3"]
    other = write_jsonl(tmp_path / "other.jsonl", rows)
    assert load(other).row(0).id == "other-0"


def test_csv_is_the_same_rows(tmp_path):
    rows = [
        {"id": "a", "prompt": "w1 w2", "response": "w3", "risk": 0.25},
        {"id": "b", "prompt": "w4", "response": "w5 w6"},
        {"id": "c", "prompt": "w7\nw8, w9", "response": "w1", "risk": 1},
    ]
    table = tmp_path / "t.csv"
    text = 'id,prompt,response,risk\na,w1 w2,w3,0.25\nb,w4,w5 w6,\nc,"w7\nw8, w9",w1,1\n'
    table.write_text(text)
    lines = load(write_jsonl(tmp_path / "t.jsonl", rows))
    for encoding in ("utf-8", "utf-8-sig"):  # spreadsheets write a byte-order mark
        table.write_text(text, encoding=encoding)
        store = load(table)
        assert [store.row(i) for i in range(3)] == [lines.row(i) for i in range(3)]


def test_csv_rows_that_cannot_be_used(tmp_path):
    table = tmp_path / "t.csv"
    for text, where in (
        ("prompt,response\nw1,w2\nw1,\n", ":3"),
        ("prompt\nw1,w2,w3\n", ":2"),
        ('prompt,response\n"w1\nw2",w3\nw4,\n', ":4"),
        ("prompt,response,risk\nw1,w2,high\n", ":2"),
    ):
        table.write_text(text)
        with pytest.raises(DataError, match=rf"t\.csv{where}: "):
            load(table)


def test_a_byte_order_mark_in_jsonl(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(GOOD) + "\n", encoding="utf-8-sig")
    assert len(load(path)) == 1


def test_risk_is_kept_exactly(tmp_path):
    rows = [{**GOOD, "risk": r} for r in (0, 1, 1 / 3, 0.1, None)] + [{**GOOD}]
    store = load(write_jsonl(tmp_path / "t.jsonl", rows))
    assert [store.row(i).risk for i in range(6)] == [0.0, 1.0, 1 / 3, 0.1, None, None]


# Long rows


def long_file(folder):
    words = " ".join(["w1"] * 10)
    rows = [
        {"id": "short", "prompt": "w1", "response": "w2"},  # 6 tokens
        {"id": "response", "prompt": "w1", "response": words},  # 15
        {"id": "prompt", "prompt": words, "response": "w2"},  # 15, response from 13 on
        {"id": "exact", "prompt": "w1", "response": "w2 w3 w4"},  # 8
    ]
    return write_jsonl(folder / "long.jsonl", rows)


def test_long_rows_are_dropped_and_counted(tmp_path):
    store = load(long_file(tmp_path), max_length=8)
    assert (len(store), store.overlong, store.dropped) == (2, 2, 2)
    assert [store.row(i).id for i in range(2)] == ["short", "exact"]


def test_long_rows_are_truncated_and_counted(tmp_path):
    store = load(long_file(tmp_path), max_length=8, overlong="truncate")
    assert (len(store), store.overlong, store.dropped) == (3, 2, 1)
    assert [store.row(i).id for i in range(3)] == ["short", "response", "exact"]
    cut = store.row(1)
    assert len(cut.input_ids) == len(cut.loss_mask) == 8
    assert cut.prompt_ends == [4]
    assert sum(cut.loss_mask) == 4


def test_truncation_forgets_the_turns_it_cuts(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [CONVERSATIONS["three turns"]])
    whole = load(path).row(0)
    for limit in range(5, len(whole.input_ids)):
        row = load(path, max_length=limit, overlong="truncate").row(0)
        assert row.input_ids == whole.input_ids[:limit]
        assert row.prompt_ends == [e for e in whole.prompt_ends if any(whole.loss_mask[e:limit])]
        # A risk cached for fewer turns must not be taken for that of all turns.
        is_all = row.prompt_ends == whole.prompt_ends
        assert (row.prompt_key == whole.prompt_key) == is_all


def test_long_rows_can_be_an_error(tmp_path):
    with pytest.raises(DataError, match=r"long\.jsonl:2: 15 tokens.*max_length=8"):
        load(long_file(tmp_path), max_length=8, overlong="error")
    assert load(long_file(tmp_path), max_length=15, overlong="error").overlong == 0


def test_a_file_of_long_rows_only(tmp_path):
    for overlong in ("drop", "truncate"):
        with pytest.raises(DataError, match=r"max_length=2"):
            load(long_file(tmp_path), max_length=2, overlong=overlong)


# The cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("SAFEREG_CACHE", str(folder))
    return folder / "rows"


def test_the_second_load_reads_the_cache(cache, tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", random_rows(5))
    first = load(path)
    (folder,) = cache.iterdir()
    written = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    time.sleep(0.01)
    second = load(path)
    assert [p.name for p in cache.iterdir()] == [folder.name]
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == written
    assert [first.row(i) for i in range(5)] == [second.row(i) for i in range(5)]
    assert first.content_hash == second.content_hash == folder.name


def test_what_misses_the_cache(cache, tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", random_rows(5))
    seen = {load(path).content_hash}

    def misses(**how):
        before = len(seen)
        seen.add(load(path, **how).content_hash)
        return len(seen) == before + 1

    assert misses(max_length=512)
    assert misses(overlong="truncate")
    assert misses(tokenizer=word_tokenizer(NEWLINE))
    assert misses(tokenizer=word_tokenizer(PLAIN_TEMPLATE))
    other = word_tokenizer()
    other.add_tokens(["w90"])
    assert misses(tokenizer=other)
    path.write_text(path.read_text().replace("0", "1", 1))
    assert misses()
    assert len(list(cache.iterdir())) == len(seen)


def test_an_unfinished_cache_entry_is_made_again(cache, tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", random_rows(5))
    key = load(path).content_hash
    (cache / key / "counts.json").unlink()
    (cache / key / "rows.arrow").write_bytes(b"torn")
    assert len(load(path)) == 5


def test_another_run_may_fill_the_cache_first(cache, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "t.jsonl", random_rows(5))
    plain = tokenized._write_rows

    def slow(*given, **how):
        monkeypatch.setattr(tokenized, "_write_rows", plain)
        load(path)  # the other run, from begin to end
        return plain(*given, **how)

    monkeypatch.setattr(tokenized, "_write_rows", slow)
    assert len(load(path)) == 5
    assert len(list(cache.iterdir())) == 1


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAFEREG_CACHE", str(tmp_path / "file" / "cache"))
    path = write_jsonl(tmp_path / "t.jsonl", random_rows(5))
    with pytest.raises(DataError, match="SAFEREG_CACHE"):
        load(path)


# The tokenizer


def test_tokenizers_that_cannot_serve(tmp_path):
    with pytest.raises(ConfigError, match="no tokenizer"):
        load_tokenizer(str(tmp_path), config())
    word_tokenizer(None).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"chat template.*data\.chat_template"):
        load_tokenizer(str(tmp_path), config())
    with pytest.raises(ConfigError, match="found none"):
        load_tokenizer(str(tmp_path), config(chat_template=str(tmp_path / "none.jinja")))
    (tmp_path / "t.jinja").write_text(NEWLINE)
    tokenizer = load_tokenizer(str(tmp_path), config(chat_template=str(tmp_path / "t.jinja")))
    assert tokenizer.chat_template == NEWLINE
    bare = word_tokenizer()
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), config()).pad_token == "<eos>"


# Ranks and positions


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    import os

    folder = tmp_path_factory.mktemp("stores")
    os.environ["SAFEREG_CACHE"] = str(folder / "cache")
    made = {}
    for count in (3, 7, 20):
        path = write_jsonl(folder / f"{count}.jsonl", random_rows(count))
        made[count] = load(path)
    return made


def stream(store, rank=0, world_size=1, *, anchor=None, fraction=0.25, seed=0, epochs=None):
    return Sampler(
        store,
        anchor,
        anchor_fraction=fraction,
        rank=rank,
        world_size=world_size,
        seed=seed,
        epochs=epochs,
    )


@pytest.mark.parametrize("count", [3, 7, 20])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_rows_without_duplicates(stores, count, world_size):
    store = stores[count]
    shares = []
    for rank in range(world_size):
        s = stream(store, rank, world_size)
        size = len(range(rank, count, world_size))
        epochs = [[s.row(e * size + i).id for i in range(size)] for e in range(3)]
        assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
        assert len(set(epochs[0])) == size
        shares += epochs[0]
        if size > 4:
            assert epochs[0] != epochs[1]
    assert sorted(shares) == sorted(store.row(i).id for i in range(count))


def test_the_seed_decides(stores):
    def order(seed):
        s = stream(stores[20], seed=seed)
        return [s.row(i).id for i in range(20)]

    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.25, 0.29, 0.5, 0.9])
@pytest.mark.parametrize("world_size", [1, 3])
def test_anchors_come_at_their_fraction(stores, fraction, world_size):
    seen = Counter()
    for rank in range(world_size):
        s = stream(stores[20], rank, world_size, anchor=stores[7], fraction=fraction)
        kinds = [s.row(i).is_anchor for i in range(200)]
        for end in range(1, 201):
            assert abs(sum(kinds[:end]) - fraction * end) <= 1
        ids = [s.row(i).id for i, is_anchor in enumerate(kinds) if is_anchor]
        own = len(range(rank, 7, world_size))
        for start in range(0, len(ids) - own + 1, own):  # every anchor once before any comes again
            assert len(set(ids[start : start + own])) == own
        seen.update(set(ids))
        train = [s.row(i).id for i, is_anchor in enumerate(kinds) if not is_anchor]
        size = len(range(rank, 20, world_size))
        assert len(set(train[:size])) == min(size, len(train))
    if fraction * 200 / world_size >= 7:
        assert seen == Counter({stores[7].row(i).id: 1 for i in range(7)})


def test_a_position_determines_its_row(stores):
    def make():
        return stream(stores[20], 1, 3, anchor=stores[7])

    straight = make()
    rows = [straight.row(i) for i in range(60)]
    for position in (59, 0, 31, 7, 8, 30):
        assert make().row(position) == rows[position]
    back = make()
    assert [back.row(i) for i in reversed(range(60))] == rows[::-1]


def test_filler_after_the_last_epoch(stores):
    for rank, size in ((0, 3), (1, 2), (2, 2)):
        s = stream(stores[7], rank, 3, epochs=2)
        rows = [s.row(i) for i in range(8)]
        assert [row is not None for row in rows] == [i < 2 * size for i in range(8)]
    tiny = stream(stores[7], epochs=0.001)
    assert tiny.row(0) is not None  # never a run without a row
    assert tiny.row(1) is None


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("rows_per_step", [1, 4, 6])
@pytest.mark.parametrize("epochs", [0.5, 1, 2.5])
@pytest.mark.parametrize("fraction", [None, 0.05, 0.25])
def test_steps_for_shows_every_row(stores, world_size, rows_per_step, epochs, fraction):
    store = stores[7]
    steps = steps_for(
        store,
        epochs=epochs,
        world_size=world_size,
        rows_per_step=rows_per_step,
        anchor_fraction=fraction or 0.0,
    )
    last_step_is_needed = False
    for rank in range(world_size):
        anchor = stores[3] if fraction else None
        s = stream(store, rank, world_size, anchor=anchor, fraction=fraction or 0.5, epochs=epochs)
        rows = [s.row(i) for i in range(steps * rows_per_step)]
        trained = [row.id for row in rows if row is not None and not row.is_anchor]
        own = len(range(rank, 7, world_size))
        assert len(trained) == max(1, round(epochs * own))
        last = rows[-rows_per_step:]
        last_step_is_needed |= any(row is not None and not row.is_anchor for row in last)
    assert last_step_is_needed


def test_new_rows_are_announced_until_every_rank_has_seen_its_own(stores):
    for anchor in (None, stores[3]):
        for world_size in (1, 2, 3):
            streams = [stream(stores[7], r, world_size, anchor=anchor) for r in range(world_size)]
            seen = [set() for _ in streams]
            for position in range(40):
                promised = [s.in_first_epoch(position) for s in streams]
                assert len(set(promised)) == 1
                for known, s in zip(seen, streams, strict=True):
                    row = s.row(position)
                    if not row.is_anchor:
                        assert promised[0] or row.id in known
                        known.add(row.id)
            assert not promised[0]


def test_fewer_rows_than_ranks(stores):
    with pytest.raises(DataError, match=r"data\.train has 3 usable rows for 4 ranks"):
        stream(stores[3], 0, 4)
    with pytest.raises(DataError, match=r"data\.anchor has 3 usable rows for 4 ranks"):
        stream(stores[20], 0, 4, anchor=stores[3])


# Micro-batches


def test_micro_batches_against_loops(stores):
    s = stream(stores[20], anchor=stores[3])
    rows = s.rows(5, 12, filler=filler(0))
    batches = [collate(rows[begin : begin + 3], pad_id=0) for begin in range(0, 12, 3)]
    assert len(batches) == 4
    expected_rows = [s.row(5 + i) for i in range(12)]
    assert [row for batch in batches for row in batch.rows] == expected_rows
    for batch in batches:
        width = max(len(row.input_ids) for row in batch.rows)
        flat, labels, owner = [], [], []
        for b, row in enumerate(batch.rows):
            for t in range(width):
                real = t < len(row.input_ids)
                assert batch.input_ids[b, t] == (row.input_ids[t] if real else 0)
                if real and t > 0 and row.loss_mask[t]:
                    flat.append(b * width + t - 1)
                    labels.append(row.input_ids[t])
                    owner.append(b)
        assert batch.response_index.tolist() == flat
        assert batch.labels.tolist() == labels
        assert batch.row_of_token.tolist() == owner
        assert batch.tokens_of_row == tuple(owner.count(b) for b in range(len(batch.rows)))
        assert batch.tokens_of_row == tuple(row.num_response_tokens for row in batch.rows)
        assert batch.num_response_tokens == len(labels)
        assert batch.row_begins == tuple(b * width for b in range(len(batch.rows)))
        for tensor in (batch.input_ids, batch.response_index, batch.labels):
            assert tensor.dtype == torch.int64
        # The position names the state that predicts the label.
        shifted = batch.input_ids.reshape(-1)[batch.response_index + 1]
        assert torch.equal(shifted, batch.labels)


def test_fillers_are_inert():
    inert = filler(7)
    batch = collate([inert, inert], pad_id=7)
    assert batch.input_ids.tolist() == [[7], [7]]
    assert batch.num_response_tokens == 0
    assert batch.tokens_of_row == (0, 0)
    assert all(row.prompt_ends == [] for row in batch.rows)
    assert all(row.id == "" for row in batch.rows)
    assert (inert.risk, inert.is_anchor, inert.messages_json) == (None, False, "")


def test_a_filler_stands_where_a_stream_has_no_row(stores):
    """After the last epoch, and where an even deal leaves this rank no row."""
    inert = filler(3)
    s = stream(stores[7], 1, 3, epochs=2)  # this rank has two of the seven rows
    assert s.rows(2, 5, filler=inert) == [s.row(2), s.row(3), inert, inert, inert]
    assert s.rows(9, 2, filler=inert) == [inert, inert]
    assert s.rows(0, 0, filler=inert) == []
    dealt = [
        Sampler(
            stores[7],
            None,
            anchor_fraction=0.0,
            rank=rank,
            world_size=3,
            seed=0,
            epochs=None,
            active=np.arange(7) < 2,
        ).rows(0, 6, filler=inert)
        for rank in range(3)
    ]
    assert sum(row is inert for own in dealt for row in own) == 2 * (3 * 3 - 7)
    seen = Counter(row.id for own in dealt for row in own if row is not inert)
    assert seen == Counter({stores[7].row(i).id: 2 for i in range(7)})


def test_sequences_are_padded_on_the_right_and_cut():
    found = padded([[5, 6, 7], [], [8]], width=2, fill=9)
    assert found.tolist() == [[5, 6], [9, 9], [8, 9]]
    assert found.dtype == torch.int64
    assert padded([[1]], width=3).tolist() == [[1, 0, 0]]
    assert padded([], width=3).shape == (0, 3)


def test_moving_keeps_everything(stores):
    batch = collate([stores[3].row(0)], pad_id=0)
    moved = batch.to(torch.device("cpu"))
    for field in fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        assert torch.equal(before, after) if torch.is_tensor(before) else before == after


def test_the_words_of_this_file_are_known(stores):
    assert "w89" in builders.WORDS
    kept = {field.name for field in fields(Row)} - {"is_anchor"}
    assert set(stores[3].table.column_names) == kept


def test_rows_are_stacked_in_the_order_given(stores):
    rows = [stores[20].row(i) for i in range(4)]
    for order in ([2, 0], [3, 1], [3, 2, 1, 0]):
        batch = collate([rows[i] for i in order], pad_id=0)
        assert list(batch.rows) == [rows[i] for i in order]
        for ids, i in zip(batch.input_ids.tolist(), order, strict=True):
            length = len(rows[i].input_ids)
            assert ids == rows[i].input_ids + [0] * (len(ids) - length)


def test_a_template_that_begins_with_the_answer():
    """Nothing comes before the first token, so nothing can learn it."""
    begins = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    row = tokenize_row(
        chat(("u", "w1"), ("a", "w2 w3")), "", word_tokenizer(begins), default_id="r"
    )
    assert row.loss_mask == [0, 1]
    assert row.prompt_ends == [1]
