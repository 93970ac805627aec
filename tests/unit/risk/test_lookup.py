"""Claimed: a row that comes as tokens gets the risk of the scored row whose texts it holds.

Exact: through several templates, cut at its end, among rows that begin alike and rows that are part
of one another; a row that is not in the file, or too little of which is left, counts as risky and
is counted; a file of another data set is refused.
"""

import math

import pytest
from support.builders import TEMPLATE, random_rows, word_tokenizer, write_jsonl

from safereg_dist.data import tokenize_row
from safereg_dist.data.collation import row_of
from safereg_dist.errors import DataError
from safereg_dist.risk.lookup import LookupRisk, read_scored

TALKATIVE = TEMPLATE.replace("'<user> ' +", "'<user> w70 w71 ' +").replace(
    "{{ '<bos>' }}", "{{ '<bos> w72 w73 w74 ' }}"
)
WORDY = " ".join(f"w{n}" for n in range(20, 50))


def tokens_of(raw, template=TEMPLATE, keep=None):
    """The row as a stack hands it over: tokens, without the texts."""
    row = tokenize_row(raw, "", word_tokenizer(template), default_id="x")
    return row_of(row.id, row.input_ids[:keep], row.loss_mask[:keep])


def lookup(tmp_path, rows, **how):
    path = write_jsonl(tmp_path / "scored.jsonl", rows)
    return LookupRisk(read_scored(str(path)), word_tokenizer(), path=str(path), **how)


def ask(source, *rows):
    return source(rows, in_first_epoch=True)


@pytest.mark.parametrize("template", [TEMPLATE, TALKATIVE], ids=["own", "talkative"])
def test_every_row_is_found_through_a_template(tmp_path, template):
    raws = random_rows(30, seed=7)
    source = lookup(tmp_path, raws)
    found = ask(source, *(tokens_of(raw, template) for raw in raws))
    assert found == [raw["risk"] for raw in raws]
    assert source.take_sums()["risk_unknown"] == 0.0


def test_forms_of_rows(tmp_path):
    chat = {
        "messages": [
            {"role": "user", "content": "w1 w2"},
            {"role": "assistant", "content": "w3"},
            {"role": "user", "content": "w4"},
            {"role": "assistant", "content": "w5 w6 w7"},
        ]
    }
    alpaca = {"instruction": "w8 w9", "input": "w10", "output": "w11 w12"}
    source = lookup(tmp_path, [chat | {"risk": 0.1}, alpaca | {"risk": 0.2}])
    assert ask(source, tokens_of(chat), tokens_of(alpaca)) == [0.1, 0.2]


def test_the_longest_match_wins_and_of_equals_the_riskier(tmp_path):
    short = {"prompt": "w1 w2", "response": "w3"}
    long = {"prompt": "w1 w2", "response": "w3 w4 w5"}
    scored = [short | {"risk": 0.9}, long | {"risk": 0.1}, long | {"risk": 0.3}]
    assert ask(lookup(tmp_path, scored), tokens_of(long), tokens_of(short)) == [0.3, 0.9]


def test_a_row_cut_at_its_end(tmp_path):
    raw = {"prompt": "w1 w2", "response": WORDY}
    source = lookup(tmp_path, [raw | {"risk": 0.25}])
    whole = len(tokens_of(raw).input_ids)
    assert ask(source, tokens_of(raw, keep=whole - 10)) == [0.25]
    (left,) = ask(source, tokens_of(raw, keep=8))  # of the answer too little to know it by
    assert math.isnan(left)


def test_unknown_rows_count_as_risky_and_are_counted(tmp_path, capsys):
    source = lookup(tmp_path, [{"prompt": "w1", "response": WORDY, "risk": 0.0}])
    known = tokens_of({"prompt": "w1", "response": WORDY})
    other = tokens_of({"prompt": "w2", "response": "w3 w4"})
    anchor = row_of("a", [7, 8], [0, 1], is_anchor=True)
    found = ask(source, known, other, anchor)
    assert found[0] == 0.0
    assert math.isnan(found[1])
    assert found[2] is None
    assert source.end_step(source.take_sums()) == {"risk_unknown": 1}
    said = capsys.readouterr().err
    assert said.strip().count("\n") == 0
    assert "1 rows of this step are not in risk.path=" in said
    assert "held back" in said
    assert "score them too (`safereg score`)" in said
    assert "the first begins '" in said
    assert "w2" in said
    assert "its response 'w3 w4" in said
    assert source.take_sums()["risk_unknown"] == 0.0
    ask(source, other)
    assert source.end_step(source.take_sums()) == {"risk_unknown": 1}
    assert capsys.readouterr().err == ""  # said once


def test_a_file_of_another_data_set_is_refused(tmp_path):
    source = lookup(tmp_path, [{"prompt": "w1", "response": WORDY, "risk": 0.5}])
    rows = [tokens_of({"prompt": f"w{n}", "response": "w3 w4"}) for n in range(64)]
    ask(source, *rows[:63])
    with pytest.raises(DataError, match=r"none of the first 64 rows is in .* response 'w3 w4"):
        ask(source, rows[63])


def test_a_run_that_found_no_row_is_refused_at_its_end(tmp_path, capsys):
    """However few rows it has; where another rank has found one, it stands."""
    known = [{"prompt": "w1", "response": WORDY, "risk": 0.5}]
    for elsewhere in (0.0, 1.0):
        source = lookup(tmp_path, known)
        for number in range(3):
            ask(source, tokens_of({"prompt": f"w{number}", "response": "w3 w4"}))
            sums = source.take_sums()
            source.end_step({**sums, "risk_found": sums["risk_found"] + elsewhere})
        if elsewhere:
            source.finish()
        else:
            with pytest.raises(DataError, match=r"none of the 3 rows of this run is in risk\.path"):
                source.finish()
    fresh = lookup(tmp_path, known)
    fresh.finish()  # a run that was complete already asks for nothing
    capsys.readouterr()


def test_an_unknown_row_that_comes_with_its_messages(tmp_path, capsys):
    scored = write_jsonl(tmp_path / "s.jsonl", [{"prompt": "w1", "response": "w2", "risk": 0.5}])
    source = LookupRisk(read_scored(str(scored)), None, path="s.jsonl")
    raw = {"prompt": "what " * 20, "response": "w3"}
    ask(source, tokenize_row(raw, "", word_tokenizer(), default_id="x"))
    source.end_step(source.take_sums())
    shown = ("what " * 20)[:48]
    assert f"the first begins '{shown}...', its response 'w3'" in capsys.readouterr().err


def test_rows_that_lost_their_id_get_the_scored_one(tmp_path):
    raws = random_rows(3, seed=7)
    source = lookup(tmp_path, [raw | {"id": f"r{i}"} for i, raw in enumerate(raws)])
    assert source.names_rows
    other = tokens_of({"prompt": "w2", "response": "w3 w4"})
    ask(source, tokens_of(raws[2]), other, row_of("a", [7, 8], [0, 1], is_anchor=True))
    assert source.ids == {0: "r2"}
    ask(source, other)
    assert source.ids == {}
    bare = [{"prompt": "w1", "response": "w2", "risk": 0.5}]
    assert not lookup(tmp_path, bare).names_rows


def test_decisions_that_no_row_will_be_given(tmp_path):
    raw, other = random_rows(2, seed=7)
    rows = [raw | {"id": "a", "risk": 0.1}, other | {"id": 2}, raw | {"id": "c", "risk": 0.2}]
    source = lookup(tmp_path, rows)
    assert source.without_effect(["a", "2", "c", "d"]) == ["a", "d"]


def test_tokens_need_a_tokenizer(tmp_path):
    path = write_jsonl(tmp_path / "s.jsonl", [{"prompt": "w1", "response": "w2", "risk": 0.5}])
    source = LookupRisk(read_scored(str(path)), None, path=str(path))
    with pytest.raises(DataError, match="has no tokenizer"):
        ask(source, tokens_of({"prompt": "w1", "response": "w2"}))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no row"),
        ([{"prompt": "w1", "response": "w2"}], "expected `risk` in"),
        ([{"prompt": "w1", "response": "w2", "risk": 1.5}], "expected `risk` in"),
        ([{"risk": 0.5}], "expected"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read_scored(str(write_jsonl(tmp_path / "s.jsonl", rows)))
    with pytest.raises(DataError, match="found none"):
        read_scored(str(tmp_path / "missing.jsonl"))
