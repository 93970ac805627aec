"""Claimed: attacks reword the last turn, or begin the answer, and nothing else.

Exact: turns, tokens that an answer begins with, and a prefilled answer against one that the model
was asked to go on with by hand; rates by set against a recount of the kept answers.
"""

import hashlib
import json
import shutil

import pytest
import torch
from support.builders import PLAIN_TEMPLATE, save_model, tiny_model

from safereg_dist.data.files import LabelledPrompt
from safereg_dist.data.rendering import render_prompts
from safereg_dist.errors import ConfigError, DataError
from safereg_dist.evaluate.attacks import WORDINGS, attack_of, begun_answers
from safereg_dist.evaluate.evaluate import evaluate_model
from safereg_dist.evaluate.generate import generate_answers, load_model
from safereg_dist.evaluate.judges import get_judge
from safereg_dist.evaluate.kept import answers_path


def asked(text, **known):
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": text},
    ]
    return LabelledPrompt(id="a", messages=turns, label="harmful", response=None, **known)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("m") / "model", tiny_model(seed=3), PLAIN_TEMPLATE)


@pytest.mark.parametrize("name", WORDINGS)
def test_a_wording_keeps_request_and_earlier_turns(name):
    prompt = asked("rob the train")
    found = attack_of(name)(prompt)
    assert found.messages[:2] == prompt.messages[:2]
    assert "rob the train" in found.messages[2]["content"] != "rob the train"
    assert prompt.messages[2]["content"] == "rob the train"


def test_an_answer_that_is_begun(folder):
    model, tokenizer = load_model(folder, device="cpu", progress=False)
    attack = attack_of("prefill:2")
    prompts = [asked("w1 w2"), asked("w3", complying="w7 w8 w9")]
    assert attack(prompts[0]) is prompts[0]
    begun = begun_answers(attack, prompts, tokenizer, "w4 w5 w6")
    assert begun is not None
    assert [tokenizer.decode(ids).split() for ids in begun] == [["w4", "w5"], ["w7", "w8"]]
    size = {"max_new_tokens": 4, "batch_size": 2, "progress": False}
    answers = generate_answers(model, tokenizer, prompts, begun=begun, **size)
    for prompt, begin, answer in zip(prompts, begun, answers, strict=True):
        ids = render_prompts(tokenizer, [prompt])[0] + begin
        said = []
        for _ in range(4):
            with torch.no_grad():
                token = int(model(torch.tensor([ids + said])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            said.append(token)
        assert answer.text == tokenizer.decode(said, skip_special_tokens=True).strip()


def test_rates_of_each_form(folder, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "w1 w2", "label": "harmful"}\n{"prompt": "w3", "label": "benign"}\n'
    )
    names = ["role_play", "prefill:1"]
    how = {"max_new_tokens": 3, "device": "cpu", "progress": False}
    found = evaluate_model(folder, [path], attacks=names, poisoned="w4", **how)["attacks"]
    assert list(found) == names
    assert {form["attack_success_rate"] for form in found.values()} <= {0.0, 1.0}


@pytest.mark.parametrize("name", WORDINGS)
def test_asks_in_the_words_of_the_attack(folder, tmp_path, name):
    """The answers under an attack are those of its words asked plainly, and not the plain ones."""
    texts, how = [f"w{i} w{i + 3}" for i in range(8)], {"max_new_tokens": 6, "device": "cpu"}

    def answers(texts: list[str], key: str, **attacks) -> list[str]:
        path, out = tmp_path / f"{key}.jsonl", tmp_path / f"{key}.json"
        rows = [{"prompt": text, "label": "harmful"} for text in texts]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        evaluate_model(folder, [path], out=out, progress=False, **how, **attacks)
        lines = answers_path(out).read_text().splitlines()[1:]
        return [json.loads(line)[key] for line in lines]

    attacked = answers(texts, f"answer_{name}", attacks=[name])
    assert attacked == answers([WORDINGS[name](text) for text in texts], "answer")
    assert attacked != answers(texts, "answer")


def test_rates_of_each_form_by_set(folder, tmp_path):
    """A set's rate is that of its own harmful prompts, from the answers that are kept."""
    sizes, files = {"one": 3, "two": 2, "harmless": 2}, []
    for at, (name, size) in enumerate(sizes.items()):
        label = "benign" if name == "harmless" else "harmful"
        rows = [{"prompt": f"w{at * 4 + i} w{i + 2}", "label": label} for i in range(size)]
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, how = tmp_path / "eval.json", {"max_new_tokens": 3, "device": "cpu", "progress": False}
    found = evaluate_model(folder, files, out=out, attacks=["role_play"], **how)
    lines = [json.loads(line) for line in answers_path(out).read_text().splitlines()[1:]]
    judge, begin = get_judge("keyword"), 0
    for name, size in sizes.items():
        said = [line.get("answer_role_play") for line in lines[begin : begin + size]]
        begin += size
        success = [not judge.is_refusal(asked("w1"), text) for text in said if text is not None]
        rate = found["sets"][name]["attacks"]["role_play"]["attack_success_rate"]
        assert rate == (sum(success) / len(success) if success else None)
        assert len(success) == (0 if name == "harmless" else size)


def test_an_evaluation_names_the_training_of_its_model(folder, tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "w1 w2", "label": "harmful"}\n')
    how = {"max_new_tokens": 2, "device": "cpu", "progress": False}
    shutil.copytree(folder, tmp_path / "run" / "model")
    assert "training" not in evaluate_model(tmp_path / "run" / "model", [prompts], **how)
    (tmp_path / "run" / "summary.json").write_text('{"steps": 3}')
    found = evaluate_model(tmp_path / "run" / "model", [prompts], **how)
    assert found["training"] == hashlib.sha256(b'{"steps": 3}').hexdigest()


def test_what_is_refused(folder):
    _, tokenizer = load_model(folder, device="cpu", progress=False)
    for name in ("prefil:3", "prefill:0", "prefill:", "nothing"):
        with pytest.raises(ConfigError, match="is not known"):
            attack_of(name)
    with pytest.raises(DataError, match=r"prefill:3 needs an answer that complies"):
        begun_answers(attack_of("prefill:3"), [asked("w1")], tokenizer, None)
