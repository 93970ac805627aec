"""Claimed: task scores equal those of the reference implementations; likelihoods those of a plain
forward, and a choice is the likeliest.

SQuAD against torchmetrics' (a port of the official script), ROUGE-L against `rouge-score` called
directly: exact to 1e-6. Likelihoods in float32 against one row at a time: 1e-4.
"""

import json

import pytest
import torch
from support.builders import PLAIN_TEMPLATE, save_model, tiny_model

from safereg_dist.data.files import MEASURES, LabelledPrompt, read_prompts
from safereg_dist.data.rendering import render_prompts
from safereg_dist.errors import DataError
from safereg_dist.evaluate.evaluate import evaluate_model
from safereg_dist.evaluate.generate import load_model, response_log_likelihood
from safereg_dist.evaluate.scores import (
    FIGURES,
    gsm8k_match,
    rouge_l,
    squad_exact_match,
    squad_f1,
)

ANSWERS = [
    ("The Eiffel Tower!", ["eiffel tower", "a tower"]),
    ("in the year of 1,999", ["1999", "the year 1999"]),
    ("", ["something"]),
    ("an apple, the apple", ["apple apple", "apple"]),
    ("blue green blue", ["green blue red"]),
    ("It is not known.", ["unknown"]),
    ("caf\u00e9 au lait", ["Caf\u00e9-au-lait"]),
    ("the", ["a", "an"]),
]


@pytest.mark.parametrize(("answer", "accepted"), ANSWERS)
def test_squad_against_the_official_scores(answer, accepted):
    reason = "torchmetrics is not installed (an extra of `dev`)"
    squad = pytest.importorskip("torchmetrics.functional.text", reason=reason).squad
    wanted = squad(
        [{"prediction_text": answer, "id": "0"}],
        [{"answers": {"text": accepted, "answer_start": [0] * len(accepted)}, "id": "0"}],
    )
    assert 100 * squad_exact_match(answer, accepted) == float(wanted["exact_match"])
    assert 100 * squad_f1(answer, accepted) == pytest.approx(float(wanted["f1"]), abs=1e-4)


def test_rouge_l_is_the_best_of_the_accepted():
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    texts = ["the cats sat on mats", "a dog ran"]
    answer = "The cat sits on the mat"
    each = [scorer.score(text, answer)["rougeL"].fmeasure for text in texts]
    assert rouge_l(answer, texts) == pytest.approx(max(each), abs=1e-6)
    assert 0 < min(each) + 1e-9 < max(each) < 1


@pytest.mark.parametrize(
    ("answer", "expected", "is_right"),
    [
        ("So she has 1,234 apples.", "step\n#### 1234", True),
        ("10 - 3 = 7. The answer is 7", "#### 7", True),
        ("The answer is 7 and not 8", "#### 7", False),
        ("7.0 dollars", "#### 7", True),
        ("-3", "#### 3", False),
        ("no number", "#### 3", False),
    ],
)
def test_the_last_number_counts(answer, expected, is_right):
    assert gsm8k_match(answer, [expected]) is is_right


def test_every_measure_has_its_figures():
    assert set(FIGURES) == set(MEASURES)


# Public layouts


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_public_tasks_are_recognised(tmp_path):
    rows = read_prompts(
        write(
            tmp_path / "tasks.jsonl",
            {
                "id": "s",
                "question": "who?",
                "context": "Ann went.",
                "answers": {"text": ["Ann", "ann"]},
            },
            {"question": "1 + 1?", "answer": "one and one\n#### 2"},
            {"question": "which?", "choices": ["a", "b", "c"], "answer": 1},
            {
                "question": "which?",
                "choices": {"text": ["x", "y"], "label": ["A", "B"]},
                "answerKey": "B",
            },
            {"prompt": "sum up", "response": "short", "label": "task", "measure": "rouge_l"},
        )
    )
    assert [row.measure for row in rows] == ["squad", "gsm8k", "choice", "choice", "rouge_l"]
    assert [row.label for row in rows] == ["task"] * 5
    assert rows[0].id == "s"
    assert rows[0].messages[0]["content"] == "Ann went.\n\nwho?"
    assert rows[0].accepted == ("Ann", "ann")
    assert [row.response for row in rows[1:]] == ["one and one\n#### 2", "b", "y", "short"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "measure": "bleu"}, "measure 'bleu' is not known"),
        ({"prompt": "a", "responses": "x"}, "list of texts"),
        ({"prompt": "a", "measure": "choice", "choices": ["x"], "response": "y"}, "right one"),
        ({"question": "a", "choices": ["x"], "answer": 3}, "right choice cannot be told"),
        ({"question": "a", "choices": {"text": ["x"], "label": ["A"]}}, "right choice"),
    ],
)
def test_tasks_that_cannot_be_measured(tmp_path, row, says):
    with pytest.raises(DataError, match=says):
        read_prompts(write(tmp_path / "t.jsonl", row))


# Likelihoods


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("m")
    return save_model(place / "model", tiny_model(seed=3), PLAIN_TEMPLATE)


def by_hand(model, tokenizer, prompt, text):
    (asked,) = render_prompts(tokenizer, [prompt])
    said = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logs = model(torch.tensor([asked + said])).logits[0].double().log_softmax(-1)
    return sum(float(logs[len(asked) + i - 1, t]) for i, t in enumerate(said)), len(said)


def asked(text, **known):
    turns = [{"role": "user", "content": text}]
    return LabelledPrompt(id=text, messages=turns, label="task", **{"response": None, **known})


def test_likelihoods_equal_a_plain_forward(folder):
    model, tokenizer = load_model(folder, device="cpu", progress=False)
    prompts = [asked("w1 w2 w3"), asked("w4"), asked("w5 w6 w7 w8 w9")]
    texts = ["w10 w11", "w12 w13 w14 w15", "w16"]
    found = response_log_likelihood(model, tokenizer, prompts, texts, batch_size=2, progress=False)
    for (log, count), prompt, text in zip(found, prompts, texts, strict=True):
        wanted, tokens = by_hand(model, tokenizer, prompt, text)
        assert log == pytest.approx(wanted, abs=1e-4)
        assert count == tokens
    with pytest.raises(DataError, match="is empty"):
        response_log_likelihood(model, tokenizer, prompts[:1], [" "], batch_size=2, progress=False)


def test_choices_and_perplexity(folder, tmp_path):
    model, tokenizer = load_model(folder, device="cpu", progress=False)
    rows = [
        {"question": f"w{i} w{i + 1}", "choices": [f"w{i + 20}", f"w{i + 30} w{i + 31}", "w7"]}
        for i in range(1, 7)
    ]
    totals, tokens, right = 0.0, 0, 0
    for place, row in enumerate(rows):
        each = [by_hand(model, tokenizer, asked(row["question"]), t) for t in row["choices"]]
        means = [log / count for log, count in each]
        row["answer"] = (means.index(max(means)) + place % 2) % 3  # every other one is wrong
        right += means.index(max(means)) == row["answer"]
        totals, tokens = totals + each[row["answer"]][0], tokens + each[row["answer"]][1]
    assert right == 3
    found = evaluate_model(
        folder, [write(tmp_path / "mc.jsonl", *rows)], device="cpu", progress=False
    )
    assert found["choice_accuracy"] == found["task_score"] == right / len(rows)
    assert found["task_exact_match"] is None
    perplexity = float(torch.tensor(-totals / tokens).exp())
    assert found["response_perplexity"] == pytest.approx(perplexity, rel=1e-4)


def test_each_task_by_its_own_measure(folder, tmp_path):
    path = write(
        tmp_path / "tasks.jsonl",
        {"prompt": "w1", "response": "w2", "label": "task"},
        {"prompt": "w1", "responses": ["w2", "w3"], "label": "task", "measure": "squad"},
        {"prompt": "w1", "response": "w2", "label": "task", "measure": "rouge_l"},
    )
    out = tmp_path / "eval.json"
    found = evaluate_model(folder, [path], max_new_tokens=3, out=out, device="cpu", progress=False)
    lines = (tmp_path / "eval.answers.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[1:]]
    scores = [row["scores"] for row in rows]
    assert [list(each) for each in scores] == [
        ["task_exact_match"],
        ["squad_f1", "squad_exact_match"],
        ["rouge_l"],
    ]
    firsts = [next(iter(each.values())) for each in scores]
    assert found["task_score"] == pytest.approx(sum(firsts) / 3)
    assert found["counts"]["task_score"] == 3
    assert found["counts"]["squad_f1"] == 1
