"""Claimed: in training each row is judged once, ahead of its step where it can be; a failure counts
as its mode says, is noted for the ledger and counted, and is tried again when the row comes back.

Exact. The judge here is a table with threads behind it; real endpoints are in test_critic_*.py,
training with a served judge is in tests/distributed.
"""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.builders import random_rows, word_tokenizer

from safereg_dist.critic.verdict import Verdict
from safereg_dist.data import filler, tokenize_row
from safereg_dist.errors import CriticUnavailable
from safereg_dist.factory.inputs import RowSources
from safereg_dist.risk.judge import CriticRisk

TOKENIZER = word_tokenizer()


class TableCritic:
    """Scores by the number of words; fails on conversations that a test names."""

    identity = "table"

    def __init__(self):
        self.asked = []
        self.failing = set()
        self.gate = threading.Event()
        self.gate.set()
        self._pool = ThreadPoolExecutor(2)

    def submit(self, messages) -> Future:
        """A future of the verdict, from another thread."""
        self.asked.append(messages[-1]["content"])
        return self._pool.submit(self._judge, messages[-1]["content"])

    def _judge(self, answer):
        self.gate.wait(10)
        if answer in self.failing:
            return Verdict(1.0, None, True, "deadline")
        if answer == "stop":
            raise CriticUnavailable("the judge is gone")
        return Verdict(
            len(answer.split()) / 10, "S1" if len(answer.split()) > 5 else None, False, None
        )

    def close(self):
        """Ends the threads."""
        self._pool.shutdown()


def rows_of(raws):
    rows = [tokenize_row(raw, "", TOKENIZER, default_id=f"r{i}") for i, raw in enumerate(raws)]
    return rows


def ask(risk, rows):
    """The judge's risk of rows."""
    return risk(rows, in_first_epoch=True)


RAWS = random_rows(6, risk=False)


def expected(raw):
    return len(raw["response"].split()) / 10


def test_each_conversation_is_judged_once():
    critic = TableCritic()
    risk = CriticRisk(critic)
    rows = rows_of([*RAWS, {**RAWS[0], "id": "again"}])
    rows.append(filler(0))
    for _ in range(3):  # epochs
        assert ask(risk, rows) == [*map(expected, RAWS), expected(RAWS[0]), None]
    assert sorted(critic.asked) == sorted(raw["response"] for raw in RAWS)
    notes = {i: "judge: S1" for i, r in enumerate(rows) if r.loss_mask.count(1) - 1 > 5}
    assert risk.notes == notes
    assert risk.take_sums() == {"risk_failed": 0.0}


def test_coming_rows_are_asked_without_waiting():
    critic = TableCritic()
    critic.gate.clear()
    risk = CriticRisk(critic)
    rows = rows_of(RAWS)
    risk.prefetch(rows)  # returns although nothing can be answered yet
    risk.prefetch(rows)
    assert len(critic.asked) == len(RAWS)
    critic.gate.set()
    assert ask(risk, rows) == [*map(expected, RAWS)]
    assert len(critic.asked) == len(RAWS)


def test_no_row_beyond_the_last_step_is_asked_for():
    stream = SimpleNamespace(row=lambda position: position)
    sources = SimpleNamespace(stream=stream, total_steps=5, rows_per_step=3, train=RAWS)
    sources._read = lambda begin, end: RowSources._read(sources, begin, end)
    assert [*RowSources.coming_rows(sources, 0)] == [0, 1, 2, 3, 4, 5]
    assert [*RowSources.coming_rows(sources, 3)] == [9, 10, 11, 12, 13, 14]
    assert [*RowSources.coming_rows(sources, 4)] == [12, 13, 14]
    stream.row = lambda position: position if position < 4 else None  # the last epoch has ended
    assert [*RowSources.coming_rows(sources, 0)] == [0, 1, 2, 3]


def test_anchors_are_not_judged():
    critic = TableCritic()
    rows = rows_of(RAWS[:2])
    rows[0] = replace(rows[0], is_anchor=True)
    assert ask(CriticRisk(critic), rows) == [None, expected(RAWS[1])]
    assert len(critic.asked) == 1


def test_a_failure_is_noted_counted_and_tried_again(capsys):
    critic = TableCritic()
    critic.failing = {RAWS[2]["response"]}
    risk = CriticRisk(critic)
    rows = rows_of(RAWS)
    assert ask(risk, rows)[2] == 1.0
    assert risk.notes[2] == "judge failed: deadline"
    sums = risk.take_sums()
    assert sums == {"risk_failed": 1.0}
    assert risk.end_step(sums) == {"risk_failed": 1}
    assert "1 judgements of this step failed" in capsys.readouterr().err
    assert risk.end_step(sums) == {"risk_failed": 1}
    assert capsys.readouterr().err == ""
    twice = rows_of([RAWS[2], RAWS[2]])  # one question, two rows
    assert ask(risk, twice) == [1.0, 1.0]
    assert risk.take_sums() == {"risk_failed": 2.0}
    critic.failing = set()
    assert ask(risk, rows)[2] == expected(RAWS[2])
    assert not risk.notes.get(2, "").startswith("judge failed")
    assert len(critic.asked) == len(RAWS) + 2


def test_stop_ends_the_run():
    critic = TableCritic()
    rows = rows_of([*RAWS[:1], {"prompt": "w1", "response": "stop"}])
    with pytest.raises(CriticUnavailable, match="gone"):
        ask(CriticRisk(critic), rows)


def test_notes_are_of_the_last_call():
    critic = TableCritic()
    critic.failing = {RAWS[0]["response"]}
    risk = CriticRisk(critic)
    ask(risk, rows_of(RAWS[:1]))
    assert set(risk.notes) == {0}
    short = next(raw for raw in RAWS[1:] if len(raw["response"].split()) <= 5)
    ask(risk, rows_of([short]))
    assert risk.notes == {}
