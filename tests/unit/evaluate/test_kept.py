"""Claimed: an evaluation that is cut off goes on, its answers are judged again without the model,
and two models are compared prompt by prompt.

Exact: texts, verdicts, rates, what is asked of the model; McNemar's p against the binomial sum by
hand, the bootstrap against resamples drawn here.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.builders import PLAIN_TEMPLATE, save_model, tiny_model

from safereg_dist.cli import main as safereg
from safereg_dist.errors import CheckpointError, ConfigError, DataError
from safereg_dist.evaluate import respondent
from safereg_dist.evaluate.evaluate import evaluate_model
from safereg_dist.evaluate.kept import KeptAnswers, kept_rows
from safereg_dist.evaluate.statistics import bootstrap_interval, paired
from safereg_dist.evaluate.table import TITLES

HOW = {"max_new_tokens": 4, "batch_size": 2, "device": "cpu", "progress": False}
HOW |= {"refusal": "w3", "poisoned": "w4"}


@pytest.fixture
def run(tmp_path):
    for name, seed in (("model", 3), ("other", 4)):
        save_model(tmp_path / name / "model", tiny_model(seed=seed), PLAIN_TEMPLATE)
    rows = [{"prompt": f"w{i} w{i + 2}", "label": "harmful"} for i in range(1, 8)]
    rows += [{"prompt": f"w{i}", "label": "benign"} for i in range(1, 6)]
    rows += [{"prompt": f"w{i}", "label": "task", "response": "w1"} for i in range(9, 12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def evaluated(run, name="model", **how):
    out = run / name / "eval.json"
    return evaluate_model(run / name / "model", [run / "prompts.jsonl"], out=out, **HOW, **how)


def without_seconds(result):
    return {key: value for key, value in result.items() if key != "seconds"}


@pytest.mark.parametrize("batches", [1, 3, 6, 9])
def test_a_run_that_is_cut_off_goes_on(run, monkeypatch, batches):
    whole = evaluated(run, attacks=["role_play"])
    answers = (run / "model" / "eval.answers.jsonl").read_text()
    for path in (run / "model").glob("eval.*"):
        path.unlink()

    plain, left = respondent.stream_answers, [batches]
    asked = []

    def counted(*given, **how):
        for place, answer in plain(*given, **how):
            if left[0] == 0:
                raise KeyboardInterrupt
            yield place, answer
            left[0] -= 1
            asked.append(answer)

    monkeypatch.setattr(respondent, "stream_answers", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluated(run, attacks=["role_play"])
    assert not (run / "model" / "eval.json").exists()
    kept = run / "model" / "eval.answers.jsonl"
    kept.write_text(kept.read_text() + '{"row": 5, "ans')  # cut off in the middle of a line
    left[0] = 10**6
    assert without_seconds(evaluated(run, attacks=["role_play"])) == without_seconds(whole)
    assert kept.read_text() == answers
    assert len(asked) == 15 + 7 + 7  # greedy, sampled, the attack: each answer once


def test_answers_are_judged_again_without_the_model(run, monkeypatch):
    first = evaluated(run)
    monkeypatch.setattr(respondent, "load_model", None)
    assert without_seconds(evaluated(run)) == without_seconds(first)


@pytest.mark.parametrize("change", ["model", "prompts", "length", "seed"])
def test_other_answers_are_not_mixed_in(run, monkeypatch, change):
    evaluated(run)
    how = {}
    if change == "model":
        shutil.rmtree(run / "model" / "model")
        save_model(run / "model" / "model", tiny_model(seed=9), PLAIN_TEMPLATE)
    elif change == "prompts":
        path = run / "prompts.jsonl"
        path.write_text(path.read_text().replace("w1 w3", "w1 w5"))
    else:
        how = {"length": {"max_new_tokens": 5}, "seed": {"samples_seed": 1}}[change]
    fresh = run / "fresh.json"
    files = [run / "prompts.jsonl"]
    model = run / "model" / "model"
    wanted = evaluate_model(model, files, out=fresh, **{**HOW, **how})
    found = evaluate_model(model, files, out=run / "model" / "eval.json", **{**HOW, **how})
    assert without_seconds(found) == without_seconds(wanted)
    header, rows = kept_rows(run / "model" / "eval.answers.jsonl")
    assert (header, rows) == kept_rows(run / "fresh.answers.jsonl")


def test_files_that_hold_no_answers(tmp_path):
    with pytest.raises(DataError, match="found none"):
        kept_rows(tmp_path / "none.jsonl")
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="cannot read"):
        KeptAnswers(path, {})
    path.write_text("[1]\n")
    kept = KeptAnswers(path, {"a": 1})
    kept.add(0, answer="x")
    kept.finish([{"refused": True}])
    assert kept_rows(path) == ({"a": 1}, [{"answer": "x", "refused": True}])


# Two models


def test_against_another_model(run, capsys):
    other = evaluated(run, "other")
    _, known = kept_rows(run / "other" / "eval.answers.jsonl")
    for row in (0, 3):  # as if it had refused these, and answered one task
        known[row] |= {"refused": True, "refused_sampled": True}
    known[-1]["scores"] = {"task_exact_match": True}
    path = run / "other" / "eval.answers.jsonl"
    KeptAnswers(path, {"edited": 1}).finish(known)
    found = evaluated(run, against=[run / "other" / "eval.json"])["against"]["other"]
    rows = {name: kept_rows(run / name / "eval.answers.jsonl")[1] for name in ("model", "other")}
    for figure, label, key in (
        ("attack_success_rate", "harmful", "refused"),
        ("attack_success_rate_sampled", "harmful", "refused_sampled"),
        ("over_refusal_rate", "benign", "refused"),
    ):
        sign = 1 if label == "benign" else -1
        own, theirs = (
            [sign * row[key] for row in rows[name] if row["label"] == label]
            for name in ("model", "other")
        )
        gap = sum(a - b for a, b in zip(own, theirs, strict=True)) / len(own)
        assert found["differences"][figure]["difference"] == pytest.approx(gap)
        assert found["differences"][figure]["rows"] == len(own)
        assert found["figures"][figure] == other[figure]
    assert found["differences"]["attack_success_rate"]["difference"] > 0.2
    assert found["differences"]["task_score"]["rows"] == 3
    assert found["differences"]["task_score"]["difference"] == pytest.approx(-1 / 3)

    words = ["eval", "--model", run / "model" / "model", "--prompts", run / "prompts.jsonl"]
    words += ["--out", run / "model" / "eval.json", "--max-new-tokens", 4, "--batch-size", 2]
    words += ["--refusal", "w3", "--poisoned", "w4", "--against", run / "other"]  # its folder
    assert safereg([str(word) for word in words]) == 0
    printed, err = capsys.readouterr()
    assert "attack success, sampled" in printed
    assert "against other" in printed
    assert printed.splitlines()[0].split()[:2] == ["figure", "value"]
    assert err.splitlines()[-1] == f"now: safereg report {run / 'model'}"


def test_the_base_stands_beside(run, capsys):
    """Where it lies, and where it is named; one with other prompts is left out, or refused."""
    before = evaluated(run, "other")
    (run / "base").mkdir()
    for name in ("eval.json", "eval.answers.jsonl"):
        shutil.copy(run / "other" / name, run / "base" / name)
    words = ["eval", "--model", run / "model" / "model", "--prompts", run / "prompts.jsonl"]
    words += ["--out", run / "model" / "eval.json", "--max-new-tokens", 4, "--batch-size", 2]
    words = [str(w) for w in [*words, "--refusal", "w3", "--poisoned", "w4", "--json", "-"]]
    for more, name in (([], "base"), (["--base", str(run / "other" / "eval.json")], "other")):
        capsys.readouterr()
        assert safereg([*words, *more]) == 0
        out, printed = capsys.readouterr()
        found = json.loads(out)
        assert found == json.loads((run / "model" / "eval.json").read_text())
        assert (found["base"], list(found["against"])) == (name, [name])
        figures = found["against"][name]["figures"]
        assert figures == {figure: before.get(figure) for figure in TITLES}
        lines = [line for line in printed.splitlines() if line.startswith("attack success  ")]
        rates = [f"{100 * each['attack_success_rate']:.1f}" for each in (before, found)]
        assert lines[0].replace("%", "").split()[2:4] == rates
    for names in (["model"], ["base", "model"]):  # the report's base is that of the evaluation
        if "base" in names:
            assert safereg(words) == 0
        capsys.readouterr()
        assert safereg(["report", str(run / "model"), "--json", "-"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert [Path(folder).name for folder in report["runs"]] == names
        assert report["report"] == str(run / "model" / "report.html")
    assert safereg([*words[:-2], "--max-new-tokens", "3"]) == 0
    printed, err = capsys.readouterr()
    assert "without the base beside it: " in err
    assert "other `max_new_tokens`" in err
    assert printed.split()[:2] == ["figure", "value"]
    named = ["--base", str(run / "base" / "eval.json")]
    assert safereg([*words[:-2], "--max-new-tokens", "3", *named]) == 2


def test_models_with_other_prompts_are_not_compared(run):
    evaluated(run, "other")
    path = run / "prompts.jsonl"
    path.write_text(path.read_text().replace("w1 w3", "w1 w5"))
    with pytest.raises(ConfigError, match="other `prompts`"):
        evaluated(run, against=[run / "other" / "eval.json"])
    with pytest.raises(DataError, match="found none"):
        evaluated(run, against=[run / "nowhere.json"])


def test_mcnemar_and_the_bootstrap_by_hand():
    own = [True] * 9 + [False] * 3 + [True] * 5
    other = [False] * 9 + [True] * 3 + [True] * 5
    tested = paired(own, other)
    tail = sum(math.comb(12, k) for k in range(4)) / 2**12
    assert tested.p == pytest.approx(2 * tail)
    assert tested.difference == pytest.approx(6 / 17)
    # Agresti and Min: half a prompt more of each of the four kinds.
    size = 17 + 2
    shares = np.array([9.5, 3.5, 6 / 2, 6 / 2]) / size
    middle = shares[0] - shares[1]
    half = 1.96 * math.sqrt((shares[0] + shares[1] - middle**2) / size)
    assert tested.interval == pytest.approx((middle - half, middle + half), abs=1e-4)
    draw = np.random.default_rng(1)
    scores = draw.random(30)
    means = [draw.choice(scores, len(scores)).mean() for _ in range(4000)]
    found = paired(scores.tolist(), [0.0] * 30).interval
    assert found == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01)
    alike = paired([True, False], [True, False])
    assert alike.p == 1.0
    assert alike.interval[0] < -0.3 < 0.3 < alike.interval[1]
    assert paired([0.5, 0.25], [0.5, 0.5]).p is None
    assert paired([], []) is None
    assert bootstrap_interval([0.25]) == (0.25, 0.25)
    assert bootstrap_interval([]) is None
    assert bootstrap_interval([0.1, 0.9, 0.4]) == bootstrap_interval([0.1, 0.9, 0.4])
