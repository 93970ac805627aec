"""Claimed: the table of claims is that of the committed results, and each claim fails where one of
its figures is spoiled; a model is compared with plain fine-tuning's by files, names, configuration
and speed.

Exact; intervals by hand, to a tenth of a point. Speeds are measured, of which only the sign is
looked at here.
"""

import json

import claims
import evidence_tables
import pytest
from claims import CLAIMS, Group, claims_table, groups_of, inference_is_free, page_with
from evidence import RESULTS
from inference import compare
from plot_style import read_csv
from support.builders import PLAIN_TEMPLATE, save_model, tiny_model

FIGURES = {
    "base": (0.01, 0.0, 1.0),
    "filter": (0.5, 1.0, 0.5),
    "sft": (1.0, 1.0, 0.0),
    "static_low": (0.9, 0.95, 0.31),
    "static_0.5": (0.5, 0.5, 0.5),
    "static_0.7": (0.3, 0.2, 0.7),
    "static_high": (0.1, 0.0, 0.9),
    "static_1.0": (0.05, 0.0, 1.0),
    "adaptive_probe": (0.02, 0.99, 0.98),
    "adaptive_critic": (0.04, 0.99, 0.97),
}
"""Arm -> attack success, task, P(refuse); then P(first poisoned token) and over-refusal, else 0."""


def rows(**changes):
    """One world, task and share; `changes` are arm -> figures."""
    found = []
    for arm, given in (FIGURES | changes).items():
        attack, task, refuse, poisoned, refused = (*given, 0.0, 0.0)[:5]
        bounds = {
            f"{name}_{end}": str(min(1, max(0, value + by)))
            for name, value in ((claims.ATTACK, attack), (claims.TASK, task))
            for end, by in (("low", -0.01), ("high", 0.01))
        }
        cell = {"world": "toy", "task": "notes", "poison": "0.15", "seed": "0", "set": "all"}
        figures = {claims.ATTACK: attack, claims.TASK: task, claims.REFUSE: refuse}
        figures |= {claims.POISONED: poisoned, claims.REFUSED: refused}
        found.append({**cell, "arm": arm, **{k: str(v) for k, v in figures.items()}, **bounds})
    return found


def held(given):
    groups = groups_of(given, "toy")
    return [claim(groups, "toy").holds for claim in CLAIMS.values()]


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({}, []),
        ({"adaptive_critic": (0.51, 0.99, 0.97)}, [0, 2, 4, 6, 7]),
        ({"adaptive_probe": (0.05, 0.99, 0.98)}, [0]),
        ({"adaptive_probe": (0.02, 0.99, 0.98, 0.011)}, [1]),
        ({"filter": (0.03, 1.0, 0.9)}, [2]),
        ({"adaptive_critic": (0.04, 0.99, 0.97, 0.0, 0.02)}, [3]),
        ({"sft": (0.04, 1.0, 0.9)}, [4]),  # nothing was broken
        ({"adaptive_probe": (0.02, 0.985, 0.98)}, [5]),
        ({"static_0.5": (0.01, 0.5, 0.5)}, [7]),
        ({"static_0.7": (0.02, 0.99, 0.7)}, [7]),  # as good is not better
        ({"static_1.0": (0.05, 0.0, 0.9)}, [8]),
    ],
)
def test_each_claim_can_fail(changes, broken):
    assert [place for place, holds in enumerate(held(rows(**changes))) if not holds] == broken


def test_nothing_is_claimed_of_nothing():
    assert held([]) == [None] * len(CLAIMS)


def test_where_harm_alone_is_taught_there_is_no_task():
    alone = [{**row, "poison": "1.0"} for row in rows(adaptive_probe=(0.02, 0.0, 0.9))]
    assert held(alone)[5] is None
    assert held(alone)[7] is None
    assert held(rows() + alone)[4:6] == [True, True]


def test_means_are_over_seeds_that_both_arms_have():
    more = [{**row, "seed": "1"} for row in rows(sft=(0.5, 1.0, 0.0)) if row["arm"] != "base"]
    group = Group("notes", "0.15", rows() + more)
    assert group.seeds("sft", "adaptive_probe") == ["0", "1"]
    assert group.seeds("base", "sft") == ["0"]
    assert group.mean("sft", claims.ATTACK, ["0", "1"]) == 0.75


def test_the_interval_is_newcombes():
    two = rows() + [{**row, "seed": "1"} for row in rows()]
    text = claims.sources_are_alike(groups_of(two, "toy"), "toy").text
    # Both bounds are 0.01 away: each cell's half width is sqrt(2) 0.01, that of two cells 0.01.
    assert text == "attack -2.0 (-3.0 to -1.0); task +0.0 (-1.0 to +1.0)"


def test_the_tables_are_those_of_the_results():
    page = evidence_tables.PAGE.read_text(encoding="utf-8")
    assert evidence_tables.page_of(page) == page, "run: python benchmarks/evidence_tables.py"


def test_the_page_is_that_of_the_results():
    lines = claims_table(read_csv(RESULTS), read_csv(RESULTS.with_name("inference.csv")))
    page = claims.PAGE.read_text(encoding="utf-8")
    assert page_with(lines, page) == page, "run: python benchmarks/claims.py --write"
    assert lines[0] in page


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("arms")
    arms = ("sft", "adaptive_probe", "adaptive_critic")
    made = [
        save_model(place / arm / "model", tiny_model(seed=seed), PLAIN_TEMPLATE)
        for seed, arm in enumerate(arms)
    ]
    config = made[2] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"probe": 1}))
    return made


def test_what_a_model_folder_gives_away(folders):
    table = {row["arm"]: row for row in compare(folders, rounds=2)}
    assert list(table) == ["sft", "adaptive_probe", "adaptive_critic", "sft again"]
    same = {
        arm: [row[f"same_{w}"] for w in ("files", "names", "config")] for arm, row in table.items()
    }
    assert same["adaptive_probe"] == same["sft again"] == [1, 1, 1]
    assert same["adaptive_critic"] == [0, 1, 0]
    assert table["sft"]["ratio_to_sft"] == 1
    assert all(row["ratio_q20"] > 0 for row in table.values())
    told = [{key: str(value) for key, value in row.items()} for row in table.values()]
    assert inference_is_free(told).holds is False
    alike = [dict(row, ratio_to_sft="1.01") for row in told if row["arm"] != "adaptive_critic"]
    assert inference_is_free(alike).holds is True
    assert inference_is_free([dict(row, ratio_to_sft="0.9") for row in alike]).holds is False
