"""Claimed: several signals combine by the written rules, a reviewer's decision stands above all of
them, a failed signal counts in full, and the counts add up to the metrics.

The judge is NumPy from the equations in `risk.stage`. Rounds: 1e-12 relative; decisions are exact.
The signals here are columns of numbers; real ones are tested in files of their own.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builders import random_rows, word_tokenizer, write_jsonl

from safereg_dist.data import tokenize_row
from safereg_dist.errors import DataError
from safereg_dist.risk.override import Override, read_overrides
from safereg_dist.risk.stage import (
    COMMON_THRESHOLD,
    ColumnRisk,
    RiskSource,
    RiskStage,
    WeightedSource,
)

TOKENIZER = word_tokenizer()
UNIT = st.floats(0, 1)
NAN = math.nan


class Numbers(RiskSource):
    """A signal that says what it was told to."""

    name = "numbers"

    def __init__(self, *values, notes=None):
        self.values = list(values)
        self.notes = notes or {}

    def __call__(self, rows, probed=None, *, in_first_epoch):
        """The numbers, one a row."""
        return list(self.values)


def rows_of(count):
    raws = random_rows(count, risk=False)
    return [
        tokenize_row({**raw, "id": f"r{i}"}, "", TOKENIZER, default_id="")
        for i, raw in enumerate(raws)
    ]


def ask(source, rows):
    """What a source or the stage says of rows in the first epoch."""
    return source(rows, in_first_epoch=True)


def stage(rule, *parts, overrides=None):
    """Parts are (values, threshold, weight)."""
    built = [WeightedSource(f"c{i}", Numbers(*v), t, w) for i, (v, t, w) in enumerate(parts)]
    return RiskStage(built, rule=rule, overrides=overrides)


def scaled(risk, threshold):
    """The piecewise line through (0, 0), (threshold, 0.5), (1, 1), by NumPy."""
    if threshold in (0.0, 1.0):
        return risk if threshold == 1.0 and risk == 1 else (0.5 + 0.5 * risk) * (threshold == 0)
    return float(np.interp(risk, [0, threshold, 1], [0, 0.5, 1]))


@settings(deadline=None, max_examples=100)
@given(
    values=st.lists(st.tuples(UNIT, UNIT, UNIT), min_size=1, max_size=4),
    thresholds=st.tuples(*[st.floats(0.01, 0.99)] * 3),
    weights=st.tuples(*[st.floats(0.1, 5)] * 3),
)
def test_rules_are_the_equations(values, thresholds, weights):
    columns = list(zip(*values, strict=True))
    parts = list(zip(columns, thresholds, weights, strict=True))
    rows = rows_of(len(values))
    table = np.array([[scaled(r, t) for r, t in zip(v, thresholds, strict=True)] for v in values])
    largest = ask(stage("max", *parts), rows)
    assert largest.values == pytest.approx(table.max(1), rel=1e-9, abs=1e-12)
    mean = ask(stage("weighted", *parts), rows)
    assert mean.values == pytest.approx(table @ weights / np.sum(weights), rel=1e-9, abs=1e-12)
    for place, name in enumerate(("c0", "c1", "c2")):
        assert mean.by_category[name] == pytest.approx(table[:, place], rel=1e-9, abs=1e-12)
    leaders = [source.removeprefix("max:c") for source in largest.sources]
    for row, leader in zip(table, leaders, strict=True):
        assert row[int(leader)] == row.max()


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3, 0.5, 0.997, 1.0])
def test_a_signal_sets_in_where_it_did(threshold):
    risks = sorted({*np.linspace(0, 1, 101), threshold, np.nextafter(threshold, 2)} - {1 + 1e-16})
    risks = [float(r) for r in risks if 0 <= r <= 1]
    found = ask(stage("max", (risks, threshold, 1.0)), rows_of(len(risks))).values
    assert found == sorted(found)
    for risk, value in zip(risks, found, strict=True):
        assert (value >= COMMON_THRESHOLD) == (risk >= threshold), (risk, value)
        assert 0 <= value <= 1


def test_a_single_signal_is_left_as_it_is():
    single = RiskStage([WeightedSource("", Numbers(0.25, None, NAN), 0.3)])
    found = ask(single, rows_of(3))
    assert found.values[:2] == [0.25, None]
    assert math.isnan(found.values[2])
    assert found.by_category == {}
    assert found.sources == ["numbers"] * 3
    assert (single.name, single.threshold) == ("numbers", 0.3)
    assert single.take_sums() == {}
    assert single.end_step({}) == {}
    assert not single.looks_ahead


def test_failed_and_missing_signals():
    parts = [((0.9, NAN, None, None), 0.5, 1.0), ((NAN, 0.2, 0.4, None), 0.5, 3.0)]
    largest = ask(stage("max", *parts), rows_of(4))
    assert math.isnan(largest.values[0])  # full risk, and still recognisable as failed
    assert math.isnan(largest.values[1])
    assert largest.values[2:] == [0.4, None]
    mean = ask(stage("weighted", *parts), rows_of(4))
    assert math.isnan(mean.values[0])  # the others must not outvote what is not known
    assert math.isnan(mean.values[1])
    assert mean.values[2] == pytest.approx(0.4)
    assert mean.values[3] is None


def test_a_reviewer_has_the_last_word():
    rows = rows_of(4)
    overrides = {"r0": Override(0.0, "allow: a quote"), "r2": Override(1.0, "hold: seen")}
    found = ask(stage("max", ((0.9, 0.9, 0.1, NAN), 0.5, 1.0), overrides=overrides), rows)
    assert found.values[:3] == [0.0, 0.9, 1.0]
    assert found.by_category["c0"][:3] == [0.0, 0.9, 1.0]
    assert found.sources == ["override", "max:c0", "override", "max:c0"]
    assert found.notes == {0: "allow: a quote", 2: "hold: seen"}


class Named(Numbers):
    """A signal that knows ids of its own."""

    names_rows = True

    def __init__(self, *values, ids):
        super().__init__(*values)
        self.ids = ids


def unnamed(count):
    return [replace(row, id=f"sha256:{row.id}") for row in rows_of(count)]


def test_a_decision_finds_a_row_by_the_id_that_the_source_gives():
    rows = [*unnamed(3), replace(rows_of(4)[3], id="own")]
    source = Named(0.9, 0.8, 0.7, 0.6, ids={0: "a", 1: "b", 3: "b"})
    decisions = {"b": Override(0.0, "allow: b"), "sha256:r2": Override(1.0, "hold: c")}
    found = ask(RiskStage([WeightedSource("", source, 0.5)], overrides=decisions), rows)
    assert found.values == [0.9, 0.0, 1.0, 0.6]  # a row's own id comes first
    assert found.ids == {0: "a", 1: "b"}
    assert found.of_rows([2, 1]).ids == {1: "b"}


def test_decisions_on_rows_without_ids_are_refused():
    decisions = {"r0": Override(1.0, "hold: seen")}

    def asked(source, rows, overrides=decisions):
        built = RiskStage([WeightedSource("", source, 0.5)], overrides=overrides)
        return ask(built, rows).values

    with pytest.raises(DataError, match=r"risk\.override decides .*sha256:r0.*estimator=lookup"):
        asked(Numbers(0.1, 0.2), unnamed(2))
    assert asked(Numbers(0.1, 0.2), [rows_of(1)[0], unnamed(2)[1]]) == [1.0, 0.2]
    assert asked(Named(NAN, 0.2, ids={}), unnamed(2))[1] == 0.2  # it may know the next row's
    by_content = {"sha256:r1": Override(1.0, "hold: seen")}
    assert asked(Numbers(0.1, 0.2), unnamed(2), by_content) == [0.1, 1.0]


def test_counts_become_metrics():
    parts = [((0.9, 0.1, None), 0.5, 1.0), ((0.2, 0.6, NAN), 0.5, 1.0)]
    rows = rows_of(3)
    several = stage("max", *parts)
    ask(several, rows)
    ask(several, rows)
    sums = several.take_sums()
    assert list(sums) == list(several.sum_names)
    assert sums["risk_rows/c0"] == 4
    assert sums["risk_sum/c1"] == pytest.approx(2 * (0.2 + 0.6 + 1))
    row = several.end_step(sums)
    assert row["risk_mean/c0"] == pytest.approx(0.5)
    assert row["risk_mean/c1"] == pytest.approx(0.6)
    assert (row["risky_rows/c0"], row["risky_rows/c1"]) == (2, 4)
    assert set(several.take_sums().values()) == {0.0}


def test_a_plain_source_knows_nothing(tmp_path):
    """What a source that overrides nothing does: no risk, no count, no file."""
    plain = RiskSource()
    assert ask(plain, rows_of(2)) == [None, None]
    assert (plain.name, plain.reads_policy, plain.looks_ahead) == ("none", False, False)
    stage = RiskStage([WeightedSource("", plain, 0.5)])
    stage.begin_step(0)
    stage.prefetch(rows_of(2))
    assert ask(stage, rows_of(2)).values == [None, None]
    assert stage.end_step(stage.take_sums()) == {}
    stage.save_state(tmp_path / "risk.safetensors")
    stage.load_state(tmp_path / "risk.safetensors")
    assert list(tmp_path.iterdir()) == []


# Overrides


def test_overrides_are_read(tmp_path):
    path = tmp_path / "override.jsonl"
    rows = [
        {"id": "a", "action": "allow", "reason": "a quote"},
        {"id": 7, "action": "hold", "reason": "seen"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_overrides(path) == {"a": (0.0, "allow: a quote"), "7": (1.0, "hold: seen")}


@pytest.mark.parametrize(
    "row",
    [
        {"id": "a", "action": "allow"},
        {"id": "a", "action": "allow", "reason": ""},
        {"id": "a", "action": "alow", "reason": "x"},
        {"action": "hold", "reason": "x"},
        {"id": "", "action": "hold", "reason": "x"},
    ],
)
def test_an_override_without_a_field_is_refused(tmp_path, row):
    path = tmp_path / "override.jsonl"
    good = {"id": "b", "action": "hold", "reason": "x"}
    path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"override.jsonl:2.*action"):
        read_overrides(path)
    path.write_text(2 * (json.dumps(good) + "\n"))
    with pytest.raises(DataError, match="twice"):
        read_overrides(path)


def test_torch_is_not_needed_for_a_risk():
    """Risk is a matter of the host: nothing here is a tensor."""
    found = ask(stage("max", ((0.9, 0.1), 0.5, 1.0)), rows_of(2))
    assert not any(torch.is_tensor(value) for value in found.values)


class Broken(RiskSource):
    """A signal that fails."""

    name = "broken"

    def __call__(self, rows, probed=None, *, in_first_epoch):
        """Nothing."""
        raise DataError("broken")


def test_a_failed_signal_does_not_keep_the_next_from_its_collectives():
    asked = []

    class Next(Numbers):
        def __call__(self, rows, probed=None, *, in_first_epoch):
            """Its numbers; it notes that it was asked."""
            asked.append(1)
            return super().__call__(rows, probed, in_first_epoch=in_first_epoch)

    sources = [WeightedSource("first", Broken(), 0.5), WeightedSource("second", Next(0.5), 0.5)]
    with pytest.raises(DataError, match="broken"):
        ask(RiskStage(sources, rule="max"), rows_of(1))
    assert asked == [1]


def test_neither_column_nor_reviewer_speak_of_anchors():
    rows = [replace(row, risk=0.75, is_anchor=i == 1) for i, row in enumerate(rows_of(2))]
    assert ask(ColumnRisk(), rows) == [0.75, None]
    decisions = {row.id: Override(1.0, "hold: seen") for row in rows}
    column = RiskStage([WeightedSource("", ColumnRisk(), 0.5)], overrides=decisions)
    found = ask(column, rows)
    assert found.values == [1.0, None]
    assert found.sources == ["override", "column"]


def test_one_row_has_one_decision(tmp_path):
    decision = {"id": 7, "action": "hold", "reason": "seen"}
    path = write_jsonl(tmp_path / "twice.jsonl", [decision, {**decision, "id": "7"}])
    with pytest.raises(DataError, match=r"twice\.jsonl:2: id '7' is overridden twice"):
        read_overrides(path)
