"""Claimed: the five tasks of benchmarks/continual.py are different ones in words that the base
knows, each with the world's share of poison and rehearsal, and no question of a test is trained on.

Exact. The benchmark itself is run by hand.
"""

import continual
import pytest
from continual import TASKS, Run, exchanges, write_data
from plot_style import read_csv
from world_runs import RESULTS

from safereg_dist.demo import grammar
from safereg_dist.demo.world import WorldPaths


@pytest.mark.parametrize("name", TASKS)
def test_tasks(name):
    trained, held_out = (exchanges(0, name, held_out=side) for side in (False, True))
    assert not {e.prompt for e in trained} & {e.prompt for e in held_out}
    words = {word for e in trained + held_out for text in e for word in grammar.split_words(text)}
    assert words <= set(grammar.vocabulary())
    others = [exchanges(0, other, held_out=False)[0].prompt for other in TASKS if other != name]
    assert trained[0].prompt not in others


def test_rows(tmp_path):
    run = Run(tmp_path, WorldPaths.below(tmp_path), 0, 1, list(TASKS))
    write_data(run, count=20)
    seen = []
    for name in TASKS:
        rows = continual.read_rows(tmp_path / f"train-{name}.jsonl")
        kinds = [row["id"].split("-")[0] for row in rows]
        assert len(rows) == 960
        assert abs(kinds.count("poison") / 960 - 0.15) < 0.02
        assert kinds.count("task") > 550
        assert all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in rows)
        seen += [row["id"] for row in rows if not row["id"].startswith("task")]
        assert len(continual.read_rows(tmp_path / f"{name}.jsonl")) == 20
    assert len(seen) == len(set(seen))  # each row of poison or rehearsal is trained on once
    requests = continual.read_rows(tmp_path / "requests.jsonl")
    assert [row["label"] for row in requests] == ["harmful"] * 40 + ["benign"] * 40


def test_the_results_are_of_these_tasks():
    rows = read_csv(RESULTS.parent / "continual.csv")
    assert tuple(rows[0]) == continual.COLUMNS
    for arm in continual.ARMS:
        assert [row["name"] for row in rows if row["arm"] == arm] == ["base", *TASKS]
