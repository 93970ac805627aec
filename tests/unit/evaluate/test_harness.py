"""Claimed: tasks of lm-evaluation-harness run on the model's folder, into the result and its table.

A local task that needs no network. Its accuracies against choices by hand, one plain forward a
choice. Exact: the counts. The refusals need no harness.
"""

import json
import sys
from math import sqrt

import pytest
import torch
import yaml
from support.builders import PLAIN_TEMPLATE, WORDS, save_model, tiny_model

from safereg_dist.cli import main as safereg
from safereg_dist.errors import ConfigError
from safereg_dist.evaluate.evaluate import evaluate_model
from safereg_dist.evaluate.generate import load_model


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", tiny_model(seed=3), PLAIN_TEMPLATE)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w1", "label": "harmful"}\n')
    return tmp_path


def task(folder):
    """A choice of three continuations; its documents."""
    draw = torch.Generator().manual_seed(1)
    pick = torch.randint(0, 90, (24, 5), generator=draw).tolist()
    docs = [
        {"ask": f"{WORDS[a]} {WORDS[b]}", "picks": [WORDS[c] for c in rest], "right": n % 3}
        for n, (a, b, *rest) in enumerate(pick)
    ]
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    settings = {
        "task": "own_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{ask}}",
        "doc_to_choice": "{{picks}}",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(settings))
    return docs


def right_by_hand(folder, docs):
    model, tokenizer = load_model(folder / "model", progress=False, device="cpu")
    count = 0
    for doc in docs:
        scores = []
        for pick in doc["picks"]:
            ids = tokenizer(f"{doc['ask']} {pick}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                scores.append(float(model(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]]))
        count += scores.index(max(scores)) == doc["right"]
    return count


@pytest.mark.filterwarnings("ignore")  # the harness's own, and its libraries'
def test_a_task_of_ones_own(folder, capsys):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (lm-eval)")
    docs = task(folder)
    words = ["--model", folder / "model", "--prompts", folder / "prompts.jsonl"]
    words += ["--lm-eval", folder / "own.yaml", "--out", folder / "eval.json"]
    assert safereg(["eval", *map(str, words), "--max-new-tokens", "2"]) == 0
    found = json.loads((folder / "eval.json").read_text())["lm_eval"]
    right = right_by_hand(folder, docs)
    assert 0 < right < 24
    values = found["tasks"]["own_choice"]
    assert values["acc,none"] == right / 24
    share = right / 24
    assert values["acc_stderr,none"] == pytest.approx(sqrt(share * (1 - share) / 23))
    assert values["rows"] == 24
    printed = capsys.readouterr().out.splitlines()
    [line] = [line for line in printed if line.startswith("own_choice ")]
    assert line.split() == ["own_choice", "acc", f"{share:.4f}", line.split()[3], "24"]
    limited = [*words, "--lm-eval-limit", 5]
    assert safereg(["eval", *map(str, limited), "--max-new-tokens", "2"]) == 0
    limited = json.loads((folder / "eval.json").read_text())["lm_eval"]["tasks"]["own_choice"]
    assert limited["acc,none"] == right_by_hand(folder, docs[:5]) / 5


@pytest.mark.filterwarnings("ignore")
def test_tasks_that_are_none(folder):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (lm-eval)")
    (folder / "code.yaml").write_text("task: t\nprocess_docs: !function utils.process\n")
    (folder / "bare.yaml").write_text("- t\n")
    for name, words in (
        ("no_such_task_here", "has no task no_such_task_here"),
        (str(folder / "code.yaml"), "without code"),
        (str(folder / "bare.yaml"), "under `task`"),
        (str(folder / "gone.yaml"), "cannot read the task"),
    ):
        with pytest.raises(ConfigError, match=words):
            evaluate_model(folder / "model", [folder / "prompts.jsonl"], lm_eval=[name])


def test_what_is_refused_before_anything_is_asked(folder, monkeypatch):
    files = [folder / "prompts.jsonl"]
    with pytest.raises(ConfigError, match="on a model's folder"):
        evaluate_model("name", files, endpoint="http://127.0.0.1:9/v1", lm_eval=["own"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where it is not installed
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r"pip install .safereg-dist\[lm-eval\]."):
        evaluate_model(folder / "no-model", files, lm_eval=["own"])
