"""Claimed: judge models stand beside the keyword judge, each with its rate and their agreement.

Exact, against a real HTTP server whose verdicts the test computes: rates, agreement, failures,
known verdicts that are not asked for again, and which judge also gave the risk in training.
"""

import json

import pytest
import yaml
from support.builders import PLAIN_TEMPLATE, save_model, tiny_model
from support.critic_server import is_hopeless, risk_of, running_server

from safereg_dist.cli import main as safereg
from safereg_dist.errors import ConfigError
from safereg_dist.evaluate.critics import JudgedAnswers, compare_judges, read_critic

NUMBERS = [n for n in range(2, 140, 4) if not is_hopeless(n)][:30]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a model, and prompts that name pairs."""
    folder = tmp_path_factory.mktemp("run")
    save_model(folder / "model", tiny_model(seed=3), PLAIN_TEMPLATE)
    rows = [{"prompt": f"pair {n:05d}", "label": "harmful"} for n in NUMBERS]
    rows.append({"prompt": "pair 00099", "label": "benign"})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(folder, endpoint, **more):
    path = folder / "guard.yaml"
    known = {"endpoint": endpoint, "model": "guard", "format": "llama_guard", **more}
    path.write_text(yaml.safe_dump(known))
    return path


def evaluate(run, out, *more):
    words = ["eval", "--model", run / "model", "--prompts", run / "prompts.jsonl", "--out", out]
    words += ["--max-new-tokens", 3, *more]
    assert safereg([str(word) for word in words]) == 0
    return json.loads(out.read_text())


def test_a_judge_beside_the_keywords(run, tmp_path):
    with running_server("good") as server:
        guard = settings(tmp_path, server.url, cache=str(tmp_path / "known.sqlite"))
        found = evaluate(run, tmp_path / "eval.json", "--critic", guard)["judges"]
        answers = [
            json.loads(line)
            for line in (tmp_path / "eval.answers.jsonl").read_text().splitlines()[1:]
        ]
        keyword = [not row["refused"] for row in answers if row["label"] == "harmful"]
        judge = [risk_of(number) >= 0.5 for number in NUMBERS]
        assert 0 < sum(judge) < len(judge)
        assert found["rates"]["guard"] == {
            "attack_success_rate": sum(judge) / len(judge),
            "failed": 0,
            "used_in_training": False,
        }
        assert found["rates"]["keyword"]["attack_success_rate"] == sum(keyword) / len(keyword)
        same = [a == b for a, b in zip(keyword, judge, strict=True)]
        assert found["agreement"] == {"keyword, guard": sum(same) / len(same)}

        asked = server.counts()["verdicts"]
        again = evaluate(run, tmp_path / "again.json", "--critic", guard)["judges"]
        assert again == found
        assert server.counts()["verdicts"] == asked  # every verdict is known


def test_a_judge_that_dies_in_the_middle(run, tmp_path):
    """Its verdicts so far stand, the rest counts as failed, and the next command asks for that."""
    how = {"cache": str(tmp_path / "known.sqlite"), "concurrency": 1, "retries": 0, "timeout_s": 5}
    out = tmp_path / "eval.json"
    with running_server("good") as server:
        whole = settings(tmp_path, server.url, cache="none")
        expected = evaluate(run, tmp_path / "whole.json", "--critic", whole)["judges"]

    with running_server("good", answers=8) as server:
        guard = settings(tmp_path, server.url, **how)
        cut = evaluate(run, out, "--critic", guard)["judges"]["rates"]["guard"]
    assert cut["failed"] == len(NUMBERS) - 8
    answers = out.with_name("eval.answers.jsonl").read_bytes()

    with running_server("good") as server:
        guard = settings(tmp_path, server.url, **how)
        assert evaluate(run, out, "--critic", guard)["judges"] == expected
        assert sum(server.counts()["verdicts"].values()) == len(NUMBERS) - 8
    assert out.with_name("eval.answers.jsonl").read_bytes() == answers


def test_a_judge_of_the_training_is_marked(run, tmp_path):
    (run / "config.yaml").write_text(
        yaml.safe_dump({"risk": {"critic": {"model": "guard", "format": "llama_guard"}}})
    )
    try:
        with running_server("good") as server:
            guard = settings(tmp_path, server.url, cache="none")
            found = evaluate(run, tmp_path / "eval.json", "--critic", guard)["judges"]
    finally:
        (run / "config.yaml").unlink()
    assert found["rates"]["guard"]["used_in_training"]
    assert not found["rates"]["keyword"]["used_in_training"]


def test_verdicts_that_failed_count_nowhere():
    one, other = JudgedAnswers([True, None, False, True]), JudgedAnswers([True, True, True, None])
    found = compare_judges({"one": one, "other": other, "none": JudgedAnswers([None] * 4)})
    assert found["rates"]["one"]["attack_success_rate"] == 2 / 3
    assert found["rates"]["one"]["failed"] == 1
    assert found["rates"]["none"]["attack_success_rate"] is None
    assert found["agreement"] == {"one, other": 0.5, "one, none": None, "other, none": None}


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "check the path"), ("- a\n", "expected the keys"), ("endpont: x\n", "endpoint")],
)
def test_settings_that_cannot_be_read(tmp_path, content, says):
    path = tmp_path / "guard.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=says):
        read_critic(path)
