"""Claimed: a sweep trains and evaluates every cell once, goes on where it was cut off, tries failed
cells again, and its table holds what the cells' own files hold.

Exact: cells, overrides, figures, what is started again. Trainings are real (a tiny model).
"""

import csv
import itertools
import json

import pytest
import yaml
from safetensors.torch import load_file
from support.builders import PLAIN_TEMPLATE, random_rows, save_model, tiny_model, write_jsonl

from safereg_dist.cli import main as safereg
from safereg_dist.commands import train as training
from safereg_dist.errors import ConfigError
from safereg_dist.experiments.sweep import FIGURES, cells_of, read_sweep


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model", tiny_model(seed=3), PLAIN_TEMPLATE)
    write_jsonl(tmp_path / "a.jsonl", random_rows(12, seed=1))
    write_jsonl(tmp_path / "b.jsonl", random_rows(12, seed=2))
    for name, label in (("harmful", "harmful"), ("tasks", "task")):
        rows = [{"prompt": f"w{i}", "label": label, "response": "w3"} for i in range(4)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    base = {
        "model": "model",
        "data": {"train": "a.jsonl"},
        "risk": {"estimator": "column", "max_held_back": 1.0},
        "train": {"steps": 2, "micro_batch_size": 2, "precision": "fp32"},
        "optimizer": {"lr": 0.01},
        "engine": {"name": "single"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(base))
    sweep = {
        "config": "run.yaml",
        "out": "runs/sweep",
        "axes": {
            "seed": {7: ["train.seed=7"]},
            "data": {"a": None, "b": ["data.train=b.jsonl"]},
        },
        "arms": {
            "base": None,
            "sft": ["regularizer.objective=none", "risk.estimator=none"],
            "adaptive": [],
        },
        "skip": [{"arm": "sft", "seed": 7, "data": "b"}],
        "evaluation": {"prompts": ["harmful.jsonl", "tasks.jsonl"], "max_new_tokens": 3},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    return tmp_path


def table(folder):
    with (folder / "runs" / "sweep" / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_cell_once_and_on_after_a_cut(folder, monkeypatch, capsys):
    assert safereg(["sweep", "sweep.yaml", "--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert names == [
        *("seed 7, data a, base", "seed 7, data a, sft", "seed 7, data a, adaptive"),
        *("seed 7, data b, base", "seed 7, data b, adaptive"),
    ]

    started, plain = [], training.train_as

    def counted(*given):
        started.append(given)
        if len(started) == 3:
            raise KeyboardInterrupt
        return plain(*given)

    monkeypatch.setattr(training, "train_as", counted)
    assert safereg(["sweep", "sweep.yaml"]) == 130
    rows = table(folder)
    assert {(r["seed"], r["data"], r["arm"]) for r in rows} == {
        *(("7", "a", arm) for arm in ("base", "sft", "adaptive")),
        ("7", "b", "base"),
    }
    first = (folder / "runs/sweep/seed=7/data=a/sft/seconds.json").read_text()
    assert safereg(["sweep", "sweep.yaml"]) == 0
    assert "about" in capsys.readouterr().out
    assert len(started) == 3 + 1  # one was cut off
    assert (folder / "runs/sweep/seed=7/data=a/sft/seconds.json").read_text() == first
    capsys.readouterr()
    assert safereg(["sweep", "sweep.yaml", "--json", "-"]) == 0
    assert len(started) == 4
    figures, printed = capsys.readouterr()
    figures = json.loads(figures)

    rows = table(folder)
    assert len(rows) == 5 * 3
    assert {row["status"] for row in rows} == {"done"}
    assert figures["failed_cells"] == 0
    for row, figure in zip(rows, figures["rows"], strict=True):
        assert {name: row[name] for name in figure} == {k: str(v) for k, v in figure.items()}
        assert {row[name] for name in FIGURES if name not in figure} <= {""}
        shown = [line.split()[:4] for line in printed.splitlines()]
        assert [row["arm"], row["seed"], row["data"], "done"] in shown
    for row in rows:
        place = folder / f"runs/sweep/seed={row['seed']}/data={row['data']}/{row['arm']}"
        found = json.loads((place / "eval.json").read_text())
        known = found["sets"][row["set"]] if row["set"] else found
        for figure in ("attack_success_rate", "task_score", "over_refusal_rate"):
            assert row[figure] == ("" if known[figure] is None else str(known[figure]))
        if row["arm"] != "base":
            assert list(found["against"]) == ["base"]
            config = yaml.safe_load((place / "config.yaml").read_text())
            assert config["train"]["seed"] == int(row["seed"])
            assert config["data"]["train"] == str(folder / f"{row['data']}.jsonl")
            assert config["regularizer"]["objective"] == (
                "none" if row["arm"] == "sft" else "convex"
            )


def test_several_at_a_time_find_the_same(folder, capsys):
    assert safereg(["sweep", "sweep.yaml"]) == 0
    alone = [{**row, "seconds": ""} for row in table(folder)]
    sweep = yaml.safe_load((folder / "sweep.yaml").read_text()) | {"jobs": 2, "out": "runs/both"}
    sweep["axes"]["data"]["c"] = ["data.train=c.jsonl"]  # there is no such file
    (folder / "both.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    assert safereg(["sweep", "both.yaml"]) == 1
    with (folder / "runs/both/results.csv").open(newline="") as file:
        rows = [{**row, "seconds": ""} for row in csv.DictReader(file)]
    assert [row for row in rows if row["data"] != "c"] == alone
    assert {row["arm"] for row in rows if row["status"] == "failed"} == {"sft", "adaptive"}
    assert "failed: seed 7, data c, sft" in capsys.readouterr().out
    log = (folder / "runs/both/seed=7/data=c/sft.log").read_text()
    assert "c.jsonl" in log


def test_a_cell_that_fails_is_told_and_tried_again(folder, capsys):
    sweep = yaml.safe_load((folder / "sweep.yaml").read_text())
    sweep["axes"] = {"data": {"c": ["data.train=c.jsonl"]}}
    halfway = {"overrides": [], "after": {"interpolate": 0.5}}
    sweep["arms"], sweep["skip"] = {"base": [], "halfway": halfway, "adaptive": []}, []
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    assert safereg(["sweep", "sweep.yaml"]) == 1
    assert [(r["data"], r["status"]) for r in table(folder) if not r["set"]] == [
        ("c", "done"),
        ("c", "failed"),
        ("c", "failed"),
    ]
    assert "sweep/data=c/adaptive trains, which failed" in capsys.readouterr().out
    write_jsonl(folder / "c.jsonl", random_rows(12, seed=3))
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**sweep, "jobs": 2}, sort_keys=False))
    assert safereg(["sweep", "sweep.yaml"]) == 0
    assert [r["status"] for r in table(folder) if not r["set"]] == ["done", "done", "done"]


def test_every_rival_beside_the_others(folder, monkeypatch):
    """Each by its own row of docs/evaluation.md; what two arms share is trained once."""
    plain = ["regularizer.objective=none", "risk.estimator=none"]
    safety = [{**row, "id": f"safe{i}"} for i, row in enumerate(random_rows(4, seed=5))]
    write_jsonl(folder / "safety.jsonl", safety)
    save_model(folder / "unaligned", tiny_model(seed=8), PLAIN_TEMPLATE)
    mixed = [{"path": "{data}.jsonl", "weight": 0.75}, {"path": "safety.jsonl", "weight": 0.25}]
    sweep = yaml.safe_load((folder / "sweep.yaml").read_text())
    sweep["axes"], sweep["skip"] = {"data": {"a": []}}, []
    sweep["arms"] = {
        "base": None,
        # First what changes another arm's model: the order is no matter.
        "halfway": {"overrides": plain, "after": {"interpolate": 0.5}},
        "sft": plain,
        "safe_lora": {
            "overrides": plain,
            "after": {"safe_lora": {"unaligned": "unaligned", "layers": 3}},
        },
        "alone": {"overrides": [*plain, "optimizer.lr=0.02"], "after": {"interpolate": 0.0}},
        "token_wise": ["regularizer.objective=token_wise", "risk.estimator=none"],
        "safe_instr": [*plain, f"data.train={json.dumps(mixed)}"],
        "lisa": [*plain, "lisa.safety=safety.jsonl", "lisa.safety_steps=1"],
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    started, plainly = [], training.train_as

    def counted(config, overrides):
        started.append(overrides[-1].rpartition("/")[2])
        return plainly(config, overrides)

    monkeypatch.setattr(training, "train_as", counted)
    assert safereg(["sweep", "sweep.yaml"]) == 0
    assert started == ["sft", "alone", "token_wise", "safe_instr", "lisa"]
    assert {(r["arm"], r["status"]) for r in table(folder)} == {(a, "done") for a in sweep["arms"]}

    place = folder / "runs/sweep/data=a"
    weights = {
        name: load_file(path / "model.safetensors")
        for name, path in {
            "base": folder / "model",
            **{arm: place / arm / "model" for arm in ("sft", "token_wise", "safe_instr", "lisa")},
            **{arm: place / arm / "changed" for arm in ("halfway", "safe_lora", "alone")},
        }.items()
    }
    for name, before in weights["base"].items():
        middle = (before + weights["sft"][name]) / 2
        assert (weights["halfway"][name] - middle).abs().max() < 1e-6
        assert weights["alone"][name].equal(before)
    changed = [n for n, w in weights["safe_lora"].items() if not w.equal(weights["sft"][n])]
    report = json.loads((place / "safe_lora/changed/after_training.json").read_text())
    assert changed == report["projected"]
    assert len(changed) == 3
    trained = ("sft", "token_wise", "safe_instr", "lisa")
    for one, other in itertools.combinations(trained, 2):
        assert not weights[one]["lm_head.weight"].equal(weights[other]["lm_head.weight"])
    row = json.loads((place / "token_wise/metrics.jsonl").read_text().splitlines()[0])
    assert row["reference_rows"] == row["rows"]
    ledger = (place / "safe_instr/ledger.jsonl").read_text().splitlines()
    ids = [json.loads(line)["id"] for line in ledger]
    assert len(ids) == 4
    assert sum(id.startswith("safe") for id in ids) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"arms": {"base": {"after": {"interpolate": 0.5}}}}, "has no `after`"),
        ({"arms": {"x": {"after": {}}}}, "interpolate or safe_lora"),
        ({"arms": {"x": {"overides": []}}}, "arms.x.overides"),
        ({"arms": {"x": 3}}, "arms.x must be a section"),
        ({"arms": {"x": [2**63]}}, "arms.x.overrides[0] must be a valid string"),
        ({"arms": {}}, "needs `arms`"),
        ({"axes": {"data": {"a": 4}}}, "axes.data.a must be a list, got 4"),
        ({"axes": {"data": 4}}, "axes.data must be"),
        ({"skip": [3]}, "skip[0] must be"),
        ({"axes": {"set": {"a": []}}}, "name of a column"),
        ({"evaluaton": {}}, "evaluation"),
        ({"arms": {"x": ["train.stepz=3"]}}, "stepz"),
        ({"evaluation": {"prompts": ["a"], "max_new_tokens": 0}}, "max_new_tokens"),
    ],
)
def test_what_is_no_sweep(folder, change, says, capsys):
    sweep = yaml.safe_load((folder / "sweep.yaml").read_text()) | change
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    assert safereg(["sweep", "sweep.yaml"]) == 2
    assert says in capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_files_that_are_no_sweep(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        read_sweep(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="expected the keys"):
        read_sweep(tmp_path / "list.yaml")


def test_overrides_of_arms_come_last(folder):
    sweep = read_sweep(folder / "sweep.yaml")
    cell = next(c for c in cells_of(sweep) if c.name == "seed 7, data a, sft")
    assert cell.overrides[0] == "train.seed=7"
    assert cell.overrides[1:3] == ("regularizer.objective=none", "risk.estimator=none")
    assert cell.overrides[3].startswith("output_dir=")


def test_values_of_axes_stand_in_for_their_names(folder):
    sweep = yaml.safe_load((folder / "sweep.yaml").read_text())
    sweep["arms"]["adaptive"] = ["data.train={data}-{seed}.jsonl", 'risk.critic={"model": "m"}']
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    cells = cells_of(read_sweep(folder / "sweep.yaml"))
    cell = next(c for c in cells if c.name == "seed 7, data b, adaptive")
    rows = json.dumps(str(folder / "b-7.jsonl"))
    assert cell.overrides[2:4] == (f"data.train={rows}", 'risk.critic={"model": "m"}')
    assert cell.named(["held-{seed}-{other}.jsonl"]) == ["held-7-{other}.jsonl"]
