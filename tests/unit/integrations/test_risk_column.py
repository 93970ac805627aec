"""Claimed: a Trainer's `risk` column is checked as a whole before the reference is loaded: its
values, the share of rows that would be held back, and rows that hide in a heap below the threshold.
Exact.

Tables of plain rows, of packed lines and of rows in another order; what cannot be checked is said
where the settings ask for it.
"""

import math

import numpy as np
import pytest
from datasets import Dataset
from support.builders import write_jsonl
from support.trainer_runs import dataset, features, trainer

from safereg_dist.config import config_from_dict
from safereg_dist.errors import ConfigError, DataError
from safereg_dist.integrations.risk_column import check_risk_column


def check(data, *, announces=True, regularizer=None, poison=0.0, **risk):
    raw = {
        "model": "-",
        "data": {"train": "-", "declared_poison": poison},
        "risk": {"estimator": "column", **risk},
        "regularizer": regularizer or {},
    }
    data = Dataset.from_list(data) if isinstance(data, list) else data
    check_risk_column(data, config_from_dict(raw), announces=announces)


def rows(risks, **columns):
    return [{"risk": risk, **{k: v[i] for k, v in columns.items()}} for i, risk in enumerate(risks)]


FEW = [0.9, 0.1, 0.5, 0.49] + [0.0] * 6
"""Two of ten at or above one half."""


@pytest.mark.parametrize("bad", [None, math.nan, 1.25, -0.5, math.inf])
def test_a_value_that_is_no_risk_is_named(bad):
    ids = [f"r{n}" for n in range(6)]
    message = (
        r"2 of 6 rows have none or another value, the first is row 3, counted from 0 \(id 'r3'\), "
    )
    message += "with "
    with pytest.raises(DataError, match=message + ("nan" if bad is math.nan else f"{bad}")):
        check(rows([0.1, 0, 1.0, bad, 0.5, bad], id=ids), max_held_back=1.0)


def test_values_that_are_no_numbers():
    with pytest.raises(DataError, match="with 'high'"):
        check(rows(["0.5", "high"]), max_held_back=1.0)


def test_the_share_at_or_above_the_threshold():
    check(rows(FEW))  # 20 %, the default
    message = r"2 of 10 rows \(20\.0%\) would be held back.* = 10\.0%: .*`risk` is 0\.5 or more;"
    with pytest.raises(ConfigError, match=message):
        check(rows(FEW), max_held_back=0.1)
    check(rows(FEW), max_held_back=0.1, poison=0.1)
    with pytest.raises(ConfigError, match=r"3 of 10 rows"):
        check(rows(FEW), regularizer={"threshold": 0.49})
    check(rows([1.0] * 10), max_held_back=1.0)


def test_decisions_count_and_anchors_do_not(tmp_path):
    ids = [*range(10)]
    decisions = [
        {"id": "0", "action": "allow", "reason": "seen"},
        {"id": "2", "action": "allow", "reason": "seen"},
        {"id": "9", "action": "hold", "reason": "seen"},
    ]
    path = str(write_jsonl(tmp_path / "o.jsonl", decisions))
    check(rows(FEW, id=ids), override=path, max_held_back=0.1)
    with pytest.raises(ConfigError, match="1 of 10 rows"):
        check(rows(FEW, id=ids), override=path, max_held_back=0.05)
    anchors = rows([*FEW, None, None], is_anchor=[False] * 10 + [True] * 2)
    with pytest.raises(ConfigError, match="2 of 10 rows"):
        check(anchors, max_held_back=0.1)


LINES = [[0.9, 0.9, 0.1, 0.1, 0.1], [0.0, 0.7], [0.2, 0.2, 0.6, 0.6]]
"""Packed: rows of 2 and 3 tokens, one of 2, two of 2. Of a row only the first value is read."""


@pytest.mark.parametrize(
    "columns",
    [
        {"seq_lengths": [[2, 3], [2], [2, 2]]},
        {"position_ids": [[0, 1, 0, 1, 2], [0, 1], [0, 1, 0, 1]]},
    ],
    ids=["lengths", "positions"],
)
def test_rows_of_packed_lines(columns, tmp_path):
    ids = [["a", None, "b", None, None], ["c", None], ["d", None, "e", None]]
    packed = rows(LINES, id=ids, **columns)
    check(packed, max_held_back=0.4)
    with pytest.raises(ConfigError, match="2 of 5 rows"):
        check(packed, max_held_back=0.39)
    decision = {"id": "e", "action": "allow", "reason": "seen"}
    override = str(write_jsonl(tmp_path / "o.jsonl", [decision]))
    check(packed, max_held_back=0.2, override=override)
    packed[2]["risk"] = [0.2, 0.2, 1.5, 0.6]
    with pytest.raises(
        DataError, match=r"1 of 5 rows .* row 2, counted from 0 \(id 'e'\), with 1\.5"
    ):
        check(packed)
    packed[2]["risk"] = None
    with pytest.raises(
        DataError, match=r"2 of 5 rows .* row 2, counted from 0 \(id 'd'\), with None"
    ):
        check(packed)


def test_lists_of_rows_that_are_not_packed():
    with pytest.raises(ConfigError, match="1 of 3 rows"):
        check(rows(LINES))


def test_a_large_table_in_another_order():
    drawn = np.random.default_rng(0).random(10_000)
    data = Dataset.from_dict({"risk": drawn}).shuffle(seed=1).select(range(9_000))
    held = int((np.asarray(data["risk"]) >= 0.5).sum())
    with pytest.raises(ConfigError, match=f"{held} of 9000 rows"):
        check(data)


def test_rows_that_hide_below_the_threshold(tmp_path):
    """Of 1000 honest rows 5 % are put just below the threshold: refused, and not above it."""
    honest = np.random.default_rng(0).random(1000) * 0.3
    check(rows(honest.tolist()))
    hiding = [*honest.tolist(), *[0.48] * 50]
    message = r"50 of 1050 rows \(4\.8%\) lie in a heap just below the threshold 0\.5"
    with pytest.raises(ConfigError, match=message):
        check(rows(hiding))
    with pytest.raises(ConfigError, match=r"those whose `risk` is 0\.5 or more"):
        check(rows(hiding))
    check(rows(hiding), max_hidden=1.0)
    check(rows(hiding), max_hidden=0.05)
    check(rows(hiding), regularizer={"schedule": "linear"})  # no cliff to hide behind
    allowed = [{"id": str(n), "action": "allow", "reason": "seen"} for n in range(1000, 1050)]
    ids = [str(n) for n in range(1050)]
    check(rows(hiding, id=ids), override=str(write_jsonl(tmp_path / "o.jsonl", allowed)))


def test_other_sources_of_risk(tmp_path, capsys):
    bad = rows([0.9, 1.5])
    check(bad, estimator="none")
    parts = [{"category": "a", "estimator": "column"}]
    with pytest.raises(DataError, match="1 of 2 rows"):
        check(bad, estimator="max", parts=parts)
    check(rows([0.9, 0.9]), estimator="max", parts=parts)
    assert capsys.readouterr().err == ""
    check(rows([0.9, 0.9]), estimator="max", parts=parts, max_held_back=0.5)
    assert "risk.max_held_back=0.5 cannot be checked here" in capsys.readouterr().err
    check(rows([0.9, 0.9]), estimator="max", parts=parts, max_held_back=0.5, announces=False)
    check(rows([0.9, 0.9]), estimator="max", parts=parts, max_held_back=1.0)
    assert capsys.readouterr().err == ""


def test_data_sets_that_cannot_be_read_at_once(capsys):
    bad = Dataset.from_list(rows([0.9, 1.5]))
    check(bad.with_transform(lambda row: row))
    check(None)
    with pytest.raises(DataError, match="which has text: add it"):
        check(Dataset.from_dict({"text": ["a"]}))
    assert capsys.readouterr().err == ""
    check(bad.to_iterable_dataset(), max_held_back=0.5, max_hidden=0.1)
    said = capsys.readouterr().err
    assert "risk.max_held_back=0.5 and risk.max_hidden=0.1 cannot be checked here" in said
    assert "needs risk.estimator=column and a datasets.Dataset" in said


def test_a_trainer_refuses_before_it_loads_the_reference(tmp_path):
    given = {"reference": {"model": str(tmp_path / "nothing")}, "risk": {"estimator": "column"}}
    with pytest.raises(ConfigError, match=r"of 40 rows .* would be held back"):
        trainer(tmp_path, safereg=given, train_dataset=dataset(40))
    data = features(40)
    data[7]["risk"] = 7.0
    with pytest.raises(DataError, match=r"row 7, counted from 0 \(id 'row-7'\), with 7\.0"):
        trainer(tmp_path, safereg=given, train_dataset=Dataset.from_list(data))
